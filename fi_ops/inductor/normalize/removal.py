"""Rows of which tokens are removed, and the comparisons that say which.

where(removed, -inf, x)     where(keep, x, -inf)     index_put(x, [removed], -inf)      of scores
where(removed, 0, w)                                                                    of weights
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..walk import aten, is_call, is_cast, is_tensor, number, read_scalar, same_shape, shape, strip, value
from .order import Sort, output_of, same_row, sort_with_values
from .softmax import match_normalised, match_softmax

LOWEST, LOWEST_HALF = -1e9, -65504.0
"""Scores set to this or less have no probability; float16 has nothing below the second."""


@dataclass(frozen=True)
class Stage:
    """Rows as a filter finds them."""

    kept: Node
    is_weights: bool
    """Not negative, of which a token's probability is its share; else scores, whose softmax that is."""
    order: Sort | None = None
    """They lie in the order of this sort, which is not undone yet."""

    def is_kept(self, node: object) -> bool:
        return same_row(node, self.kept)

    def has_probs(self, node: object) -> bool:
        """`node` is the probabilities of what is kept, in the same order."""
        if self.is_weights:
            return self.is_kept(node) and _sums_to_one(self.kept)
        scores = match_softmax(node) if isinstance(node, Node) else None
        return scores is not None and self.is_kept(scores)


def _sums_to_one(weights: Node) -> bool:
    sort = sort_with_values(weights)
    weights = weights if sort is None else sort.source
    return match_softmax(weights) is not None or match_normalised(weights) is not None


@dataclass(frozen=True)
class Condition:
    """Which tokens are removed: where `node` is true, or where it is false if `is_keep`."""

    node: Node
    is_keep: bool = False

    def of(self, node: Node) -> Condition:
        """What `node`, which is this condition somewhere else, says."""
        node, is_keep = strip(node), self.is_keep
        while is_call(node, aten.logical_not.default, aten.bitwise_not.default):
            node, is_keep = strip(node.args[0]), not is_keep
        return Condition(node, is_keep)


_COMPARISONS = {
    getattr(getattr(aten, name), kind): name for name in ("lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")
}
_SWAPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


def compares(condition: Condition) -> tuple[tuple[str, object, object], ...]:
    """(relation, a, b), both ways round, where tokens with `a relation b` are removed; empty if it is no comparison."""
    name = _COMPARISONS.get(condition.node.target)
    if name is None:
        return ()
    a, b = condition.node.args
    name = _OPPOSITE[name] if condition.is_keep else name
    return (name, a, b), (_SWAPPED[name], b, a)


def without_removed(stage: Stage) -> tuple[Condition, Node, bool] | None:
    """(condition, x, is -inf) where the rows are x with the tokens of the condition removed."""
    node = strip(stage.kept)
    if is_call(node, aten.where.self):
        condition, a, b = node.args
        for fill, kept, is_keep in ((a, b, False), (b, a, True)):
            if is_tensor(kept) and _is_removed(number(fill), stage):
                found, fill = Condition(condition, is_keep).of(condition), number(fill)
                return (found, kept, fill == -math.inf) if same_shape(shape(kept), shape(node)) else None
    elif is_call(node, aten.index_put.default):
        kept, indices, fill = node.args[:3]
        fill = number(fill)
        if len(node.args) == 3 and not node.kwargs and len(indices) == 1 and _is_removed(fill, stage):
            return Condition(indices[0]).of(indices[0]), kept, fill == -math.inf
    return None


def _is_removed(fill: float | None, stage: Stage) -> bool:
    if fill is None or stage.is_weights:
        return fill == 0
    return fill <= (LOWEST_HALF if value(stage.kept).dtype == torch.float16 else LOWEST)


def is_kept_constant(node: object, condition: Condition) -> bool:
    """A constant that keeps all tokens it is written for, copied or filled into its place."""
    known = _bool_constant(node)
    return known is not None and known == condition.is_keep


def _bool_constant(node: object) -> bool | None:
    if isinstance(node, (bool, int, float)):
        return bool(node)
    if not isinstance(node, Node):
        return None
    node = strip(node)
    if is_call(node, aten.full.default, aten.full_like.default, aten.fill.Scalar):
        return bool(node.args[1]) if isinstance(node.args[1], (bool, int, float)) else None
    if is_call(node, aten.copy.default):
        return _bool_constant(node.args[1])
    if is_call(node, aten.expand.default, aten.unsqueeze.default, aten.view.default) or is_cast(node):
        return _bool_constant(node.args[0])
    if is_call(node, aten.scalar_tensor.default):
        return bool(node.args[0])
    if node.op == "get_attr":
        constant = getattr(node.graph.owning_module, str(node.target), None)
        if type(constant) is torch.Tensor and constant.numel() == 1:
            return bool(read_scalar(constant))
    return None


def written_copy(node: object) -> object:
    """What was written by `x[...] = node`: the copy into x's slice has its value."""
    node = strip(node)
    return strip(node.args[1]) if is_call(node, aten.copy.default) else node


def is_top_one(ids: object, stage: Stage) -> bool:
    """`ids` name the most probable token of each row."""
    call = output_of(ids, 1, aten.topk.default)
    if call is None or call.args[1] != 1 or call.kwargs or any(a not in (-1, True) for a in call.args[2:]):
        return False
    return stage.is_kept(call.args[0]) or stage.has_probs(call.args[0])
