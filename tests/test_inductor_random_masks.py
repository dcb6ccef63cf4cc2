"""Random chains of scales, masks, biases, soft caps, shifts and sinks between the two products: rewritten or not, right.

A wrong answer is not acceptable, a decline is; that many are rewritten is asked for too.
"""

from __future__ import annotations

import random

import pytest
import torch
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
