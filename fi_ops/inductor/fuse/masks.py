"""The masks of a site become the one that an op takes; and sinks the vector that it takes.

A single mask goes in as it is. Several, and those that are scaled or set scores to a finite number, become one additive
mask in float32, in the order in which the model applies them, in the smallest shape that they broadcast to, once for all
layers that have the same.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import torch
from torch.fx import Node

from ..normalize.attention import Attention
from ..normalize.masks import Mask, original_mask
from ..walk import aten, prims, shape, value
from .emit import Emitter


def kind_of_mask(masks: tuple[Mask, ...], has_rest: bool = False) -> str:
    """What the op gets: none, bool or additive. `has_rest`: what is left of other masks, which is bool, comes to them."""
    if not masks:
        return "bool" if has_rest else "none"
    is_bool = len(masks) == 1 and masks[0].is_bool and masks[0].is_operand and not has_rest
    return "bool" if is_bool else "additive"


def emit_mask(attention: Attention, emitter: Emitter) -> Node | None:
    """The mask with four dimensions, True where a key is attended to."""
    masks = attention.masks
    if not masks:
        return None
    operand_types = (torch.bool, torch.float32, value(attention.query).dtype)
    if len(masks) == 1 and masks[0].is_operand and value(masks[0].node).dtype in operand_types:
        mask = original_mask(masks[0].node)
        if masks[0].inverted:
            mask = emitter.shared(aten.logical_not.default, mask)
        return _four_dimensional(mask, emitter)
    heads = shape(attention.query)[1]
    made: Node | None = None
    for mask in reversed(
        masks
    ):  # from the one next to the product on, because one that sets scores undoes those before
        if mask.is_bool:
            made = _set_scores(mask, made, heads, emitter)
        else:
            added = _added(mask, heads, emitter)
            made = added if made is None else emitter.shared(aten.add.Tensor, made, added)
    return made


def _set_scores(mask: Mask, others: Node | None, heads: int, emitter: Emitter) -> Node:
    """`others`, what is added so far, and the mask's number where the mask does not keep the score."""
    keep = _by_heads(mask, original_mask(mask.node), heads, emitter)
    nothing, fill = (
        emitter.shared(aten.full.default, (), number, dtype=torch.float32, device=value(keep).device)
        for number in (0.0, mask.fill)
    )
    kept = nothing if others is None else others
    return emitter.shared(aten.where.self, keep, *((fill, kept) if mask.inverted else (kept, fill)))


def _added(mask: Mask, heads: int, emitter: Emitter) -> Node:
    """What an additive mask adds to the scores, in float32."""
    node = original_mask(mask.node)
    if value(node).dtype != torch.float32:
        node = emitter.shared(prims.convert_element_type.default, node, torch.float32)
    if not mask.scale.is_one:
        op = aten.div.Tensor if mask.scale.divide else aten.mul.Tensor
        node = emitter.shared(op, node, mask.scale.number)
    return _by_heads(mask, node, heads, emitter)


def _by_heads(mask: Mask, node: Node, heads: int, emitter: Emitter) -> Node:
    if mask.heads_merged:
        rows_and_keys = (emitter.size(node, dim) for dim in (1, 2))
        node = emitter.shared(aten.reshape.default, node, (-1, heads, *rows_and_keys))
    return _four_dimensional(node, emitter)


def _four_dimensional(mask: Node, emitter: Emitter) -> Node:
    while len(shape(mask)) < 4:
        mask = emitter.shared(aten.unsqueeze.default, mask, 0)
    return mask


def emit_sinks(attention: Attention, emitter: Emitter) -> Node | None:
    """[num_qo_heads] in float32."""
    if attention.sinks is None:
        return None
    sinks = emitter.call(aten.reshape.default, attention.sinks, [emitter.size(attention.sinks, 1)])
    if value(sinks).dtype == torch.float32:
        return sinks
    return emitter.call(prims.convert_element_type.default, sinks, torch.float32)
