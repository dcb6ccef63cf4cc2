"""The value of a mask's element at (batch, head, query, key), from the ATen nodes that compute the mask.

A walk from the mask up its producers. At each node it knows which element is asked for: an affine index for every
dimension. Views, slices and gathers change the index; `iota` is an index; comparisons, logic, `where` and arithmetic of
constants make clauses and choices (`clause.py`). What is not listed here is data: an element of that node's tensor.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from ..walk import (
    RESHAPES,
    argument,
    at_least,
    aten,
    dim_of,
    is_tensor,
    keeps_value,
    permutation,
    prims,
    read_scalar,
    same_shape,
    same_size,
    scalar_constant,
    shape,
    slice_range,
    value,
)
from .affine import KEY, ZERO, Affine, Index, along, element, never_negative, number_of
from .clause import Choice, Clause, Magnitude, Term
from .interval import Intervals
from .masks import LOWEST

Value = Affine | Clause | Choice | Magnitude | float | None
"""Of an int, a bool, or a float element; None where nothing is known."""

DEEPEST = 64
"""Steps from a mask up its producers."""
INTEGERS = (torch.int64, torch.int32)


class Predicates:
    """What the elements of tensors are, for scores of the given sizes [B, H, Lq, Lk]; every node is looked at once an index."""

    def __init__(self, sizes: tuple):
        self.sizes = sizes
        self._known: dict[tuple[Node, Index], Value] = {}
        self._depth = 0
        self.intervals = Intervals()

    def of_mask(self, mask: Node) -> Value:
        """Of a mask that broadcasts to the scores."""
        return self.of(mask, self.broadcast(mask, tuple(along(axis) for axis in range(4)), self.sizes))

    def broadcast(self, node: Node, index: Index | None, sizes: tuple) -> Index | None:
        """The element of `node` that is at `index` of what it is broadcast to, which has `sizes`."""
        have = shape(node)
        if index is None or len(have) > len(sizes):
            return None
        first, places = len(sizes) - len(have), []
        for dim, size in enumerate(have):
            if same_size(size, 1):
                places.append(ZERO)
            elif same_size(size, sizes[first + dim]):
                places.append(index[first + dim])
            else:
                return None
        return tuple(places)

    def of(self, node: Node, index: Index | None) -> Value:
        """Of one element of a tensor."""
        if index is None:
            return None
        index = tuple(ZERO if same_size(size, 1) else i for size, i in zip(shape(node), index, strict=True))
        key = (node, index)
        if key not in self._known:
            self._known[key] = self._look_at(node, index)
        return self._known[key]

    def _look_at(self, node: Node, index: Index) -> Value:
        dtype = value(node).dtype
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        found = None
        if node.op == "get_attr":
            found = _constant(scalar_constant(node))
        elif keeps_value(node):
            rule = _through
        if rule is not None and self._depth < DEEPEST:
            self._depth += 1
            try:
                found = rule(self, node, index)
            finally:
                self._depth -= 1
        if dtype == torch.bool:
            return self._with_a_node(node, index, found if isinstance(found, Clause) else None)
        if dtype in INTEGERS:
            return found if isinstance(found, (Affine, Choice, Magnitude)) else element(node, index)
        if dtype.is_floating_point:
            return found if isinstance(found, Choice) else _plain(found)
        return None

    def _with_a_node(self, node: Node, index: Index, found: Clause | None) -> Clause:
        """The clause, its terms' values to be had from nodes whose elements are in the places of the scores."""
        if found is None:
            return Clause(True, (Term(None, node, index),))
        anchors = {(term.node, term.index, term.negated) for term in found.terms}
        if len(anchors) == 1 and not self.is_in_place(*next(iter(anchors))[:2]) and self.is_in_place(node, index):
            return Clause(found.all, tuple(Term(term.compare, node, index) for term in found.terms))
        return found

    def is_in_place(self, node: Node, index: Index) -> bool:
        """The index goes along whole axes of the scores: without views that a permute does not make."""
        axes = [place.axis for place in index if place != ZERO]
        sizes = [size for size, place in zip(shape(node), index, strict=True) if place != ZERO]
        ones = (same_size(size, 1) for size, place in zip(shape(node), index, strict=True) if place == ZERO)
        is_whole = all(a is not None and same_size(n, self.sizes[a]) for a, n in zip(axes, sizes, strict=True))
        return is_whole and len(set(axes)) == len(axes) and all(ones)

    def operand(self, given: object, node: Node, index: Index) -> Value:
        """Of an operand of a pointwise call whose element at `index` is asked for."""
        if is_tensor(given):
            return self.of(given, self.broadcast(given, index, shape(node)))
        if isinstance(given, bool):
            return Clause(given)
        return given if isinstance(given, float) else number_of(given)


def _constant(scalar: torch.Tensor | None) -> Value:
    return None if scalar is None else _value_of(read_scalar(scalar))


def _value_of(number: object) -> Value:
    """Of a Python number, or of a node that computes a symbolic one."""
    if isinstance(number, bool):
        return Clause(number)
    return number if isinstance(number, float) else number_of(number)


def _plain(found: Value) -> float | None:
    """The number that a value is everywhere."""
    if isinstance(found, Affine):
        return found.constant
    return found if isinstance(found, (int, float)) else None


def _rounded(number: float, dtype: torch.dtype) -> float:
    with unset_fake_temporarily():
        return torch.tensor(number, dtype=torch.float64).to(dtype).item()


# ---- where: views, slices, gathers ----


def _through(known: Predicates, node: Node, index: Index) -> Value:
    return known.of(node.args[0], index)


def _expand(known: Predicates, node: Node, index: Index) -> Value:
    source = node.args[0]
    return known.of(source, known.broadcast(source, index, shape(node)))


def _view(known: Predicates, node: Node, index: Index) -> Value:
    """Dimensions of size 1 are put in or taken out."""
    source = node.args[0]
    kept = [place for place, size in zip(index, shape(node), strict=True) if not same_size(size, 1)]
    sizes = [size for size in shape(node) if not same_size(size, 1)]
    if not same_shape([size for size in shape(source) if not same_size(size, 1)], sizes):
        return None
    places = iter(kept)
    return known.of(source, tuple(ZERO if same_size(size, 1) else next(places) for size in shape(source)))


def _permute(known: Predicates, node: Node, index: Index) -> Value:
    source, dims = permutation(node)
    places = dict(zip(dims, index, strict=True))
    return known.of(source, tuple(places[d] for d in range(len(dims))))


def _slice(known: Predicates, node: Node, index: Index) -> Value:
    parts = slice_range(node)
    if parts is None or not at_least(parts[2], 0):
        return None
    source, dim, start, _ = parts
    return known.of(source, (*index[:dim], index[dim] + number_of(start), *index[dim + 1 :]))


def _select(known: Predicates, node: Node, index: Index) -> Value:
    source, which = node.args[0], number_of(node.args[2])
    dim = dim_of(source, node.args[1])
    if which is None or not never_negative(which, known.sizes):
        return None
    return known.of(source, (*index[:dim], which, *index[dim:]))


def _gather(known: Predicates, node: Node, index: Index) -> Value:
    """`source[..., i, j, ...]` with tensors of indices side by side, none of which counts from the end."""
    source, given = node.args
    dims = [d for d, indices in enumerate(given) if indices is not None]
    if dims != list(range(dims[0], dims[-1] + 1)) or any(value(given[d]).dtype not in INTEGERS for d in dims):
        return None
    rank = max(len(shape(given[d])) for d in dims)
    inner = slice(dims[0], dims[0] + rank)
    places = []
    for d in dims:
        place = known.of(given[d], known.broadcast(given[d], index[inner], shape(node)[inner]))
        if not isinstance(place, Affine) or not never_negative(place, known.sizes):
            return None
        places.append(place)
    return known.of(source, (*index[: dims[0]], *places, *index[dims[0] + rank :]))


def _cat(known: Predicates, node: Node, index: Index) -> Value:
    """Of two tensors: the one in which the element is, or either where both continue the same value."""
    pieces, dim = node.args[0], dim_of(node, argument(node, 1, "dim", 0))
    if len(pieces) != 2 or any(len(shape(piece)) != len(index) for piece in pieces):
        return None
    first, second = pieces
    size = shape(first)[dim]
    border = Affine(size) if isinstance(size, int) else None
    if border is None:
        return None
    behind = index[dim] - border
    later = known.of(second, (*index[:dim], behind, *index[dim + 1 :]))
    if never_negative(behind, known.sizes):
        return later
    axis = index[dim].axis
    earlier = known.of(first, index)
    if isinstance(later, Affine) and isinstance(earlier, Affine) and size == 1 and axis is not None:
        at_0 = later - along(axis).times(
            later.axes[axis]
        )  # the second's value, continued to the only index of the first
        return later if earlier == at_0 and not later.atoms_depend_on(axis) else None
    return _hidden_border(known, later, earlier, size) if axis == KEY else None


def _hidden_border(known: Predicates, later: Value, earlier: Value, size: int) -> Value:
    """A mask that keeps the first `size` keys and others up to a bound that is no lower: keys up to that bound."""
    if isinstance(later, Choice) and later.is_exact:
        clause = later.where if _plain(earlier) == later.yes else None
    elif isinstance(later, Clause) and isinstance(earlier, Clause) and earlier.truth:
        clause = later
    else:
        clause = None
    if clause is None or clause.truth is False or (len(clause.terms) > 1 and not clause.all):
        return None
    for term in clause.terms:
        if term.compare is None or term.compare.axes[KEY] != -1:
            return None
        last = term.compare + along(KEY)
        if last.depends_on(KEY) or not never_negative(last.plus(1 - size), known.sizes):
            return None
    return later


# ---- what: numbers, logic, comparisons ----


def _iota(known: Predicates, node: Node, index: Index) -> Value:
    step, start = node.kwargs["step"], number_of(node.kwargs["start"])
    if not isinstance(step, int) or start is None:
        return None
    return start + index[0].times(step)


def _full(known: Predicates, node: Node, index: Index) -> Value:
    fill = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]
    return _fill(node, fill)


def _fill(node: Node, fill: object) -> Value:
    dtype = value(node).dtype
    if dtype == torch.bool:
        return Clause(bool(fill)) if isinstance(fill, (bool, int, float)) else None
    if dtype.is_floating_point:
        return _rounded(float(fill), dtype) if isinstance(fill, (bool, int, float)) else None
    if isinstance(fill, (bool, float)):
        return Affine(int(fill)) if float(fill).is_integer() else None
    return number_of(fill)


def _cast(known: Predicates, node: Node, index: Index) -> Value:
    found, dtype = known.of(node.args[0], index), value(node).dtype
    if dtype == torch.bool:
        return _compared(known, operator.ne, found, ZERO, node, index)
    if isinstance(found, Clause):
        found = Choice(found, 1, 0) if found.truth is None else float(found.truth)
    if isinstance(found, Affine):
        if not dtype.is_floating_point:
            return found if dtype == torch.int64 or not found.atoms else None  # a cast of data to int32 may wrap around
        found = found.constant
    if found is None or isinstance(found, Magnitude):
        return None
    if not dtype.is_floating_point:
        is_whole = all(float(x).is_integer() for x in ([found.yes, found.no] if isinstance(found, Choice) else [found]))
        if not is_whole:
            return None
        return found.mapped(int) if isinstance(found, Choice) else Affine(int(found))
    if isinstance(found, Choice):
        return found.mapped(lambda x: _rounded(x, dtype))
    return _rounded(found, dtype)


def _arithmetic(function: Callable) -> Callable:
    def rule(known: Predicates, node: Node, index: Index) -> Value:
        a, b = (known.operand(given, node, index) for given in node.args[:2])
        if node.kwargs or len(node.args) > 2:
            return None
        dtype = value(node).dtype
        if isinstance(a, Clause) and isinstance(b, Clause) and dtype == torch.bool and function is not operator.sub:
            return a.joined(b, function is operator.mul)
        if isinstance(a, Affine) and isinstance(b, Affine) and dtype in INTEGERS:
            return _of_integers(function, a, b)
        x, y = _plain(a), _plain(b)
        if x is not None and y is not None and dtype.is_floating_point:
            return _rounded(function(float(x), float(y)), dtype)
        if isinstance(a, Choice) and isinstance(b, Choice):
            return _of_choices(function, a, b)
        if isinstance(a, Choice) and y is not None:
            return a.mapped(lambda n: _in(dtype, function(n, y)))
        if isinstance(b, Choice) and x is not None:
            return b.mapped(lambda n: _in(dtype, function(x, n)))
        return None

    return rule


def _in(dtype: torch.dtype, number: float) -> float:
    return _rounded(float(number), dtype) if dtype.is_floating_point else number


def _of_integers(function: Callable, a: Affine, b: Affine) -> Affine | None:
    if function is not operator.mul:
        return a + b if function is operator.add else a - b
    if a.constant is not None:
        a, b = b, a
    return a.times(b.constant) if b.constant is not None else None


def _of_choices(function: Callable, a: Choice, b: Choice) -> Choice | None:
    """Two additive masks added, or two masks of ones and zeros multiplied."""
    a, b = (Choice(c.where.inverse(), c.no, c.yes) if c.no == 0 and c.is_exact else c for c in (a, b))
    if function is operator.add and a.yes == b.yes == 0 and max(a.no, b.no) <= LOWEST:
        both = a.where.joined(b.where, True)
        is_exact = a.no == b.no == float("-inf")
        return None if both is None else Choice(both, 0.0, max(a.no, b.no), is_exact)
    if function is operator.mul and (a.yes, a.no, b.yes, b.no) == (0, 1, 0, 1) and a.is_exact and b.is_exact:
        either = a.where.joined(b.where, False)
        return None if either is None else Choice(either, 0, 1)
    return None


def _negated(known: Predicates, node: Node, index: Index) -> Value:
    found = known.of(node.args[0], index)
    if isinstance(found, Affine):
        return found.times(-1)
    if isinstance(found, Choice):
        return found.mapped(operator.neg)
    return -found if isinstance(found, float) else None


def _magnitude(known: Predicates, node: Node, index: Index) -> Value:
    found = known.of(node.args[0], index)
    return Magnitude(found) if isinstance(found, Affine) else None


def _comparison(function: Callable) -> Callable:
    def rule(known: Predicates, node: Node, index: Index) -> Value:
        a, b = (known.operand(given, node, index) for given in node.args[:2])
        return _compared(known, function, a, b, node, index)

    return rule


_MIRRORED = {
    operator.lt: operator.gt,
    operator.gt: operator.lt,
    operator.le: operator.ge,
    operator.ge: operator.le,
    operator.eq: operator.eq,
    operator.ne: operator.ne,
}
_OPPOSITE = {operator.gt: operator.le, operator.ge: operator.lt, operator.ne: operator.eq}


def _compared(known: Predicates, function: Callable, a: Value, b: Value, node: Node, index: Index) -> Clause | None:
    if isinstance(b, (Choice, Magnitude)) or (isinstance(b, Clause) and b.truth is None):
        a, b, function = b, a, _MIRRORED[function]
    if isinstance(a, Clause) and isinstance(b, (Clause, Affine, float)):
        constant = b.truth if isinstance(b, Clause) else _plain(b)
        return None if constant is None else Choice(a, 1, 0).condition(lambda x: function(x, constant))
    if isinstance(b, float) and b.is_integer() and isinstance(a, (Affine, Magnitude)):
        b = Affine(int(b))
    if isinstance(a, Magnitude) and isinstance(b, Affine):
        if function in (operator.le, operator.lt):
            above = _at_least_0(b - a.value, function is operator.lt, node, index)
            below = _at_least_0(b + a.value, function is operator.lt, node, index)
            return above.joined(below, True)
        opposite = _OPPOSITE.get(function)
        if function is operator.ne or opposite is None:
            return None
        kept = _compared(known, opposite, a, b, node, index)
        return Clause(False, tuple(Term(t.inverse().compare, node, index) for t in kept.terms))
    x, y = _plain(a), _plain(b)
    if x is not None and y is not None:
        return Clause(bool(function(x, y)))
    if isinstance(a, Choice) and y is not None:
        return a.condition(lambda n: function(n, y))
    if isinstance(a, Affine) and isinstance(b, Affine):
        return _of_difference(function, a - b, node, index)
    return None


def _of_difference(function: Callable, difference: Affine, node: Node, index: Index) -> Clause:
    if difference.constant is not None:
        return Clause(bool(function(difference.constant, 0)))
    if function in (operator.ge, operator.gt):
        return _at_least_0(difference, function is operator.gt, node, index)
    if function in (operator.le, operator.lt):
        return _at_least_0(difference.times(-1), function is operator.lt, node, index)
    above, below = (_at_least_0(difference.times(n), function is operator.ne, node, index) for n in (1, -1))
    return above.joined(below, function is operator.eq)


def _at_least_0(number: Affine, strictly: bool, node: Node, index: Index) -> Clause:
    return Clause(True, (Term(number.plus(-int(strictly)), node, index),))


def _logic(by_and: bool) -> Callable:
    def rule(known: Predicates, node: Node, index: Index) -> Value:
        if value(node).dtype != torch.bool:
            return None
        operands = node.args[:2]
        first, second = (known.operand(given, node, index) for given in operands)
        if not isinstance(first, Clause) or not isinstance(second, Clause):
            return None
        found = first.joined(second, by_and)
        if found is not None:
            return found
        parts = []
        for given, part in zip(operands, (first, second), strict=True):
            if part.all is not by_and and len(part.terms) > 1:  # is no more than data in this
                part = Clause(True, (Term(None, given, known.broadcast(given, index, shape(node))),))
            parts.append(part)
        return parts[0].joined(parts[1], by_and)

    return rule


def _not(known: Predicates, node: Node, index: Index) -> Value:
    found = known.of(node.args[0], index)
    return found.inverse() if isinstance(found, Clause) and value(node).dtype == torch.bool else None


def _where(known: Predicates, node: Node, index: Index) -> Value:
    condition, yes, no = (known.operand(given, node, index) for given in node.args)
    if not isinstance(condition, Clause):
        return None
    if condition.truth is not None:
        return yes if condition.truth else no
    if isinstance(yes, Clause) and isinstance(no, Clause):
        for clause, other, where in ((yes, no, condition), (no, yes, condition.inverse())):
            if other.truth is not None:  # where and clause, or not where or clause
                return (where.inverse() if other.truth else where).joined(clause, not other.truth)
        return None
    dtype = value(node).dtype
    first, second = (None if n is None else _in(dtype, n) for n in (_plain(yes), _plain(no)))
    if first is not None and second is not None:
        return Choice(condition, first, second)
    if first is not None and isinstance(no, Choice):
        return _overwritten(no, condition, first)
    if second is not None and isinstance(yes, Choice):
        return _overwritten(yes, condition.inverse(), second)
    return None


def _overwritten(choice: Choice, where: Clause, number: float) -> Choice | None:
    """The choice, with `number` put in its place where a clause holds."""
    if number == choice.no or (choice.yes == 0 and max(number, choice.no) <= LOWEST):
        kept = choice.where.joined(where.inverse(), True)
        is_exact = choice.is_exact and number == choice.no
        return None if kept is None else Choice(kept, choice.yes, max(number, choice.no), is_exact)
    if number == choice.yes:
        kept = choice.where.joined(where, False)
        return None if kept is None else Choice(kept, choice.yes, choice.no, choice.is_exact)
    return None


def _count(known: Predicates, node: Node, index: Index) -> Value:
    """A cumulative sum of what is 0 everywhere."""
    source, dim = node.args[0], dim_of(node.args[0], argument(node, 1, "dim"))
    if index[dim] != ZERO and index[dim].axis is None:
        return None  # not asked for at every place of the dimension, so that not all that is counted has been looked at
    found = known.of(source, index)
    is_nothing = found == ZERO or (isinstance(found, Clause) and found.truth is False)
    return ZERO if is_nothing and value(node).dtype in INTEGERS else None


_RULES: dict[object, Callable[[Predicates, Node, Index], Value]] = {
    prims.iota.default: _iota,
    prims.convert_element_type.default: _cast,
    aten._to_copy.default: _cast,
    aten.full.default: _full,
    aten.full_like.default: _full,
    aten.scalar_tensor.default: _full,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.index.Tensor: _gather,
    aten.cat.default: _cat,
    aten.where.self: _where,
    aten.add.Tensor: _arithmetic(operator.add),
    aten.sub.Tensor: _arithmetic(operator.sub),
    aten.mul.Tensor: _arithmetic(operator.mul),
    aten.neg.default: _negated,
    aten.abs.default: _magnitude,
    aten.logical_not.default: _not,
    aten.bitwise_not.default: _not,
    aten.cumsum.default: _count,
}
_RULES.update(dict.fromkeys(RESHAPES, _view))
_RULES.update((op, _logic(True)) for op in (aten.logical_and.default, aten.bitwise_and.Tensor))
_RULES.update((op, _logic(False)) for op in (aten.logical_or.default, aten.bitwise_or.Tensor))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    for _overload in ("Tensor", "Scalar"):
        _RULES[getattr(getattr(aten, _name), _overload)] = _comparison(getattr(operator, _name))
