"""Attention as products and a softmax.

    bmm(q, k^T) -> [* scale] -> [tanh soft cap] -> [masks] -> [cat sinks] -> softmax -> [cast, drop sinks] -> bmm(., v)

The operands of `bmm` are [B, H, L, D] tensors expanded and viewed as [B * H, L, D]; the scores may be viewed either way.
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
    argument,
    aten,
    commuted,
    dim_of,
    is_call,
    is_cast,
    is_scalar,
    is_tensor,
    keeps_order,
    layout,
    number,
    permutation,
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
from .softmax import match_softmax

VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
PRODUCTS = (aten.bmm.default, aten.baddbmm.default)
HALVES = (torch.bfloat16, torch.float16)
REACH = 16
"""Steps from a softmax up to the product of queries and keys."""


def match_eager(node: Node) -> Attention | None:
    """The attention that ends in `node`, a `bmm` of softmax weights with the values; None if it is another product."""
    if not is_call(node, aten.bmm.default):
        return None
    weights = _batched_operand(node.args[0])
    if weights is None:
        return None
    dropped = _without_last_column(weights)
    scores = match_softmax(weights if dropped is None else dropped)
    if scores is None:
        return None
    result = _single_view(node)
    if result is None:
        raise Declined(f"{node.name}: its result is not viewed as [B, H, L, D]")
    for step in _chain_to_softmax(node.args[0]):
        if len(step.users) != 1:
            raise Declined(f"{step.name}: the attention weights are used elsewhere too")
    values = _batched_operand(node.args[1])
    if values is None or len(shape(values)) != 4:
        raise Declined(f"{node.name}: values are not [B, H, L, D] viewed as [B * H, L, D]")
    attention = Attention(result, node, node, values, spelling="eager")
    scores = _unshifted(scores)  # not below sinks: against those, a shift of the scores counts
    if dropped is not None:
        scores = _match_sinks(attention, scores)
    product = _match_logits(attention, scores)
    query, key, transposed = _query_and_key(product, _narrow)
    if any(operand is not None and value(operand).dtype != value(result).dtype for operand in (query, key)):
        query, key, transposed = _query_and_key(product, strip)
    if query is None or key is None or len(shape(query)) != 4 or len(shape(key)) != 4:
        raise Declined(f"{product.name}: queries and keys are not [B, H, L, D] viewed as [B * H, L, D]")
    if not same_shape(shape(result), (*shape(query)[:3], shape(values)[3])):
        raise Declined(f"{result.name}: {tuple(shape(result))} is not the shape of queries and values")
    attention.query, attention.key, attention.key_transposed = query, key, transposed
    return attention


def _batched_operand(node: Node, through: Callable[[Node], Node] = strip) -> Node | None:
    """The tensor [..., x, y] that an operand [N, x, y] of a bmm was viewed from."""
    node = through(node)
    if not is_call(node, *VIEWS):
        return node
    source = through(node.args[0])
    if len(shape(source)) == 5:  # einsum
        source, dims = layout(source)
        if dims != (0, 1, 2, 3):
            return None
    if len(shape(source)) != 4 or len(shape(node)) != 3:
        return None
    batch = shape(source)[0] * shape(source)[1]
    return source if same_shape(shape(node), (batch, *shape(source)[2:])) else None


def _query_and_key(product: Node, through: Callable[[Node], Node]) -> tuple[Node | None, Node | None, bool]:
    """(Q [B, H, L, D], K [B, H, S, D], False), or (Q, K [B, H, D, S], True), of which the scores are the product."""
    query = _batched_operand(product.args[-2], through)
    found = permutation(through(product.args[-1]))
    if found is not None and found[1] == (0, 2, 1):
        return query, _batched_operand(found[0], through), False
    key = _batched_operand(product.args[-1], through)
    if key is None:
        return query, _einsum_key(product.args[-1], through), False
    found = permutation(key) if key is not None else None
    if found is not None and found[1] == (0, 1, 3, 2):
        return query, through(found[0]), False
    return query, key, True


def _einsum_key(node: Node, through: Callable[[Node], Node]) -> Node | None:
    """K [B, H, S, D] of an operand [B * H, D, S] as `einsum` makes it."""
    node = through(node)
    if not is_call(node, *VIEWS) or len(shape(through(node.args[0]))) != 5:
        return None
    source, dims = layout(through(node.args[0]))
    if dims != (0, 1, 3, 2):
        return None
    batch, heads, length, dim = shape(source)
    return through(source) if same_shape(shape(node), (batch * heads, dim, length)) else None


def _narrow(node: Node) -> Node:
    """A query or key before it was cast to float32, in which the ops multiply anyway."""
    node = strip(node)
    while is_cast(node) and value(node).dtype == torch.float32 and value(node.args[0]).dtype in HALVES:
        node = strip(node.args[0])
    return node


def _single_view(node: Node) -> Node | None:
    """The only use of a product [B * H, L, D]: a view of it with four dimensions."""
    while len(node.users) == 1:
        (user,) = node.users
        if not is_call(user, *VIEWS) and not keeps_order(user):
            break
        if len(shape(user)) == 4:
            return user
        node = user
    return None


def _chain_to_softmax(node: Node) -> list[Node]:
    """The nodes from the weights as the product takes them up to their softmax's last step."""
    chain = [node]
    while not is_call(node, aten.div.Tensor, aten._softmax.default):
        node = node.args[0]
        chain.append(node)
    return chain


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
    inner, top = scores.args
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


def _match_logits(attention: Attention, scores: Node) -> Node:
    """Take masks, soft cap and scale off the scores, down to the product of queries and keys."""
    scale = Scale()
    masks: list[Mask] = []
    for _ in range(REACH):
        scores = strip_casts(scores)
        if is_call(scores, *VIEWS) and _keeps_rows(scores):
            scores = _before_views(scores)
            continue
        masked = _take_mask(scores)
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
    if not is_call(scores, *PRODUCTS):
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
    """A view from [B, H, L, S] to [B * H, L, S] or back."""
    before, after = shape(_before_views(view)), shape(view)
    return {len(before), len(after)} == {3, 4} and same_shape(before[-2:], after[-2:])


def _before_views(view: Node) -> Node:
    """What was viewed; through views with dimensions of size 1 put in, which `einsum` moves about."""
    node = view.args[0]
    while len(shape(node)) > 4 and (is_call(node, *VIEWS) or keeps_order(node)):
        node = node.args[0]
    return node


def _merges_heads(mask: Node) -> bool:
    """A mask of scores [B * H, L, S] that is not the same for all of B * H."""
    return len(shape(mask)) == 3 and not same_size(shape(mask)[0], 1)


def _take_mask(scores: Node) -> tuple[Node, Mask] | None:
    """(scores, mask) of `scores + mask` or `where(condition, scores, fill)`."""
    merged = len(shape(scores)) == 3
    if is_call(scores, aten.add.Tensor) and not scores.kwargs and is_tensor(scores.args[1]):
        for inner, mask in commuted(scores):
            if _is_scores(inner) and not _is_scores(mask):
                return inner, Mask(mask, heads_merged=merged and _merges_heads(mask))
        raise Declined(f"{scores.name}: which operand is the mask is not clear")
    if is_call(scores, aten.where.self):
        condition, chosen, other = scores.args
        for inner, fill, inverted in ((chosen, other, False), (other, chosen, True)):
            fill = number(fill)
            if fill is None or not _is_scores(inner):
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


def _is_scores(node: object) -> bool:
    """The node is a product of queries and keys, scaled, capped or masked."""
    pending, looked_at = [node], 0
    while pending and looked_at < 4 * REACH:
        node = pending.pop()
        if not is_tensor(node) or is_scalar(node):
            continue
        node, looked_at = strip_casts(node), looked_at + 1
        if is_call(node, *PRODUCTS):
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
