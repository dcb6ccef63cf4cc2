"""Top-k: tokens below the k-th largest are removed, those that equal it stay.

x < topk(x, k).values[..., -1:]                       also as x >= ..., by kthvalue, by the smallest of the topk
x < sort(x).values.gather(1, (V - k)[:, None])        k data, one a row
x < where((k == V)[:, None], -inf, topk(x, max(k)).values.gather(1, (k - 1)[:, None]))
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from ..walk import argument, aten, dim_of, is_call, number, shape, slice_range, strip, value
from .order import Sort, last_dim, output_of, over_last, same_row, sort_with_values, strip_widening
from .removal import Condition, Stage, compares
from .row_number import Number, RowNumber, complement, is_one_a_row, without_dim


def match_top_k(condition: Condition, stage: Stage) -> Number | None:
    """k where the condition removes all but the k largest of the stage (and those that equal the k-th)."""
    for relation, x, threshold in compares(condition):
        if relation == "lt" and isinstance(threshold, Node) and is_one_a_row(threshold) and stage.is_kept(x):
            return _unless_nothing(threshold, stage)
    return None


def _unless_nothing(threshold: Node, stage: Stage) -> Number | None:
    """k of a threshold that may be -inf in some rows."""
    node = _same_number(threshold)
    if is_call(node, aten.where.self) and number(node.args[1]) == -math.inf and is_one_a_row(node.args[0]):
        k = _kth_largest(node.args[2], stage)
        if not isinstance(k, RowNumber) or k.unless is not None:
            return None
        return _or_whole_rows(k, without_dim(node.args[0]), shape(stage.kept)[-1])
    return _kth_largest(node, stage)


def _or_whole_rows(k: RowNumber, unless: Node, vocab: object) -> RowNumber:
    """k, and no top-k in some rows; where those are the rows of k == V, the k that the graph began with says it all."""
    given = k.node
    if (k.sign, k.offset) == (1, 0) and is_call(given, aten.where.self) and isinstance(vocab, int):
        given = without_dim(given.args[2])
        whole = is_call(unless, aten.eq.Scalar) and unless.args[1] == vocab and without_dim(unless.args[0]) is given
        if whole and strip(k.node.args[0]) is strip(unless):
            return RowNumber(given, at_most=vocab)
    return replace(k, unless=unless)


def _same_number(node: Node) -> Node:
    """Through dimensions that are put in, and casts that lose nothing."""
    node = strip_widening(node)
    while is_call(node, aten.unsqueeze.default):
        node = strip_widening(node.args[0])
    return node


def _kth_largest(threshold: object, stage: Stage) -> Number | None:
    """k where the threshold is the k-th largest of the stage, in each row."""
    if not isinstance(threshold, Node):
        return None
    vocab = shape(stage.kept)[-1]
    place: object = None
    node = _same_number(threshold)
    while True:
        call = output_of(node, 0, aten.kthvalue.default)
        if call is not None and stage.is_kept(call.args[0]) and over_last(call.args[0], argument(call, 2, "dim", -1)):
            k = call.args[1]
            return vocab - k + 1 if isinstance(k, int) and isinstance(vocab, int) else None
        sort = _sorted(node, stage)
        if sort is not None:
            return None if place is None else _rank(place, sort.descending, vocab)
        top = _topk(node, stage)
        if top is not None:
            return _rank_in_topk(place, top)
        if place is not None:
            return None
        found = _one_place(node)
        if found is None:
            return None
        node, place = _same_number(found[0]), found[1]


def _one_place(node: Node) -> tuple[Node, object] | None:
    """(values, place) where the node is what stands at that place of each row: an int, a tensor, or "last" of topk."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if is_call(node, aten.select.int) and over_last(source, node.args[1]):
        return source, node.args[2]
    if is_call(node, aten.slice.Tensor) and is_one_a_row(node):
        parts = slice_range(node)
        return (source, parts[2]) if parts is not None and parts[1] == last_dim(source) else None
    if is_call(node, aten.gather.default) and over_last(source, node.args[1]) and is_one_a_row(node.args[2]):
        return source, node.args[2]
    if is_call(node, aten.index.Tensor) and [i for i in node.args[1][:-1] if i is not None] == []:
        place = _constant_place(node.args[1][-1])
        return (source, place) if place is not None and len(node.args[1]) == len(shape(source)) else None
    if is_call(node, aten.amin.default) and [dim_of(source, d) for d in node.args[1]] == [last_dim(source)]:
        return source, "last"
    call = output_of(node, 0, aten.min.dim)
    if call is not None and over_last(call.args[0], call.args[1]):
        return call.args[0], "last"
    return None


def _constant_place(index: object) -> int | None:
    """The place that a constant tensor of one index names: `values[:, [-1]]`."""
    index = strip(index) if isinstance(index, Node) else None
    if index is None or index.op != "get_attr":
        return None
    constant = getattr(index.graph.owning_module, str(index.target), None)
    if type(constant) is not torch.Tensor or constant.numel() != 1 or constant.dtype != torch.int64:
        return None
    with unset_fake_temporarily():
        return int(constant.item())


def _sorted(node: Node, stage: Stage) -> Sort | None:
    """The sort of the stage whose values the node is; the stage may lie in its order itself."""
    sort = sort_with_values(node)
    if sort is not None and stage.is_kept(sort.source):
        return sort
    if stage.order is not None and stage.order.has_values(stage.kept) and stage.order.has_values(node):
        return stage.order
    return None


def _rank(place: object, descending: bool, vocab: object) -> Number | None:
    """k of the value at a place of a sorted row, from the largest."""
    if isinstance(place, int) and not isinstance(vocab, int):
        at_end = place < 0
        if at_end is descending:
            return None
        return -place if at_end else place + 1
    if isinstance(place, int):
        place = place + vocab if place < 0 else place
        return place + 1 if descending else vocab - place
    if not isinstance(place, Node):
        return None
    k = _plus_one(place) if descending else complement(vocab, place)
    return replace(k, at_most=vocab) if isinstance(k, RowNumber) else k


def _rank_in_topk(place: object, top: Node) -> Number | None:
    k = top.args[1]
    is_sorted = argument(top, 4, "sorted", True) is True
    if place == "last" or (is_sorted and (place == -1 or (isinstance(k, int) and place == k - 1))):
        return k if isinstance(k, int) else RowNumber(k)
    if not is_sorted:
        return None
    if isinstance(place, Node):
        return replace(_plus_one(place), at_most=value(k))
    if not isinstance(place, int) or (place < 0 and not isinstance(k, int)):
        return None
    return place + 1 if place >= 0 else k + place + 1


def _plus_one(place: Node) -> RowNumber:
    """place + 1, where the graph has `place = k - 1` the k."""
    node = without_dim(place)
    if is_call(node, aten.sub.Tensor) and not node.kwargs and number(node.args[1]) == 1:
        return RowNumber(without_dim(node.args[0]))
    return RowNumber(node).plus(1)


def _topk(node: Node, stage: Stage) -> Node | None:
    """The topk of the stage whose values the node is."""
    top = output_of(node, 0, aten.topk.default)
    if top is None or argument(top, 3, "largest", True) is not True:
        return None
    source = top.args[0]
    if not over_last(source, argument(top, 2, "dim", -1)):
        return None
    if stage.is_kept(source):
        return top
    order = stage.order
    return top if order is not None and order.has_values(stage.kept) and same_row(source, order.source) else None
