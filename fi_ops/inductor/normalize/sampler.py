"""Samplers: a draw from softmax(filtered logits).

    multinomial(p, 1)                          Hugging Face and most others
    argmax(p / e), e ~ Exponential             gpt-fast; the same as argmax(logits - log(e)), which Inductor may make of it
    with p = softmax(x), and x made of logits by, from the last to the first,
        where(x <- cumulated softmax of sorted x is past top_p, -inf, x)
        where(x < k-th largest of x, -inf, x)
        x / temperature

What is not recognised further up stays in the graph as the logits, so a partial match is still right.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from ..sites import Declined
from ..support import DTYPES, has_kernels
from ..walk import (
    argument,
    aten,
    commuted,
    dim_of,
    is_call,
    is_cast,
    is_tensor,
    number,
    same_shape,
    same_value,
    shape,
    slice_range,
    strip,
    strip_casts,
    value,
)
from .softmax import match_softmax


@dataclass
class Sampler:
    node: Node
    """The node whose value it is: ids, [B, 1] or [B] (or without B)."""
    logits: Node
    """[B, V] or [V]."""
    weights: Node
    """The probabilities, or what was left of them: nothing else may use them."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    spelling: str = "multinomial"


def match_sampler(node: Node) -> Sampler | None:
    """The sampler that `node` is the draw of; None if it is not a draw at all."""
    if is_call(node, aten.multinomial.default):
        if node.args[1] != 1:
            raise Declined(f"{node.name}: draws {node.args[1]} samples a row")
        if argument(node, 3, "generator", None) is not None:
            raise Declined(f"{node.name}: has a generator of its own")
        weights = strip(node.args[0])
        scores = match_softmax(weights)
        if scores is None:
            raise Declined(f"{weights.name}: draws from {weights.target}, not from a softmax")
        sampler = Sampler(node, scores, weights)
    elif is_call(node, aten.argmax.default):
        sampler = _match_exponential_trick(node)
        if sampler is None:
            return None
    else:
        return None
    _match_filters(sampler)
    _check_logits(sampler)
    return sampler


def _match_exponential_trick(node: Node) -> Sampler | None:
    """argmax(p / e) or argmax(logits - log(e))"""
    race = strip_casts(node.args[0])
    if is_call(race, aten.div.Tensor) and is_tensor(race.args[1]):
        weights, clock = strip_casts(race.args[0]), race.args[1]
        scores = match_softmax(weights) if is_exponential(clock, race) else None
        found = Sampler(node, scores, weights, spelling="exponential trick") if scores is not None else None
    elif is_call(race, aten.add.Tensor) and not race.kwargs:
        found = None
        for scores, noise in commuted(race):
            if is_tensor(scores) and is_tensor(noise) and _is_gumbel(noise, race):
                found = Sampler(node, scores, race, spelling="gumbel trick")
    else:
        return None
    if found is None:
        return None
    dim = argument(node, 1, "dim", None)
    if dim is None or dim_of(race, dim) != len(shape(race)) - 1:
        raise Declined(f"{node.name}: argmax over dim {dim}, not over the vocabulary")
    return found


def _is_gumbel(noise: Node, race: Node) -> bool:
    noise = strip(noise)
    if not is_call(noise, aten.neg.default) or not is_call(noise.args[0], aten.log.default):
        return False
    return is_exponential(noise.args[0].args[0], race)


def is_exponential(node: Node, race: Node) -> bool:
    """`node` is one fresh exponential number for each element of `race`.

    Decomposed: -rate^-1 * where(u >= 1 - eps, -eps, log(u)) with u uniform. The rate does not matter to the argmax.
    """
    node = strip_casts(node)
    if is_call(node, aten.exponential.default):
        raise Declined(f"{node.name}: config.fallback_random asks for torch's own random numbers")
    if is_call(node, aten.neg.default) or (
        is_call(node, aten.mul.Tensor, aten.div.Tensor)
        and isinstance(number(node.args[1]), (int, float))
        and number(node.args[1]) < 0
    ):
        inner = strip_casts(node.args[0])
    else:
        return False
    if is_call(inner, aten.where.self):
        condition, edge, logarithm = inner.args
        edge = number(edge)
        if not is_call(condition, aten.ge.Scalar) or edge is None or not -1e-2 < edge < 0:
            return False
    else:
        condition, logarithm = None, inner
    logarithm = strip_casts(logarithm)
    if not is_call(logarithm, aten.log.default):
        return False
    uniform = strip_casts(logarithm.args[0])
    if not is_call(uniform, aten.rand.default):
        return False
    if condition is not None and strip_casts(condition.args[0]) is not uniform:
        return False
    return same_shape(shape(uniform), shape(race))


def _match_filters(sampler: Sampler) -> None:
    """Take temperature, top-k and top-p off the logits, in the orders in which the op applies them."""
    scores = strip(sampler.logits)
    cooled = False
    while True:
        scores = _strip_widening(scores)
        masked = _masked_with_inf(scores)
        if masked is not None:
            condition, kept = masked
            k = _top_k_of(condition, kept) if not sampler.top_k else None
            if k is not None:
                sampler.top_k, scores = k, kept
                continue
            # top-p looks at the distribution, so only a temperature or a top-k that came before it may be fused
            p = _top_p_of(condition, kept) if sampler.top_p == 1.0 and not sampler.top_k and not cooled else None
            if p is not None:
                sampler.top_p, scores = p, kept
                continue
            break
        factor = _temperature_of(scores) if not cooled else None
        if factor is None:
            break
        cooled = True
        sampler.temperature, scores = factor, scores.args[0] if is_tensor(scores.args[0]) else scores.args[1]
    sampler.logits = scores


def _strip_widening(node: Node) -> Node:
    """Through casts that lose nothing."""
    node = strip(node)
    while is_cast(node) and value(node).is_floating_point() and value(node.args[0]).is_floating_point():
        if value(node).dtype.itemsize <= value(node.args[0]).dtype.itemsize:
            break
        node = strip(node.args[0])
    return node


def _temperature_of(node: Node) -> float | None:
    if is_call(node, aten.div.Tensor, aten.div.Scalar):
        divisor = number(node.args[1])
        return float(divisor) if divisor is not None and divisor > 0 else None
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        for inner, factor in commuted(node):
            factor = number(factor)
            if is_tensor(inner) and factor is not None and factor > 0:
                return 1.0 / factor
    return None


def _masked_with_inf(node: Node) -> tuple[Node, Node] | None:
    """(condition, x) where the node is where(condition, -inf, x)."""
    if not is_call(node, aten.where.self) or number(node.args[1]) != float("-inf"):
        return None
    return strip(node.args[0]), strip(node.args[2])


def _top_k_of(condition: Node, kept: Node) -> int | None:
    """k where the condition is x < (k-th largest of x)."""
    if not is_call(condition, aten.lt.Tensor) or strip(condition.args[0]) is not kept:
        return None
    node = strip(condition.args[1])
    index = None
    while not is_call(node, operator.getitem):
        if is_call(node, aten.select.int) and dim_of(node.args[0], node.args[1]) == len(shape(node.args[0])) - 1:
            index = node.args[2]
        elif is_call(node, aten.slice.Tensor) and slice_range(node) is not None:
            _, dim, start, end = slice_range(node)
            if dim == len(shape(node)) - 1:
                index = start if end is None else None
        elif not is_call(node, aten.unsqueeze.default):
            return None
        node = strip(node.args[0])
    top = node.args[0]
    if node.args[1] != 0 or not is_call(top, aten.topk.default) or strip(top.args[0]) is not kept:
        return None
    k = top.args[1]
    over_last = dim_of(kept, argument(top, 2, "dim", -1)) == len(shape(kept)) - 1
    if not isinstance(k, int) or not over_last or not argument(top, 3, "largest", True) or index not in (-1, k - 1):
        return None
    return k


def _top_p_of(condition: Node, kept: Node) -> float | None:
    """p where the condition is true for what is past top-p, scattered back from sorted order."""
    if not is_call(condition, aten.scatter.src):
        return None
    base, dim, ids, removed = condition.args
    if dim_of(kept, dim) != len(shape(kept)) - 1 or not same_value(base, removed):
        return None
    ids = strip(ids)
    if (
        not is_call(ids, operator.getitem)
        or ids.args[1] != 1
        or not is_call(ids.args[0], aten.sort.default, aten.sort.stable)
    ):
        return None
    sort = ids.args[0]
    if strip(sort.args[0]) is not kept:
        return None
    if sort.target is aten.sort.default:
        dim, descending = argument(sort, 1, "dim", -1), argument(sort, 2, "descending", False)
    else:
        dim, descending = sort.kwargs.get("dim", -1), sort.kwargs.get("descending", False)
    if dim_of(kept, dim) != len(shape(kept)) - 1:
        return None
    return _past_top_p_descending(strip(removed), sort) if descending else _past_top_p_ascending(strip(removed), sort)


def _past_top_p_ascending(removed: Node, sort: Node) -> float | None:
    """cumsum(softmax(sorted)) <= 1 - p, with the last (largest) kept."""
    last = len(shape(removed)) - 1
    if is_call(removed, aten.slice_scatter.default):
        base, fill, dim, start, end = (*removed.args, None, None)[:5]
        if dim != last or start != -1 or not _is_false(fill) or not (end is None or end >= 2**62):
            return None
        removed = strip(base)
    if not is_call(removed, aten.le.Scalar) or not _is_cumulated(removed.args[0], sort):
        return None
    return 1.0 - float(removed.args[1])


def _past_top_p_descending(removed: Node, sort: Node) -> float | None:
    """cumsum(softmax(sorted)) > p moved on by one, with the first (largest) kept; or cumsum(s) - s > p."""
    last = len(shape(removed)) - 1
    if is_call(removed, aten.gt.Scalar, aten.ge.Scalar):
        before = strip_casts(removed.args[0])
        if not is_call(before, aten.sub.Tensor) or not _is_cumulated(before.args[0], sort):
            return None
        return float(removed.args[1]) if _is_sorted_softmax(before.args[1], sort) else None
    kept_first = strip(removed)
    if not is_call(kept_first, aten.slice_scatter.default, aten.select_scatter.default) or not _is_false(
        kept_first.args[1]
    ):
        return None
    if argument(kept_first, 2, "dim", 0) != last or argument(kept_first, 3, "start", 0) not in (0, None):
        return None
    if kept_first.target is aten.slice_scatter.default and argument(kept_first, 4, "end", None) != 1:
        return None
    moved = strip(kept_first.args[0])
    if not is_call(moved, aten.slice_scatter.default) or moved.args[2] != last or moved.args[3] != 1:
        return None
    past = strip(moved.args[0])
    source = slice_range(_copied(moved.args[1]))
    if not is_call(past, aten.gt.Scalar, aten.ge.Scalar) or source is None:
        return None
    all_but_last = shape(past)[last] - 1 if isinstance(shape(past)[last], int) else -1
    if strip(source[0]) is not past or source[1] != last or source[2] != 0 or source[3] not in (-1, all_but_last):
        return None
    return float(past.args[1]) if _is_cumulated(past.args[0], sort) else None


def _copied(node: Node) -> Node:
    """What was written by `x[...] = node`: the copy into x's slice has its value."""
    node = strip(node)
    return strip(node.args[1]) if is_call(node, aten.copy.default) else node


def _is_cumulated(node: Node, sort: Node) -> bool:
    node = strip_casts(node)
    if not is_call(node, aten.cumsum.default) or dim_of(node, node.args[1]) != len(shape(node)) - 1:
        return False
    return _is_sorted_softmax(node.args[0], sort)


def _is_sorted_softmax(node: Node, sort: Node) -> bool:
    scores = match_softmax(node)
    scores = strip_casts(scores) if scores is not None else None
    return is_call(scores, operator.getitem) and scores.args == (sort, 0)


def _is_false(node: object) -> bool:
    """A constant False (or 0), copied or filled into the place it is written to."""
    if not isinstance(node, Node):
        return False
    node = strip(node)
    if is_call(node, aten.full.default, aten.full_like.default):
        return not node.args[1]
    if is_call(node, aten.copy.default):
        return _is_false(node.args[1])
    if is_call(node, aten.expand.default, aten.fill.Scalar) or is_cast(node):
        return _is_false(node.args[0]) if node.target is not aten.fill.Scalar else not node.args[1]
    if is_call(node, aten.scalar_tensor.default):
        return not node.args[0]
    if node.op == "get_attr":
        constant = getattr(node.graph.owning_module, str(node.target), None)
        if type(constant) is not torch.Tensor or constant.numel() != 1:
            return False
        with unset_fake_temporarily():
            return not constant.item()
    return False


def _check_logits(sampler: Sampler) -> None:
    logits, node = value(sampler.logits), sampler.node
    if not has_kernels(logits.device):
        raise Declined(f"{sampler.logits.name}: no kernels for device {logits.device.type}")
    if logits.dtype not in DTYPES:
        raise Declined(f"{sampler.logits.name}: logits are {logits.dtype}")
    if logits.dim() not in (1, 2):
        raise Declined(f"{sampler.logits.name}: logits have {logits.dim()} dimensions")
    if not 0 <= sampler.top_p <= 1:
        raise Declined(f"{node.name}: top_p is {sampler.top_p}")
    weights = sampler.weights
    if len(weights.users) > 1:
        other = next((u for u in weights.users if u is not node and not is_call(u, aten.div.Tensor)), None)
        raise Declined(f"{(other or weights).name}: uses the probabilities too, so they are computed anyway")
