"""Min-p: tokens less probable than a part of the most probable one are removed.

probs < m * probs.amax(-1, True)
scores < scores.amax(-1, True) + log(m)
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import math

from torch.fx import Node

from ..walk import argument, aten, commuted, dim_of, is_call, is_tensor, number, strip_casts
from .order import last_dim, output_of, over_last, put_back, same_row
from .removal import Condition, Stage, compares, is_kept_constant, is_top_one
from .row_number import Number, RowNumber, row_number, without_dim


def match_min_p(condition: Condition, stage: Stage) -> Number | None:
    """m where the condition removes what is less probable than m times the most probable token."""
    for relation, a, threshold in compares(_without_kept_top(condition, stage)):
        if relation != "lt" or not isinstance(threshold, Node) or not isinstance(a, Node):
            continue
        if stage.has_probs(a) or (stage.is_weights and stage.is_kept(a)):
            return _part_of_largest(threshold, a)
        if not stage.is_weights and stage.is_kept(a):
            return _below_largest(threshold, a)
    return None


def _part_of_largest(threshold: Node, probs: Node) -> Number | None:
    threshold = strip_casts(threshold)
    for largest, part in commuted(threshold) if is_call(threshold, aten.mul.Tensor) else ():
        if is_tensor(largest) and _is_largest(largest, probs):
            return row_number(part)
    return None


def _below_largest(threshold: Node, scores: Node) -> Number | None:
    threshold = strip_casts(threshold)
    for largest, distance in (
        commuted(threshold) if is_call(threshold, aten.add.Tensor) and not threshold.kwargs else ()
    ):
        if is_tensor(largest) and _is_largest(largest, scores):
            literal = number(distance)
            if literal is not None:
                return math.exp(min(literal, 1.0))
            node = without_dim(distance)
            return RowNumber(without_dim(node.args[0])) if is_call(node, aten.log.default) else None
    return None


def _is_largest(node: Node, row: Node) -> bool:
    """`node` is the largest of each row, [B, 1]."""
    node = strip_casts(node)
    if is_call(node, aten.amax.default):
        source, over = node.args[0], [dim_of(node.args[0], d) for d in argument(node, 1, "dim", ())]
        return over == [last_dim(source)] and argument(node, 2, "keepdim", False) and same_row(source, row)
    call = output_of(node, 0, aten.max.dim)
    if call is None or not over_last(call.args[0], call.args[1]):
        return False
    return argument(call, 2, "keepdim", False) and same_row(call.args[0], row)


def _without_kept_top(condition: Condition, stage: Stage) -> Condition:
    """The condition before the most probable token, which min-p never removes, was kept in any case."""
    node = condition.node
    if is_call(node, aten.scatter.value) and over_last(node.args[0], node.args[1]):
        if is_kept_constant(node.args[3], condition) and is_top_one(node.args[2], stage):
            return condition.of(node.args[0])
        return condition
    found = put_back(node)
    if found is None or not found[1].descending:
        return condition
    # gathered into descending order, the first kept, put back
    sort, scattered = found[1], condition.of(found[0])
    first_kept = scattered.node
    if not stage.is_kept(sort.source) and not stage.has_probs(sort.source):
        return condition
    if not is_call(first_kept, aten.slice_scatter.default, aten.select_scatter.default):
        return condition
    base, fill, dim, start = first_kept.args[:4]
    end = argument(first_kept, 4, "end", None)
    is_first = (start or 0) == 0 and (first_kept.target is aten.select_scatter.default or end == 1)
    gathered = scattered.of(base)
    if not is_first or not over_last(base, dim) or not is_kept_constant(fill, scattered):
        return condition
    if not is_call(gathered.node, aten.gather.default) or not sort.has_ids(gathered.node.args[2]):
        return condition
    return gathered.of(gathered.node.args[0])
