"""The order of a row: sorts over the vocabulary, what lies in sorted order, and the way back.

values, ids = sort(x);  y = f(values)
scatter(anything, -1, ids, y)             y in the order of the vocabulary again
y.gather(-1, ids.argsort(-1))             the same
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Node

from ..walk import argument, aten, dim_of, is_call, is_cast, is_tensor, same_shape, same_value, shape, strip, value


@dataclass(frozen=True)
class Sort:
    """A sort of rows over the vocabulary, or a topk, which sorts the largest."""

    node: Node
    source: Node
    descending: bool
    k: int | Node | None = None
    """Of a topk: how many of the largest it keeps."""

    def has_ids(self, node: object) -> bool:
        return is_output(node, self.node, 1)

    def has_values(self, node: object) -> bool:
        """`node` is the source in sorted order."""
        node = strip_widening(node)
        if is_output(node, self.node, 0):
            return True
        if not is_call(node, aten.gather.default) or not over_last(node.args[0], node.args[1]):
            return False
        return self.has_ids(node.args[2]) and same_row(node.args[0], self.source)


def last_dim(node: Node) -> int:
    return len(shape(node)) - 1


def over_last(node: Node, dim: int) -> bool:
    return dim_of(node, dim) == last_dim(node)


def strip_widening(node):
    """Through casts that lose nothing."""
    node = strip(node)
    while is_cast(node) and value(node).is_floating_point() and value(node.args[0]).is_floating_point():
        if value(node).dtype.itemsize <= value(node.args[0]).dtype.itemsize:
            break
        node = strip(node.args[0])
    return node


def same_row(a: object, b: object) -> bool:
    """The same numbers, in whatever dtype that holds them."""
    return isinstance(a, Node) and isinstance(b, Node) and same_value(strip_widening(a), strip_widening(b))


def is_output(node: object, call: Node, index: int) -> bool:
    node = strip(node)
    return is_call(node, operator.getitem) and node.args[0] is call and node.args[1] == index


def output_of(node: object, index: int, *targets) -> Node | None:
    """The call, one of `targets`, whose output `index` the node is."""
    node = strip(node)
    if not is_call(node, operator.getitem) or node.args[1] != index or not is_call(node.args[0], *targets):
        return None
    return node.args[0]


def sort_with_ids(ids: object) -> Sort | None:
    """The sort over the vocabulary whose ids these are."""
    return as_sort(output_of(ids, 1, aten.sort.default, aten.sort.stable))


def sort_with_values(values: object) -> Sort | None:
    return as_sort(output_of(values, 0, aten.sort.default, aten.sort.stable))


def topk_with_ids(ids: object) -> Sort | None:
    """The topk over the vocabulary whose ids these are."""
    call = output_of(ids, 1, aten.topk.default)
    if call is None or not over_last(call.args[0], argument(call, 2, "dim", -1)):
        return None
    return Sort(call, call.args[0], True, call.args[1]) if argument(call, 3, "largest", True) else None


def as_sort(call: Node | None) -> Sort | None:
    if call is None:
        return None
    source = call.args[0]
    if call.target is aten.sort.default:
        dim, descending = argument(call, 1, "dim", -1), argument(call, 2, "descending", False)
    else:
        dim, descending = call.kwargs.get("dim", -1), call.kwargs.get("descending", False)
    return Sort(call, source, bool(descending)) if over_last(source, dim) else None


def put_back(node: object) -> tuple[Node, Sort] | None:
    """(y, sort) where the node is y, which lies in the order of the sort, in the order of the vocabulary again."""
    node = strip(node)
    if is_call(node, aten.scatter.src):
        base, dim, ids, source = node.args
        sort = sort_with_ids(ids)
        if sort is None or not over_last(base, dim) or not _covers(sort, base, source):
            return None
        return strip(source), sort
    if is_call(node, aten.gather.default) and over_last(node.args[0], node.args[1]):
        inverse = sort_with_ids(node.args[2])
        sort = sort_with_ids(inverse.source) if inverse is not None and not inverse.descending else None
        if sort is not None and _covers(sort, node.args[0], node):
            return strip(node.args[0]), sort
    return None


def _covers(sort: Sort, *nodes: object) -> bool:
    """All are of the shape of what was sorted, so that the ids name each place once."""
    return all(is_tensor(node) and same_shape(shape(node), shape(sort.source)) for node in nodes)
