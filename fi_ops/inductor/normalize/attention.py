"""Attention in one form, from SDPA anchors and from the chain of eager code.

    fi_anchor.sdpa(q, k, v, mask, ...)                                                         F.scaled_dot_product_attention

    bmm(q, k^T) -> [* scale] -> [tanh soft cap] -> [+ mask | where(keep, ., -inf)] -> softmax -> [cast] -> bmm(., v)     eager

`softmax` is its decomposition exp(s - amax(s)) / sum(exp(...)), in the scores' dtype or in fp32; the operands of `bmm` are
[B, H, L, D] tensors expanded and viewed as [B * H, L, D].
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from .. import anchors
from ..sites import Declined
from ..support import DTYPES, has_kernels
from ..walk import (
    argument,
    aten,
    commuted,
    dim_of,
    divides,
    is_call,
    is_scalar,
    is_tensor,
    may_be_same_size,
    number,
    permutation,
    same_shape,
    same_size,
    shape,
    strip,
    strip_casts,
    value,
)
from .masks import kept_by


@dataclass
class Attention:
    """softmax(cap(query @ key^T * scale) + mask) @ value; heads of key and value may still be repeated."""

    node: Node
    """The node whose value it is."""
    query: Node
    key: Node
    value: Node
    mask: Node | None = None
    mask_inverted: bool = False
    """A bool mask keeps what is False in `mask`."""
    causal: bool = False
    scale: float | Node | None = None
    """A number, a scalar tensor, or None for 1 / sqrt(D)."""
    divide: bool = False
    """The scores are divided by `scale`."""
    soft_cap: float = 0.0
    key_transposed: bool = False
    """`key` is [B, H, D, Lk]."""
    spelling: str = "sdpa"


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
        mask=arguments["attn_mask"],
        causal=bool(arguments["is_causal"]),
        scale=scale,
    )


def match_eager(node: Node) -> Attention | None:
    """The attention that ends in `node`, a `bmm` of softmax weights with the values; None if it is another product."""
    if not is_call(node, aten.bmm.default):
        return None
    weights = _batched_operand(node.args[0])
    scores = match_softmax(weights) if weights is not None else None
    if scores is None:
        return None
    result = _single_view(node)
    if result is None or len(shape(result)) != 4:
        raise Declined(f"{node.name}: its result is not viewed as [B, H, L, D]")
    for step in _chain_to_softmax(node.args[0]):
        if len(step.users) != 1:
            raise Declined(f"{step.name}: the attention weights are used elsewhere too")
    values = _batched_operand(node.args[1])
    if values is None or len(shape(values)) != 4:
        raise Declined(f"{node.name}: values are not [B, H, L, D] viewed as [B * H, L, D]")
    attention = Attention(result, node, node, values, spelling="eager")
    scores = _match_mask(attention, strip_casts(scores))
    scores = _match_soft_cap(attention, scores)
    scores = _match_scale(attention, scores)
    product = strip(scores)
    if is_call(product, aten.view.default):
        product = strip(product.args[0])
    if not is_call(product, aten.bmm.default):
        raise Declined(f"{product.name}: scores come from {product.target}, not from a product of queries and keys")
    query, key = _batched_operand(product.args[0]), _batched_operand(product.args[1])
    if query is None or key is None or len(shape(query)) != 4 or len(shape(key)) != 4:
        raise Declined(f"{product.name}: queries and keys are not [B, H, L, D] viewed as [B * H, L, D]")
    attention.query = query
    attention.key, attention.key_transposed = _transposed_key(key)
    return attention


def match_softmax(node: Node) -> Node | None:
    """The scores whose softmax over the last dim `node` is, through casts and clones."""
    division = strip_casts(node)
    if not is_call(division, aten.div.Tensor):
        if is_call(division, aten._softmax.default, aten.softmax.int):
            source = division.args[0]
            return source if dim_of(source, division.args[1]) == len(shape(source)) - 1 else None
        return None
    top, total = division.args[0], division.args[1]
    if not is_call(top, aten.exp.default) or not is_call(total, aten.sum.dim_IntList) or total.args[0] is not top:
        return None
    shifted = top.args[0]
    if not is_call(shifted, aten.sub.Tensor) or not is_call(shifted.args[1], aten.amax.default):
        return None
    scores, maximum = shifted.args[0], shifted.args[1]
    last = len(shape(scores)) - 1
    keeps = argument(total, 2, "keepdim", False) and argument(maximum, 2, "keepdim", False)
    over_last = all([dim_of(scores, d) for d in reduction.args[1]] == [last] for reduction in (total, maximum))
    return scores if maximum.args[0] is scores and keeps and over_last else None


def _batched_operand(node: Node) -> Node | None:
    """The tensor [..., x, y] that an operand [N, x, y] of a bmm was viewed from."""
    node = strip(node)
    if not is_call(node, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return node
    source = strip(node.args[0])
    if len(shape(source)) != 4 or len(shape(node)) != 3:
        return None
    batch = shape(source)[0] * shape(source)[1]
    return source if same_shape(shape(node), (batch, *shape(source)[2:])) else None


def _single_view(node: Node) -> Node | None:
    users = list(node.users)
    if len(users) == 1 and is_call(users[0], aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return users[0]
    return None


def _chain_to_softmax(node: Node) -> list[Node]:
    """The nodes from the weights as the product takes them up to their softmax's last step."""
    chain = [node]
    while not is_call(node, aten.div.Tensor, aten._softmax.default):
        node = node.args[0]
        chain.append(node)
    return chain


def _match_mask(attention: Attention, scores: Node) -> Node:
    """Take `+ mask`, or `where(condition, scores, fill)`, off the scores."""
    scores = strip_casts(scores)
    if is_call(scores, aten.add.Tensor) and not scores.kwargs and is_tensor(scores.args[1]):
        for inner, mask in commuted(scores):
            if is_tensor(mask) and _is_scores(inner) and not _is_scores(mask):
                attention.mask = mask
                return strip_casts(inner)
        raise Declined(f"{scores.name}: which operand is the mask is not clear")
    if is_call(scores, aten.where.self):
        condition, chosen, other = scores.args
        for inner, fill, inverted in ((chosen, other, False), (other, chosen, True)):
            fill = number(fill)
            if fill is None or not _is_scores(inner):
                continue
            if fill != float("-inf"):
                raise Declined(f"{scores.name}: masked scores are set to {fill}, not to -inf")
            attention.mask, flipped = kept_by(condition)
            attention.mask_inverted = inverted != flipped
            return strip_casts(inner)
    return scores


def _is_scores(node: object) -> bool:
    """The node is a product of queries and keys, scaled or capped."""
    node = strip_casts(node) if isinstance(node, Node) else node
    for _ in range(8):
        if is_call(node, aten.bmm.default):
            return True
        if not is_call(node, aten.view.default, aten.mul.Tensor, aten.div.Tensor, aten.tanh.default, aten.mul.Scalar):
            return False
        operands = [n for n in node.args if is_tensor(n) and not is_scalar(n)]
        if len(operands) != 1:
            return False
        node = strip_casts(operands[0])
    return False


def _match_soft_cap(attention: Attention, scores: Node) -> Node:
    """Take `cap * tanh(scores / cap)` off the scores."""
    if not is_call(scores, aten.mul.Tensor):
        return scores
    for inner, cap in commuted(scores):
        tanh = strip_casts(inner) if isinstance(inner, Node) else None
        if not is_call(tanh, aten.tanh.default):
            continue
        quotient = strip_casts(tanh.args[0])
        cap = number(cap)
        if cap is None or cap <= 0:
            raise Declined(f"{scores.name}: soft cap is not a positive number")
        if is_call(quotient, aten.div.Tensor) and number(quotient.args[1]) == cap:
            attention.soft_cap = float(cap)
            return strip_casts(quotient.args[0])
        raise Declined(f"{quotient.name}: soft cap multiplies by {cap} but does not divide by it")
    return scores


def _match_scale(attention: Attention, scores: Node) -> Node:
    """Take one multiplication or division by a scalar off the scores."""
    attention.scale = 1.0
    if is_call(scores, aten.mul.Tensor):
        for inner, scale in commuted(scores):
            if isinstance(inner, Node) and not is_scalar(inner) and is_scalar(scale):
                attention.scale = _scale_value(scale)
                return strip_casts(inner)
        raise Declined(f"{scores.name}: scale is a tensor of shape {tuple(shape(scores.args[1]))}, not a number")
    if is_call(scores, aten.div.Tensor):
        if not is_scalar(scores.args[1]):
            raise Declined(f"{scores.name}: scale is a tensor of shape {tuple(shape(scores.args[1]))}, not a number")
        attention.scale, attention.divide = _scale_value(scores.args[1]), True
        return strip_casts(scores.args[0])
    return scores


def _scale_value(scale) -> float | Node:
    constant = number(scale)
    return float(constant) if constant is not None else scale


def _transposed_key(key: Node) -> tuple[Node, bool]:
    """(K, False) where `key` is the transpose of a node K [B, H, Lk, D]; else (key, True)."""
    found = permutation(key)
    if found is not None and found[1] == (0, 1, 3, 2):
        return strip(found[0]), False
    return key, True


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
