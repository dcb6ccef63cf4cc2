"""Weights that are not negative, whatever the graph's inputs hold: a draw from them is one from probabilities.

    where(q - p > 0, q - p, 0), clamp(q - p, min=0), relu(q - p)        what speculative decoding draws from after a rejection
    softmax(x), w / sum(w), w[rows, n], w1 * w2, cat, where, ...        and what is made of such by steps that keep the sign

NaN counts as not negative (0 / 0 where nothing is left): an op that draws from a row with NaN says that it can't.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch.fx import Node

from ..sites import Declined
from ..walk import argument, aten, is_call, is_tensor, number, prims, same_value, strip, strip_casts, value
from .softmax import match_normalised

_ALWAYS = (
    aten.exp.default,
    aten.exp2.default,
    aten.abs.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.sqrt.default,
    aten.rand.default,
    aten._softmax.default,
    aten.softmax.int,
    torch.ops.fi.softmax.default,
    torch.ops.fi.top_k_top_p_softmax.default,
    torch.ops.fi.top_k_renorm_probs.default,
    torch.ops.fi.top_p_renorm_probs.default,
    torch.ops.fi.top_k_top_p_renorm_probs.default,
)
_OF_THE_FIRST = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.repeat.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.flip.default,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.embedding.default,
    aten.amax.default,
    aten.amin.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.cumsum.default,
    aten._to_copy.default,
    prims.convert_element_type.default,
)
"""Every element of the result is one of the first argument's, or a sum, mean or cast of some."""
_OF_BOTH = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.minimum.default)
_WRITES = {
    aten.scatter.src: 3,
    aten.scatter.value: 3,
    aten.slice_scatter.default: 1,
    aten.select_scatter.default: 1,
    aten.index_put.default: 2,
}
"""Elements of argument 0, and of the argument at this index in their place."""
_GREATER = (aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor)
_LESS = (aten.lt.Scalar, aten.lt.Tensor, aten.le.Scalar, aten.le.Tensor)
_SELECTIONS = (aten.sort.default, aten.sort.stable, aten.topk.default, aten.max.dim, aten.min.dim)


def known_weights(node: Node, gone: Collection[Node]) -> Node:
    """What a draw from `node` can be made from: what it is the normalised form of, if that is `gone` then, or itself.

    Declined where it is not known that no weight is negative.
    """
    weights = strip_casts(node)
    if not is_non_negative(weights):
        raise Declined(f"{weights.name}: draws from {weights.target}, which is not known to be >= 0")
    whole = match_normalised(weights)
    return whole if whole is not None and weights in gone else node


def is_non_negative(node: object) -> bool:
    """No element of the tensor (or number) is below 0."""
    return _proven(node, {})


def _proven(node: object, known: dict[Node, bool]) -> bool:
    constant = number(node) if not isinstance(node, Node) or is_tensor(node) else None
    if constant is not None:
        return constant >= 0
    if not isinstance(node, Node) or not is_tensor(node):
        return False
    if node not in known:
        known[node] = value(node).dtype in (torch.bool, torch.uint8) or _by_what_it_computes(node, known)
    return known[node]


def _by_what_it_computes(node: Node, known: dict[Node, bool]) -> bool:
    def proven(index: int) -> bool:
        return _proven(node.args[index], known)

    if is_call(node, *_ALWAYS):
        return True
    if is_call(node, *_OF_THE_FIRST):
        return proven(0)
    if is_call(node, operator.getitem):
        return is_call(node.args[0], *_SELECTIONS) and node.args[1] == 0 and _proven(node.args[0].args[0], known)
    if is_call(node, *_OF_BOTH):
        is_square = node.target is aten.mul.Tensor and node.args[0] is node.args[1]
        return is_square or (proven(0) and proven(1))
    if is_call(node, aten.add.Tensor):
        return not node.kwargs and proven(0) and proven(1)
    if is_call(node, aten.maximum.default):
        return proven(0) or proven(1)
    if is_call(node, aten.pow.Tensor_Scalar):
        return node.args[1] == 2 or proven(0)
    if is_call(node, aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default):
        return _is_clamped(node, known)
    if is_call(node, aten.where.self):
        condition, chosen, other = node.args
        return (proven(1) or _implied(condition, chosen)) and (proven(2) or _implied(condition, other, negated=True))
    if is_call(node, aten.cat.default):
        return all(_proven(part, known) for part in node.args[0])
    if is_call(node, aten.constant_pad_nd.default):
        return argument(node, 2, "value", 0) >= 0 and proven(0)
    if node.target in _WRITES:
        return proven(0) and proven(_WRITES[node.target])
    return False


def _is_clamped(node: Node, known: dict[Node, bool]) -> bool:
    is_max = node.target is aten.clamp_max.default
    low = None if is_max else argument(node, 1, "min", None)
    high = argument(node, 1 if is_max else 2, "max", None)
    if isinstance(high, (int, float)) and high < 0:
        return False
    return (isinstance(low, (int, float)) and low >= 0) or _proven(node.args[0], known)


def _implied(condition: Node, node: Node, negated: bool = False) -> bool:
    """Where the condition holds (or, `negated`, does not), the element of `node` is not negative (or NaN)."""
    if is_call(condition, aten.bitwise_and.Tensor, aten.logical_and.default) and not negated:
        return any(_implied(part, node) for part in condition.args)
    if is_call(condition, aten.logical_not.default, aten.bitwise_not.default):
        return _implied(condition.args[0], node, not negated)
    if is_call(condition, *_GREATER):
        larger, smaller = condition.args[::-1] if negated else condition.args
    elif is_call(condition, *_LESS):
        larger, smaller = condition.args if negated else condition.args[::-1]
    else:
        return False
    return _is_difference(node, larger, smaller)


def _is_difference(node: Node, larger, smaller) -> bool:
    """`larger >= smaller` makes `node` not negative: it is the larger and the smaller is >= 0, or what is between them."""
    bound = number(smaller)
    if bound is not None and bound >= 0 and isinstance(larger, Node) and same_value(larger, node):
        return True
    node = strip(node)
    if not is_call(node, aten.sub.Tensor) or node.kwargs:
        return False
    return same_value(node.args[0], larger) and same_value(node.args[1], smaller)
