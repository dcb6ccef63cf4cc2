"""Random chains of scales, masks, biases, soft caps, shifts and sinks between the two products; and random masks made in the
graph from comparisons of places, of which some are proven to be causal or a window. Rewritten or not, right.

A wrong answer is not acceptable, a decline is; that many are rewritten, and many masks proven, is asked for too.

    FI_OPS_RANDOM_MASKS=4000 pytest tests/test_inductor_random_masks.py -k places -n 4          as many masks as wanted (default 60)
"""

from __future__ import annotations

import operator
import os
import random

import pytest
import torch
import torch.nn.functional as F
from inductor_capture import capture

from fi_ops.testing import assert_within_budget

B, H, L, S, D = 2, 4, 5, 7, 16
CASES = 120
STEPS = ("times", "over", "add", "never", "lowest", "low", "cap", "cast", "shift", "each row")


class Chain:
    """One random chain: `steps` of (name, number or index of an operand), with `operands`."""

    def __init__(self, seed: int):
        choose = random.Random(seed)
        self.dtype = choose.choice([torch.float32, torch.float32, torch.bfloat16])
        self.merged = choose.random() < 0.4
        shapes = [(1, L, S), (L, S), (1, 1, S)]
        shapes += (
            [(B * H, 1, S), (B * H, L, S)] if self.merged else [(B, 1, 1, S), (1, H, 1, S), (H, L, S), (B, H, L, S)]
        )
        self.operands: list[torch.Tensor] = []
        self.steps = []
        for name in choose.choices(STEPS, k=choose.randint(0, 5)):
            shape = choose.choice(shapes)
            if name in ("times", "over"):
                self.steps.append((name, choose.choice([0.25, 1.5, 2.0])))
            elif name == "add":
                self.steps.append((name, self._operand(torch.randn(shape).to(self.dtype))))
            elif name in ("never", "lowest", "low"):
                keep = torch.rand(shape) > 0.3
                keep[..., 0] = True  # no row without a key: eager says NaN there, the ops 0
                self.steps.append((name, self._operand(keep)))
            elif name != "each row":
                self.steps.append((name, 0))
            elif choose.random() < 0.3:  # nothing with it can be rewritten
                self.steps.append((name, self._operand(torch.rand(L, 1).to(self.dtype))))
        has_sinks = not self.merged and choose.random() < 0.3
        self.sinks = self._operand(torch.randn(H).to(self.dtype)) if has_sinks else None
        self.in_float32 = choose.random() < 0.4
        self.dynamic = choose.random() < 0.3

    def _operand(self, tensor: torch.Tensor) -> int:
        self.operands.append(tensor)
        return len(self.operands) - 1

    def __call__(self, q, k, v, *operands):
        if self.merged:
            q, k, v = (t.reshape(B * H, *t.shape[2:]) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2)
        for name, which in self.steps:
            scores = self._step(scores, name, which, operands)
        if self.sinks is not None:
            sinks = operands[self.sinks].reshape(1, -1, 1, 1).expand(B, -1, L, -1)
            scores = torch.cat([scores, sinks], -1)
            scores = scores - scores.max(-1, keepdim=True).values
        wide = torch.promote_types(scores.dtype, torch.float32) if self.in_float32 else scores.dtype
        weights = scores.softmax(-1, dtype=wide).to(q.dtype)
        result = (weights if self.sinks is None else weights[..., :-1]) @ v
        return result.reshape(B, H, L, D)

    def _step(self, scores, name, which, operands):
        if name == "times":
            return scores * which
        if name == "over":
            return scores / which
        if name == "add":
            return scores + operands[which]
        if name == "never":
            return torch.where(operands[which], scores, float("-inf"))
        if name in ("lowest", "low"):
            return scores.masked_fill(~operands[which], torch.finfo(self.dtype).min if name == "lowest" else -50.0)
        if name == "cap":
            return torch.tanh(scores / 3.0) * 3.0
        if name == "cast":
            return scores.to(torch.promote_types(scores.dtype, torch.float32)).to(scores.dtype)
        return scores - scores.amax(-1, keepdim=True) if name == "shift" else scores * operands[which]


def is_rewritten(seed: int) -> bool:
    """Whether the chain of a seed is; its answer is right either way."""
    torch.manual_seed(seed)
    chain = Chain(seed)
    inputs = [0.6 * torch.randn(B, H, length, D) for length in (L, S, S)]  # exponentials of small numbers err little
    inputs = [*(t.to(chain.dtype) for t in inputs), *chain.operands]
    with torch.no_grad():
        plain = chain(*inputs)
        exact = chain(*(t.double() if t.is_floating_point() else t for t in inputs))
    for tensor in inputs[:3]:
        torch._dynamo.mark_static(tensor, 3)
    got = capture(chain, *inputs, dynamic=chain.dynamic)
    what = f"seed {seed}: {chain.steps}, sinks {chain.sinks}, {got.sites}"
    assert not any("internal error" in reason for reason in got.reasons()), what
    assert_within_budget(got.output, exact, plain, what)
    return any(got.grades())


@pytest.mark.parametrize("seed", [0, 1000, 2000])
def test_right_whether_rewritten_or_not(seed):
    rewritten = sum(is_rewritten(seed + i) for i in range(CASES // 3))
    assert rewritten > CASES / 3 / 4


PLACES = int(os.environ.get("FI_OPS_RANDOM_MASKS", "60"))
BLOCK = 20
ROWS, KEYS, CACHE = 5, 7, 11
COMPARISONS = (operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne)
USUAL = ("causal", "causal", "window", "padding", "length")
ODD = ("compare", "distance", "tril", "triu", "block", "place", "constant")


class Places:
    """A random mask of places, how it is applied, and to what: keys that are there, or a cache that is written first."""

    def __init__(self, seed: int):
        choose = self.choose = random.Random(seed)
        self.dtype = choose.choice([torch.float32, torch.float32, torch.bfloat16])
        self.dynamic = choose.random() < 0.3
        self.rows = choose.choice([1, ROWS, ROWS])
        self.appends = choose.random() < 0.5
        self.keys = CACHE if self.appends else choose.choice([self.rows, KEYS])
        self.positions = torch.arange(self.rows) + choose.randint(0, 4)
        self.others = torch.randint(0, self.keys, (choose.choice([1, B]), 1, self.rows, 1))
        self.padding = torch.rand(B, 1, 1, self.keys) > 0.3
        self.kind = choose.choice(["sdpa", "sdpa", "fill", "added", "product", "two"])
        lowest = torch.finfo(self.dtype).min
        self.fill = lowest if self.kind == "product" else choose.choice([float("-inf"), lowest])
        self.int_type = choose.choice([torch.int64, torch.int64, torch.int32])
        parts = [self._leaf(choose.choice(USUAL)) for _ in range(choose.randint(1, 3))]
        parts += [self._tree(2) for _ in range(choose.choice([0, 0, 1]))]
        self.tree = ("and", *parts)
        self.second = self._leaf(choose.choice(USUAL))

    def _tree(self, depth: int) -> tuple:
        name = self.choose.choice(["and", "or", "not", "leaf", "leaf"]) if depth else "leaf"
        if name == "leaf":
            return self._leaf(self.choose.choice(USUAL + ODD))
        return (name, *(self._tree(depth - 1) for _ in range(1 if name == "not" else 2)))

    def _leaf(self, name: str) -> tuple:
        number = self.choose.randint(-2, 6)
        if name == "causal":
            return name, self.choose.choice(["static", "positions"]), self.choose.choice([0, 0, 0, 1, -1, number])
        if name == "window":
            return name, self.choose.choice(["static", "positions"]), self.choose.randint(1, 5)
        if name == "compare":
            return (
                name,
                self.choose.choice(COMPARISONS),
                self.choose.choice([1, 2, -1]),
                self.choose.choice([1, 0, 2]),
                number,
            )
        return name, self.choose.choice(COMPARISONS), number

    def mask(self, tree: tuple, positions, others, padding, keys: int) -> torch.Tensor:
        """[1 or B, 1, L or 1, S], or fewer dimensions"""
        name, *rest = tree
        j = torch.arange(keys, dtype=self.int_type)
        i = torch.arange(positions.shape[0], dtype=self.int_type)[:, None]
        if name in ("and", "or", "not"):
            first, *more = (self.mask(part, positions, others, padding, keys) for part in rest)
            if name == "not":
                return ~first
            for part in more:
                first = first & part if name == "and" else first | part
            return first
        if name == "causal":
            return j <= (i if rest[0] == "static" else positions[:, None]) + rest[1]
        if name == "window":
            return j > (i if rest[0] == "static" else positions[:, None]) - rest[1]
        if name == "padding":
            return padding
        if name == "length":
            return j < keys + min(rest[1], 0)
        if name == "compare":
            return rest[0](rest[1] * j, rest[2] * i + rest[3])
        if name == "distance":
            return rest[0]((i - j).abs(), abs(rest[1]))
        if name == "tril":
            return torch.ones(positions.shape[0], keys).tril(rest[1]) != 0
        if name == "triu":
            return torch.ones(positions.shape[0], keys, dtype=torch.bool).triu(rest[1])
        if name == "block":
            return rest[0](j // 3, i // 3)
        if name == "place":
            return rest[0](j, others)
        return torch.full((1, 1), rest[1] > 0)

    def __call__(self, q, k, v, kc, vc, positions, others, padding):
        if self.appends:
            kc.index_copy_(2, positions, k)
            vc.index_copy_(2, positions, v)
            k, v = kc, vc
        keep, second = (self.mask(t, positions, others, padding, k.shape[2]) for t in (self.tree, self.second))
        if self.kind == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=keep.expand(q.shape[0], 1, q.shape[2], k.shape[2]))
        scores = q @ k.mT
        if self.kind == "fill":
            scores = scores.masked_fill(~keep, self.fill)
        elif self.kind == "added":
            scores = scores + torch.where(keep, 0.0, self.fill).to(q.dtype)
        elif self.kind == "product":
            scores = scores + ((1.0 - keep.float()) * self.fill).to(q.dtype)
        else:
            scores = scores.masked_fill(~keep, self.fill) + torch.where(second, 0.0, self.fill).to(q.dtype)
        return scores.softmax(-1) @ v

    def is_defined(self) -> bool:
        """Every row sees a key, or is the mean of all: eager says NaN to a row that -inf leaves nothing."""
        keep = self.mask(self.tree, self.positions, self.others, self.padding, self.keys)
        if self.kind == "two":
            keep = keep & self.mask(self.second, self.positions, self.others, self.padding, self.keys)
        return self.kind == "sdpa" or self.fill != float("-inf") or bool(keep.any(-1).all())


def is_proven(seed: int) -> bool | None:
    """Whether the op needs less of a mask than there is; its answer is right either way. None for a mask of no meaning."""
    torch.manual_seed(seed)
    case = Places(seed)
    if not case.is_defined():
        return None
    given = case.rows if case.appends else case.keys
    lengths = (case.rows, given, given, case.keys, case.keys)
    tensors = [(0.6 * torch.randn(B, H, length, D)).to(case.dtype) for length in lengths]
    rest = (case.positions, case.others, case.padding)

    def copies(dtype):
        return [t.to(dtype, copy=True) for t in tensors]

    with torch.no_grad():
        plain = case(*copies(case.dtype), *rest)
        exact = case(*copies(torch.float64), *rest)
    inputs = copies(case.dtype)
    for tensor in inputs:
        torch._dynamo.mark_static(tensor, 3)
    got = capture(case, *inputs, *rest, dynamic=case.dynamic)
    what = f"seed {seed}: {case.kind} {case.fill} {case.tree}, {case.second}, {got.sites}"
    assert not any("internal error" in reason for reason in got.reasons()), what
    assert_within_budget(got.output, exact, plain, what)
    return any("by its mask" in piece for site in got.sites for piece in site.pieces)


@pytest.mark.parametrize("block", range(0, PLACES, BLOCK))
def test_masks_of_places(block):
    found = [is_proven(block + i) for i in range(BLOCK)]
    known = [one for one in found if one is not None]
    assert sum(known) >= len(known) / 5, found
