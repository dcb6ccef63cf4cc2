"""Attention as products and a softmax.

    bmm(q, k^T) -> [* scale] -> [tanh soft cap] -> [masks] -> [cat sinks] -> softmax -> [cast, drop sinks] -> bmm(., v)

The operands of `bmm` are [B, H, L, D] tensors in some form (`products.py`); the scores may be viewed as [B * H, L, S].
Masks are any number of `+ mask` and `where(keep, ., fill)`, and the first operand of `baddbmm(bias, q, k^T)`; what is
added before the scale is scaled with the scores.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.fx import Node

from ..sites import Declined
from ..walk import (
    VIEWS,
    argument,
    aten,
    commuted,
    dim_of,
    is_call,
    is_cast,
    is_scalar,
    is_tensor,
    keeps_order,
    number,
    same_shape,
    same_size,
    shape,
    slice_range,
    strip,
    strip_casts,
    value,
)
from .attention import Attention
from .masks import NEVER, Mask, Scale, check_fill, kept_by
from .products import Views, key_of, operand_of, result_of
from .softmax import match_softmax

PRODUCTS = (aten.bmm.default, aten.baddbmm.default)
HALVES = (torch.bfloat16, torch.float16)
REACH = 16
"""Steps from a softmax up to the product of queries and keys."""
Ends = Callable[[Node], bool]
"""Scores that are nothing but a product in some form."""


def match_eager(node: Node, views: Views) -> Attention | None:
    """The attention that ends in `node`, a `bmm` of softmax weights with the values; None if it is another product."""
    if not is_call(node, aten.bmm.default):
        return None
    operand = operand_of(node.args[0])
    weights = operand.source
    while is_call(weights, *VIEWS) and _keeps_rows(weights):
        weights = strip_casts(_before_views(weights))
    dropped = _without_last_column(weights)
    scores = match_softmax(weights if dropped is None else dropped) if operand.in_order else None
    if scores is None:
        return None
    check_weights(node)
    attention = Attention(node, node, node, node, spelling="eager")
    scores = _unshifted(scores)  # not below sinks: against those, a shift of the scores counts
    if dropped is not None:
        scores = _match_sinks(attention, scores)
    product = match_logits(attention, scores)
    _match_operands(attention, product, views)
    sizes = (*shape(attention.query)[:3], shape(attention.value)[3])
    attention.node = result_of(node, sizes)
    if len(shape(attention.node)) == 3 and not same_shape(shape(node), (sizes[0] * sizes[1], *sizes[2:])):
        raise Declined(f"{node.name}: {tuple(shape(node))} is not the shape of queries and values")
    attention.views = tuple(views.made)
    return attention


def _match_operands(attention: Attention, product: Node, views: Views) -> None:
    """Query, key and value as [B, H, L, D]."""
    last = attention.node
    values = operand_of(last.args[1])
    query, (key, transposed) = operand_of(product.args[-2], narrow), key_of(product.args[-1], narrow)
    if any(value(operand.source).dtype != value(last).dtype for operand in (query, key)):
        query, (key, transposed) = operand_of(product.args[-2]), key_of(product.args[-1], strip)
    known = [operand.sizes[1] for operand in (query, key, values) if len(operand.dims) == 4]
    heads = known[0] if known else 1 if attention.heads is None else attention.heads
    if attention.heads is not None and not same_size(attention.heads, heads):
        raise Declined(f"{product.name}: scores of {attention.heads} heads, queries of {heads}")
    if not all(len(operand.dims) == 4 for operand in (query, key, values)) and not isinstance(heads, int):
        raise Declined(f"{product.name}: the number of heads that are merged is symbolic")
    attention.query, attention.key, attention.value = (
        views.by_heads(operand.tensor(views), heads) for operand in (query, key, values)
    )
    attention.key_transposed = transposed


def narrow(node: Node) -> Node:
    """A query or key before it was cast to float32, in which the ops multiply anyway."""
    node = strip(node)
    while is_cast(node) and value(node).dtype == torch.float32 and value(node.args[0]).dtype in HALVES:
        node = strip(node.args[0])
    return node


def check_weights(product: Node) -> None:
    """From their softmax's last step on, the weights are for the product with the values alone."""
    step = product.args[0]
    while len(step.users) == 1 and not is_call(step, aten.div.Tensor, aten._softmax.default):
        step = step.args[0]
    if len(step.users) != 1:
        raise Declined(f"{step.name}: the attention weights are used elsewhere too")


def _without_last_column(weights: Node) -> Node | None:
    """The tensor that `weights` is all columns but the last of."""
    node = strip_casts(weights)
    parts = slice_range(node)
    if parts is None:
        return None
    source, dim, start, _ = parts
    columns = shape(source)[-1]
    is_all_but_one = dim == len(shape(source)) - 1 and same_size(start, 0) and same_size(shape(node)[-1], columns - 1)
    return source if is_all_but_one else None


def _unshifted(scores: Node) -> Node:
    """The scores before their row's maximum was subtracted, which no softmax notices."""
    scores = strip_casts(scores)
    if not is_call(scores, aten.sub.Tensor) or scores.kwargs or not is_tensor(scores.args[1]):
        return scores
    inner, top = scores.args[0], strip(scores.args[1])
    if is_call(top, operator.getitem) and top.args[1] == 0:
        top = top.args[0]
    if not is_call(top, aten.amax.default, aten.max.dim) or top.args[0] is not inner:
        return scores
    over = top.args[1] if isinstance(top.args[1], (list, tuple)) else [top.args[1]]
    is_row_maximum = [dim_of(inner, d) for d in over] == [len(shape(inner)) - 1] and argument(top, 2, "keepdim", False)
    return strip_casts(inner) if is_row_maximum else scores


def _match_sinks(attention: Attention, scores: Node) -> Node:
    """Take one column of sinks, the same for all rows of a head, off the scores."""
    if not is_call(scores, aten.cat.default) or len(scores.args[0]) != 2:
        raise Declined(f"{scores.name}: a column of the weights is dropped, and it is not that of sinks")
    logits, sinks = scores.args[0]
    last = len(shape(scores)) - 1
    sinks = strip_casts(sinks)
    while is_call(sinks, aten.expand.default) and len(shape(sinks.args[0])) == len(shape(sinks)):
        sinks = strip_casts(sinks.args[0])
    if dim_of(scores, argument(scores, 1, "dim", 0)) != last or last != 3:
        raise Declined(f"{scores.name}: joins sinks to scores in another way than as a last column of [B, H, L, S]")
    heads = shape(scores)[1]
    if not same_shape(shape(sinks), (1, heads, 1, 1)):
        raise Declined(
            f"{sinks.name}: sinks of shape {tuple(shape(sinks))} are not one number for each of {heads} heads"
        )
    attention.sinks = sinks
    return strip_casts(logits)


def match_logits(attention: Attention, scores: Node, ends: Ends | None = None) -> Node:
    """Take masks, soft cap and scale off the scores, down to the product of queries and keys, or to where it `ends`."""
    scale = Scale()
    masks: list[Mask] = []
    for _ in range(REACH):
        scores = strip_casts(scores)
        if ends is not None and ends(scores):
            break
        if is_call(scores, *VIEWS) and _keeps_rows(scores):
            heads = _heads(scores)
            if None not in (heads, attention.heads) and not same_size(heads, attention.heads):
                raise Declined(f"{scores.name}: scores of {attention.heads} heads are those of {heads}")
            attention.heads = attention.heads if heads is None else heads
            scores = _before_views(scores)
            continue
        masked = _take_mask(scores, ends)
        if masked is not None:
            scores, mask = masked
            masks.append(_below(attention, scale, mask))
            continue
        capped = _take_soft_cap(attention, scores) if scale.is_one and not attention.soft_cap else None
        if capped is not None:
            scores, attention.soft_cap = capped
            continue
        scaled = _take_scale(scores)
        if scaled is None:
            break
        scores, scale = scaled[0], scale.times(scaled[1], scores)
    is_end = ends is not None and ends(scores)
    if not is_end and not is_call(scores, *PRODUCTS):
        raise Declined(f"{scores.name}: scores come from {scores.target}, not from a product of queries and keys")
    if is_call(scores, aten.baddbmm.default):
        alpha, beta = (number(argument(scores, 9, name, 1)) for name in ("alpha", "beta"))
        if alpha is None or beta is None:
            raise Declined(f"{scores.name}: alpha or beta is computed at run time")
        if beta != 0:
            mask = Mask(scores.args[0], scale=Scale(beta), heads_merged=_merges_heads(scores.args[0]))
            masks.append(_below(attention, scale, mask))
        scale = scale.times(Scale(alpha), scores)
    attention.scale, attention.divide, attention.masks = scale.number, scale.divide, tuple(masks)
    return scores


def _below(attention: Attention, scale: Scale, mask: Mask) -> Mask:
    """A mask that is under the scale, so that it is scaled as well."""
    if attention.soft_cap:
        raise Declined(f"{mask.node.name}: a mask is applied before the soft cap")
    if scale.is_one:
        return mask
    if mask.is_bool:
        if mask.fill == NEVER and not isinstance(scale.number, Node) and scale.number > 0:
            return mask
        raise Declined(f"{mask.node.name}: scores are set to {mask.fill} and then scaled")
    return replace(mask, scale=scale.times(mask.scale, mask.node))


def _keeps_rows(view: Node) -> bool:
    """A view from [B, H, L, S] to [B * H, L, S] or back, or one of that kind and back."""
    before, after = shape(_before_views(view)), shape(view)
    return {len(before), len(after)} <= {3, 4} and same_shape(before[-2:], after[-2:])


def _heads(view: Node):
    """Of scores that are viewed as [B, H, L, S] or from that; None where they are [B * H, L, S] on both sides."""
    sizes = [shape(node) for node in (view, _before_views(view))]
    return next((size[1] for size in sizes if len(size) == 4), None)


def _before_views(view: Node) -> Node:
    """What was viewed; through views with dimensions of size 1 put in, which `einsum` moves about."""
    node, rows = view.args[0], shape(view)[-2:]
    while is_call(node, *VIEWS) or keeps_order(node):
        if len(shape(node)) <= 4 and same_shape(shape(node)[-2:], rows):
            break
        node = node.args[0]
    return node


def _merges_heads(mask: Node) -> bool:
    """A mask of scores [B * H, L, S] that is not the same for all of B * H."""
    return len(shape(mask)) == 3 and not same_size(shape(mask)[0], 1)


def _take_mask(scores: Node, ends: Ends | None) -> tuple[Node, Mask] | None:
    """(scores, mask) of `scores + mask` or `where(condition, scores, fill)`."""
    merged = len(shape(scores)) == 3
    if is_call(scores, aten.add.Tensor) and not scores.kwargs and is_tensor(scores.args[1]):
        for inner, mask in commuted(scores):
            if _is_scores(inner, ends) and not _is_scores(mask, ends):
                return inner, Mask(mask, heads_merged=merged and _merges_heads(mask))
        raise Declined(f"{scores.name}: which operand is the mask is not clear")
    if is_call(scores, aten.where.self):
        condition, chosen, other = scores.args
        for inner, fill, inverted in ((chosen, other, False), (other, chosen, True)):
            fill = number(fill)
            if fill is None or not _is_scores(inner, ends):
                continue
            check_fill(scores.name, fill)
            kept, flipped = kept_by(condition)
            is_merged = merged and _merges_heads(kept)
            return inner, Mask(kept, inverted=inverted != flipped, fill=float(fill), heads_merged=is_merged)
    return None


_ON_THE_WAY = (
    *VIEWS,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.tanh.default,
    aten.add.Tensor,
    aten.where.self,
)


def _is_scores(node: object, ends: Ends | None) -> bool:
    """The node is a product of queries and keys, scaled, capped or masked."""
    pending, looked_at = [node], 0
    while pending and looked_at < 4 * REACH:
        node = pending.pop()
        if not is_tensor(node) or is_scalar(node):
            continue
        node, looked_at = strip_casts(node), looked_at + 1
        if is_call(node, *PRODUCTS) or (ends is not None and ends(node)):
            return True
        if is_call(node, *_ON_THE_WAY) or keeps_order(node):
            pending.extend(node.args[:3])
    return False


def _take_soft_cap(attention: Attention, scores: Node) -> tuple[Node, float] | None:
    """(scores, cap) of `cap * tanh(scores / cap)`."""
    if not is_call(scores, aten.mul.Tensor):
        return None
    for inner, cap in commuted(scores):
        tanh = strip_casts(inner) if isinstance(inner, Node) else None
        if not is_call(tanh, aten.tanh.default):
            continue
        quotient = strip_casts(tanh.args[0])
        given, cap = cap, number(cap)
        if cap is None and is_scalar(given):
            raise Declined(
                f"{strip_casts(given).name}: soft cap is a number that may change from call to call, and an op's may not; "
                "dynamic=True makes one of each float of a model, unless torch._dynamo.config.specialize_float is set"
            )
        if cap is None or cap <= 0:
            raise Declined(f"{scores.name}: soft cap is not a positive number")
        if is_call(quotient, aten.div.Tensor) and number(quotient.args[1]) == cap:
            return quotient.args[0], float(cap)
        raise Declined(f"{quotient.name}: soft cap multiplies by {cap} but does not divide by it")
    return None


def _take_scale(scores: Node) -> tuple[Node, Scale] | None:
    """(scores, scale) of one multiplication or division by a scalar."""
    if is_call(scores, aten.mul.Tensor):
        for inner, scale in commuted(scores):
            if isinstance(inner, Node) and not is_scalar(inner) and is_scalar(scale):
                return inner, _scale_of(scale, False)
        raise Declined(f"{scores.name}: scale is a tensor of shape {tuple(shape(scores.args[1]))}, not a number")
    if is_call(scores, aten.div.Tensor):
        if not is_scalar(scores.args[1]):
            raise Declined(f"{scores.name}: scale is a tensor of shape {tuple(shape(scores.args[1]))}, not a number")
        return scores.args[0], _scale_of(scores.args[1], True)
    return None


def _scale_of(scale, divide: bool) -> Scale:
    constant = number(scale)
    return Scale(scale if constant is None else float(constant), divide)
