"""Between which numbers all elements of a tensor lie, as far as the arithmetic that makes it says.

    slopes[head] * (position[key] - 1)      ALiBi: slopes are 2 ** -(1..8), positions an int64, so never beyond 2 ** 63

A position bias with known bounds can't undo a mask that sets scores to the lowest number of a dtype. What is not listed
here, and any float that comes from outside of the graph, has no known bounds: it may be infinite.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from ..walk import RESHAPES, aten, is_tensor, keeps_value, number, prims, shape, value

Interval = tuple[float, float]
"""The least and the greatest number that it may be; both finite, and it is not NaN."""

DEEPEST = 64
"""Steps from a tensor up its producers."""


class Intervals:
    """What the elements of tensors may be; every node is looked at once."""

    def __init__(self) -> None:
        self._known: dict[Node, Interval | None] = {}
        self._depth = 0

    def of(self, given: object) -> Interval | None:
        """Of a tensor, or of a number."""
        constant = number(given)
        if constant is not None:
            return _finite(float(constant), float(constant))
        if not is_tensor(given):
            return None
        if given not in self._known:
            self._known[given] = self._look_at(given)
        return self._known[given]

    def _look_at(self, node: Node) -> Interval | None:
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None and node.op == "call_function" and keeps_value(node):
            rule = _same
        found = None
        if rule is not None and self._depth < DEEPEST:
            self._depth += 1
            try:
                found = rule(self, node)
            finally:
                self._depth -= 1
        dtype = value(node).dtype
        if dtype == torch.bool:
            return 0.0, 1.0
        if dtype.is_complex:
            return None
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        if found is not None and limits.min <= found[0] and found[1] <= limits.max:
            return found
        return None if dtype.is_floating_point else (float(limits.min), float(limits.max))


def _finite(least: float, greatest: float) -> Interval | None:
    return (least, greatest) if math.isfinite(least) and math.isfinite(greatest) else None


def _same(known: Intervals, node: Node) -> Interval | None:
    """Its elements are some of another tensor's."""
    return known.of(node.args[0])


def _any_of(parts: list[Interval | None]) -> Interval | None:
    if not parts or None in parts:
        return None
    return min(part[0] for part in parts), max(part[1] for part in parts)


def _cat(known: Intervals, node: Node) -> Interval | None:
    return _any_of([known.of(piece) for piece in node.args[0]])


def _where(known: Intervals, node: Node) -> Interval | None:
    return _any_of([known.of(given) for given in node.args[1:]])


def _full(known: Intervals, node: Node) -> Interval | None:
    return known.of(node.args[0] if node.target is aten.scalar_tensor.default else node.args[1])


def _iota(known: Intervals, node: Node) -> Interval | None:
    start, step, (length,) = node.kwargs["start"], node.kwargs["step"], shape(node)
    if not all(isinstance(n, int) for n in (start, step, length)):
        return None
    ends = float(start), float(start + step * max(length - 1, 0))
    return min(ends), max(ends)


def _at_the_ends(function: Callable[..., float]) -> Callable[[Intervals, Node], Interval | None]:
    """A function of one or two operands which is monotonic in each of them, the other being any number."""

    def rule(known: Intervals, node: Node) -> Interval | None:
        parts = [known.of(given) for given in node.args]
        if None in parts or node.kwargs or not 1 <= len(parts) <= 2:
            return None
        try:
            first, *second = parts
            results = [function(a, *b) for a in first for b in ([(n,) for n in second[0]] if second else [()])]
        except OverflowError:
            return None
        return _finite(min(results), max(results))

    return rule


def _magnitude(known: Intervals, node: Node) -> Interval | None:
    found = known.of(node.args[0])
    return None if found is None else (0.0, max(map(abs, found)))


def _quotient(known: Intervals, node: Node) -> Interval | None:
    divisor = known.of(node.args[0] if node.target is aten.reciprocal.default else node.args[1])
    if divisor is None or divisor[0] <= 0 <= divisor[1]:
        return None
    if node.target is aten.reciprocal.default:
        return 1.0 / divisor[1], 1.0 / divisor[0]
    return _at_the_ends(operator.truediv)(known, node)


def _power(known: Intervals, node: Node) -> Interval | None:
    """Of positive numbers."""
    base = known.of(node.args[0])
    return None if base is None or base[0] <= 0 else _at_the_ends(operator.pow)(known, node)


_RULES: dict[object, Callable[[Intervals, Node], Interval | None]] = {
    prims.iota.default: _iota,
    aten.full.default: _full,
    aten.full_like.default: _full,
    aten.scalar_tensor.default: _full,
    aten.cat.default: _cat,
    aten.where.self: _where,
    aten.abs.default: _magnitude,
    aten.div.Tensor: _quotient,
    aten.reciprocal.default: _quotient,
    aten.neg.default: _at_the_ends(operator.neg),
    aten.exp.default: _at_the_ends(math.exp),
    aten.exp2.default: _at_the_ends(lambda x: 2.0**x),
}
for _target in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor):
    _RULES[_target] = _at_the_ends(getattr(operator, _target._schema.name.removeprefix("aten::")))
_SOME_OF = (
    *RESHAPES,
    prims.convert_element_type.default,
    aten._to_copy.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.repeat.default,
    aten.index.Tensor,
)
_RULES.update(dict.fromkeys(_SOME_OF, _same))
_RULES.update(dict.fromkeys((aten.pow.Scalar, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor), _power))
