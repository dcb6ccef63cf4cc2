"""Attention in one form, from SDPA anchors (here) and from the chain of eager code (`eager.py`).

fi_anchor.sdpa(q, k, v, mask, ...)                                                         F.scaled_dot_product_attention
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .. import anchors
from ..sites import Declined
from ..support import DTYPES, has_kernels
from ..walk import divides, may_be_same_size, same_size, value
from .masks import Mask


@dataclass
class Attention:
    """softmax(cap(query @ key^T * scale) + masks) @ value; heads of key and value may still be repeated."""

    node: Node
    """The node whose value it is."""
    query: Node
    key: Node
    value: Node
    query_pe: Node | None = None
    """[B, H, L, R]: with `key_pe` [B, 1, S, R], another part of the scores, query_pe @ key_pe^T. Then `key` is `value`."""
    key_pe: Node | None = None
    result_dims: tuple[int, ...] | None = None
    """Then `node` is its value `.permute(result_dims)`, in a shape of its own."""
    lse: Node | None = None
    """The node whose value is its base-2 log-sum-exp, where that is used too."""
    masks: tuple[Mask, ...] = ()
    """From the one that is applied last on."""
    causal: bool = False
    scale: float | Node | None = None
    """A number, a scalar tensor, or None for 1 / sqrt(D)."""
    divide: bool = False
    """The scores are divided by `scale`."""
    soft_cap: float = 0.0
    sources: tuple[Node, ...] = ()
    """What its masks will be made from, where they are not there yet."""
    sinks: Node | None = None
    """One more logit a head, [1, H, 1, 1], that takes its share of the weights and has no value."""
    key_transposed: bool = False
    """`key` is [B, H, D, Lk]."""
    heads: int | None = None
    """Of the scores, where they say it and the operands may not."""
    views: tuple[Node, ...] = ()
    """What was put into the graph to have query, key and value as they are here."""
    spelling: str = "sdpa"

    @property
    def results(self) -> tuple[Node, ...]:
        return (self.node,) if self.lse is None else (self.node, self.lse)

    @property
    def place(self) -> Node:
        """What its op goes in front of: all that uses a result is behind."""
        return self.node if self.lse is None else self.node.args[0]

    @property
    def operands(self) -> tuple[Node | None, ...]:
        """What the op takes besides query, key and value."""
        scales = [mask.scale.number for mask in self.masks]
        numbers = [scale for scale in (self.scale, *scales) if isinstance(scale, Node)]
        return (self.sinks, *numbers, *self.sources, *(mask.node for mask in self.masks))


def from_anchor(node: Node) -> Attention:
    """The attention that an SDPA anchor stands for."""
    arguments = anchors.sdpa_arguments(node)
    scale = arguments["scale"]
    if isinstance(scale, Node):
        raise Declined(f"{scale.name}: scale is computed at run time")
    return Attention(
        node,
        arguments["query"],
        arguments["key"],
        arguments["value"],
        masks=() if arguments["attn_mask"] is None else (Mask(arguments["attn_mask"]),),
        causal=bool(arguments["is_causal"]),
        scale=scale,
    )


def check_attention(attention: Attention, q, k, v) -> None:
    """The ops take these tensors: query [B, H, Lq, D], and key, value [B, Hkv, Lk, D] without repeated heads."""
    name = attention.node.name
    if not has_kernels(q.device):
        raise Declined(f"{name}: no kernels for device {q.device.type}")
    for which, tensor in (("query", q), ("key", k), ("value", v)):
        if tensor.dtype not in DTYPES:
            raise Declined(f"{name}: {which} is {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise Declined(f"{name}: {which} is {tensor.dtype}, query is {q.dtype}")
        if tensor.device != q.device:
            raise Declined(f"{name}: {which} is on {tensor.device}, query on {q.device}")
        if tensor.dim() != 4:
            raise Declined(f"{name}: {which} has {tensor.dim()} dimensions, not 4")
    if value(attention.node).dtype != q.dtype:
        raise Declined(f"{name}: result is {value(attention.node).dtype}, query is {q.dtype}")
    if not (same_size(q.shape[0], k.shape[0]) and same_size(q.shape[0], v.shape[0])):
        raise Declined(f"{name}: batch sizes {q.shape[0]}, {k.shape[0]}, {v.shape[0]} are not known to be equal")
    if not same_size(k.shape[1], v.shape[1]) or not divides(k.shape[1], q.shape[1]):
        raise Declined(f"{name}: {q.shape[1]} query heads over {k.shape[1]} key heads and {v.shape[1]} value heads")
    if not may_be_same_size(k.shape[2], v.shape[2]) or not same_size(k.shape[3], q.shape[3]):
        raise Declined(f"{name}: key {tuple(k.shape)} does not fit query {tuple(q.shape)} and value {tuple(v.shape)}")
    if isinstance(attention.scale, Node):
        if attention.soft_cap:
            raise Declined(f"{attention.scale.name}: scale is a tensor, with a soft cap")
    elif attention.scale is not None and not attention.scale > 0:
        raise Declined(f"{name}: scale is {attention.scale}")


def check_contiguous_last(node_name: str, which: str, tensor) -> None:
    """The ops read every operand but the mask with a contiguous last dimension."""
    if not same_size(tensor.stride(-1), 1) and not same_size(tensor.shape[-1], 1):
        raise Declined(f"{node_name}: {which} has stride {tensor.stride(-1)} in its last dimension")
