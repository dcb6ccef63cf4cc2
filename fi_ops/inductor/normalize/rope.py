"""Rotary position embedding, by what it computes.

With x1, x2 the two components of each rotated pair of x (the halves of the head in rotate-half (NeoX) order, neighbours
in interleaved (GPT-J) order), both spellings become `Rope(x, cos, sin, interleaved)`:

    join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)        cos, sin of half the rotary width (gpt-fast, GPT-OSS)
    x * cos + join(-x2, x1) * sin                         cos, sin of the full width (Hugging Face)
    (x1 + i x2) * (cos + i sin)                           as complex numbers (Meta's llama)

In the second, the two members of a pair may have their own cos and sin, and the ops take them as they are; where the second
half of rotate-half tables is proven to repeat the first, the first is enough. `cat(rope(x[..., :r]), x[..., r:])` is RoPE on
part of the head.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from dataclasses import dataclass

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
    permutation,
    same_shape,
    same_size,
    same_value,
    shape,
    slice_range,
    strip,
    strip_casts,
    value,
)

HALF, PAIR = "rotate-half", "interleaved"
HEADS_FIRST = (0, 2, 1, 3)


@dataclass
class Rope:
    node: Node
    """The rotated tensor."""
    x: Node
    """What was rotated, with the dimensions of `node`."""
    cos: Node
    sin: Node
    """Broadcast to x; last dimension R or 2R. Where they are one complex tensor, its real and its imaginary part."""
    interleaved: bool
    rotary_dim: int
    """How much of the head is rotated."""
    dims: tuple[int, ...] | None = None
    """The permutation after which x is [B, H, L, D], if it is not so already."""

    @property
    def halves_repeat(self) -> bool:
        """The second halves of cos and sin hold what the first ones do."""
        wide = not self.interleaved and same_size(shape(self.cos)[-1], self.rotary_dim)
        return wide and repeats(self.cos) and repeats(self.sin)


@dataclass(frozen=True)
class Component:
    """One of the two members of every rotated pair of `x`."""

    x: Node
    index: int
    order: str
    taken_from: Node
    """`x` before its casts were looked through."""


def match_rope(node: Node, dims: tuple[int, ...] | None = None) -> Rope | None:
    """The RoPE that `node` is the result of; None if it is not one.

    `node.permute(dims)` is [B, H, L, D]; without `dims`, RoPE is found on either side of a transpose.
    """
    top = strip_casts(node)
    found = permutation(top)
    if dims is None and found is not None and found[1] == HEADS_FIRST:
        dims, top = HEADS_FIRST, strip_casts(found[0])
    if dims not in (None, HEADS_FIRST):
        return None
    if len(shape(top)) != 4:
        return None
    parts = _match_partial(top) or _match_whole(top)
    if parts is None:
        return None
    x, cos, sin, order, rotary_dim = parts
    x = _in_dtype(x, value(node).dtype)
    if not isinstance(rotary_dim, int):
        raise Declined(f"{x.name}: rotary width is symbolic")
    if not same_shape(shape(x), shape(top)):
        raise Declined(f"{x.name}: rotated tensor {tuple(shape(x))} is not of the result's shape {tuple(shape(top))}")
    if value(x).dtype != value(node).dtype:
        raise Declined(f"{x.name}: rotates {value(x).dtype} to {value(node).dtype}")
    rope = Rope(node, x, cos, sin, order == PAIR, rotary_dim, dims)
    _check_tables(rope)
    return rope


def _in_dtype(x: Node, dtype: torch.dtype) -> Node:
    """What `x` was cast from, through all casts; where that is of another type, the last node of `dtype` on the way."""
    source = strip_casts(x)
    if value(source).dtype == dtype:
        return source
    while x is not source and value(x).dtype != dtype:
        stripped = strip(x)
        x = stripped if stripped is not x else x.args[0]
    return x


def _match_whole(top: Node):
    return _match_explicit(top) or _match_rotated(top) or _match_complex(top)


def _match_partial(top: Node):
    """RoPE on the first part of the head; the rest passes through."""
    if not is_call(top, aten.cat.default) or len(top.args[0]) != 2 or not _over_last(top):
        return None
    first, rest = (strip_casts(n) for n in top.args[0])
    parts = _match_whole(first)
    if parts is None:
        return None
    x, cos, sin, order, rotary_dim = parts
    rotated, passed = slice_range(strip_casts(x)), slice_range(rest)
    if rotated is None or passed is None:
        raise Declined(f"{top.name}: joins a rotated part and something that is not the rest of the head")
    last = len(shape(top)) - 1
    whole = strip_casts(rotated[0])
    if not same_value(whole, strip_casts(passed[0])) or rotated[1] != last or passed[1] != last:
        raise Declined(f"{rest.name}: is not the rest of the head that {x.name} is a part of")
    if not same_size(rotated[2], 0) or not same_size(passed[2], shape(first)[-1]) or passed[3] is not None:
        raise Declined(f"{rest.name}: is not the rest of the head that {x.name} is a part of")
    return rotated[0], cos, sin, order, rotary_dim


def _match_explicit(top: Node):
    """join(x1 * cos - x2 * sin, x2 * cos + x1 * sin)"""
    joined = _join(top)
    if joined is None:
        return None
    first, second, order = joined
    first, second = strip_casts(first), strip_casts(second)
    if not is_call(first, aten.sub.Tensor) or not is_call(second, aten.add.Tensor) or first.kwargs or second.kwargs:
        return None
    x1_cos, x2_sin = (_component_product(n) for n in first.args)
    products = [_component_product(n) for n in second.args]
    if x1_cos is None or x2_sin is None or None in products:
        return None
    x2_cos, x1_sin = sorted(products, key=lambda p: -p[0].index)
    wanted = ((x1_cos, 0), (x2_sin, 1), (x2_cos, 1), (x1_sin, 0))
    for (component, _), index in wanted:
        if component.index != index or component.order != order:
            raise Declined(f"{top.name}: pairs are rotated in another order than they are joined in")
        if not same_value(component.x, x1_cos[0].x):
            raise Declined(f"{component.x.name}: another tensor than {x1_cos[0].x.name} is rotated with it")
    cos, sin = x1_cos[1], x2_sin[1]
    if not same_value(x2_cos[1], cos) or not same_value(x1_sin[1], sin):
        raise Declined(f"{second.name}: uses cos and sin the other way round than {first.name}")
    x = x1_cos[0].taken_from
    return x, cos, sin, order, shape(x)[-1]


def _match_rotated(top: Node):
    """x * cos + join(-x2, x1) * sin"""
    if not is_call(top, aten.add.Tensor) or top.kwargs:
        return None
    for straight, turned in commuted(top):
        straight, turned = strip_casts(straight), strip_casts(turned)
        if not is_call(straight, aten.mul.Tensor) or not is_call(turned, aten.mul.Tensor):
            continue
        for turned_x, sin in commuted(turned):
            rotation = _rotation(turned_x)
            if rotation is None:
                continue
            x, order = rotation
            for straight_x, cos in commuted(straight):
                if is_tensor(straight_x) and is_tensor(cos) and same_value(strip_casts(straight_x), x):
                    return straight_x, cos, sin, order, shape(x)[-1]
            raise Declined(f"{straight.name}: does not multiply {x.name}, which {turned.name} rotates")
    return None


def _match_complex(top: Node):
    """view_as_real(view_as_complex(pairs of x) * frequencies), where the real part is the first of a pair"""
    if not is_call(top, *VIEWS):
        return None
    turned = strip_casts(top.args[0])
    if not is_call(turned, aten.view_as_real.default) or not _splits_last(turned, top):
        return None
    product = strip(turned.args[0])
    if not is_call(product, aten.mul.Tensor):
        return None
    for factor, frequencies in commuted(product):
        factor = strip(factor)
        if not is_call(factor, aten.view_as_complex.default) or not is_tensor(frequencies):
            continue
        pairs = strip_casts(factor.args[0])
        if not is_call(pairs, *VIEWS) or not _splits_last(pairs, top):
            continue
        x = strip_casts(pairs.args[0])
        if not _splits_last(pairs, x):
            continue
        if value(strip(frequencies)).is_conj():
            raise Declined(f"{frequencies.name}: is the conjugate of a tensor, not a tensor")
        return x, frequencies, frequencies, PAIR, shape(x)[-1]
    return None


def _splits_last(pairs: Node, x: Node) -> bool:
    """`pairs` [..., R, 2] has the elements of x [..., 2 R]."""
    split, whole = shape(pairs), shape(x)
    return len(split) == len(whole) + 1 and same_size(split[-1], 2) and same_shape(split[:-2], whole[:-1])


def _rotation(node) -> tuple[Node, str] | None:
    """(x, order) where node is join(-x2, x1)."""
    joined = _join(strip_casts(node)) if is_tensor(node) else None
    if joined is None:
        return None
    negated, first, order = joined
    negated = strip_casts(negated)
    if not is_call(negated, aten.neg.default):
        return None
    second, first = component_of(negated.args[0]), component_of(first)
    if second is None or first is None or (first.index, second.index) != (0, 1):
        return None
    if first.order != order or second.order != order or not same_value(first.x, second.x):
        return None
    return first.x, order


def _component_product(node) -> tuple[Component, Node] | None:
    """(component, table) where node is their product."""
    node = strip_casts(node)
    if not is_call(node, aten.mul.Tensor):
        return None
    for factor, table in commuted(node):
        component = component_of(factor) if is_tensor(factor) and is_tensor(table) else None
        if component is not None and _is_rotated_operand(component, node):
            return component, table
    return None


def _is_rotated_operand(component: Component, product: Node) -> bool:
    """Tells x from a table: the table of cos is often a `select` of pairs too, but broadcast over the heads."""
    x = shape(component.x)
    return len(x) == 4 and same_shape(x[:3], shape(product)[:3])


def component_of(node: Node) -> Component | None:
    """Which member of the pairs of which tensor a node is."""
    node = strip_casts(node)
    if is_call(node, aten.select.int):
        pairs, dim, index = strip_casts(node.args[0]), node.args[1], node.args[2]
        if (
            not is_call(pairs, *VIEWS)
            or dim_of(pairs, dim) != len(shape(pairs)) - 1
            or not same_size(shape(pairs)[-1], 2)
        ):
            return None
        x = strip_casts(pairs.args[0])
        if len(shape(pairs)) != len(shape(x)) + 1 or not same_shape(shape(pairs)[:-2], shape(x)[:-1]):
            return None
        return Component(x, index % 2, PAIR, pairs.args[0])
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.split.Tensor):
        split = node.args[0]
        x, size = split.args[0], split.args[1]
        if dim_of(x, argument(split, 2, "dim", 0)) != len(shape(x)) - 1 or not same_size(shape(x)[-1], 2 * value(size)):
            return None
        return Component(strip_casts(x), node.args[1], HALF, x)
    if is_call(node, aten.slice.Tensor):
        x = node.args[0]
        last = len(shape(x)) - 1
        if dim_of(x, argument(node, 1, "dim", 0)) != last or not isinstance(shape(x)[-1], int):
            return None
        if argument(node, 4, "step", 1) == 2:
            start = argument(node, 2, "start", 0) or 0
            end = argument(node, 3, "end", None)
            reaches_end = end is None or end >= shape(x)[-1]
            return Component(strip_casts(x), start, PAIR, x) if start in (0, 1) and reaches_end else None
        parts = slice_range(node)
        half = shape(x)[-1] // 2
        if parts is None or shape(x)[-1] % 2:
            return None
        _, _, start, end = parts
        if start == 0 and end == half:
            return Component(strip_casts(x), 0, HALF, x)
        if start == half and end is None:
            return Component(strip_casts(x), 1, HALF, x)
    return None


def _join(top: Node) -> tuple[Node, Node, str] | None:
    """(a, b, order) where the node puts the first members a and the second members b of pairs together."""
    if is_call(top, aten.cat.default) and len(top.args[0]) == 2 and _over_last(top):
        a, b = top.args[0]
        return (a, b, HALF) if same_shape(shape(a), shape(b)) else None
    if is_call(top, *VIEWS):
        stacked = strip_casts(top.args[0])
        if len(shape(stacked)) != len(shape(top)) + 1 or not same_size(shape(stacked)[-1], 2):
            return None
        members = _stacked_last(stacked)
        return (*members, PAIR) if members is not None else None
    return None


def _stacked_last(node: Node) -> tuple[Node, Node] | None:
    """(a, b) where node is torch.stack([a, b], dim=-1)."""
    rank = len(shape(node))
    if is_call(node, aten.stack.default) and len(node.args[0]) == 2:
        dim = argument(node, 1, "dim", 0)
        return tuple(node.args[0]) if dim in (-1, rank - 1) else None
    if is_call(node, aten.cat.default) and len(node.args[0]) == 2 and _over_last(node):
        members = [strip(n) for n in node.args[0]]
        if all(is_call(n, aten.unsqueeze.default) and dim_of(n, n.args[1]) == rank - 1 for n in members):
            return members[0].args[0], members[1].args[0]
    return None


def _over_last(node: Node) -> bool:
    return dim_of(node, argument(node, 1, "dim", 0)) == len(shape(node)) - 1


_POINTWISE_UNARY = (aten.cos.default, aten.sin.default, aten.neg.default)
_POINTWISE_BINARY = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


def repeats(node: Node, depth: int = 24) -> bool:
    """Along the last dimension, the second half holds the values of the first, by construction."""
    if depth == 0 or not is_tensor(node) or not shape(node):
        return False
    node = strip(node)
    if node.op != "call_function":
        return False
    if _repeats_directly(node):
        return True
    last = len(shape(node)) - 1
    source = node.args[0] if node.args else None
    if is_cast(node) or node.target in _POINTWISE_UNARY:
        return repeats(source, depth - 1)
    if node.target in _POINTWISE_BINARY:
        operands = [n for n in node.args[:2] if is_tensor(n) and not is_scalar(n)]
        return bool(operands) and all(
            (same_size(shape(n)[-1], 1) and not same_size(shape(node)[-1], 1)) or repeats(n, depth - 1)
            for n in operands
        )
    if node.target is aten.unsqueeze.default:
        return dim_of(node, node.args[1]) != last and repeats(source, depth - 1)
    if node.target in (aten.slice.Tensor, aten.select.int):
        return dim_of(source, argument(node, 1, "dim", 0)) != len(shape(source)) - 1 and repeats(source, depth - 1)
    if node.target is aten.squeeze.dim:
        return dim_of(source, node.args[1]) != len(shape(source)) - 1 and repeats(source, depth - 1)
    if node.target is aten.expand.default:
        return same_size(shape(source)[-1], shape(node)[-1]) and repeats(source, depth - 1)
    if node.target in VIEWS:
        return same_size(shape(source)[-1], shape(node)[-1]) and repeats(source, depth - 1)
    found = permutation(node)
    if found is not None:
        return found[1][-1] == last and repeats(source, depth - 1)
    if node.target is aten.index.Tensor:
        return len(node.args[1]) < len(shape(source)) and repeats(source, depth - 1)
    return False


def _repeats_directly(node: Node) -> bool:
    """cat([a, a], -1) or repeat."""
    if is_call(node, aten.cat.default) and len(node.args[0]) == 2 and _over_last(node):
        return same_value(*node.args[0])
    if is_call(node, aten.repeat.default):
        return node.args[1][-1] == 2
    if not is_call(node, *VIEWS):
        return False
    wide = strip(node.args[0])  # [..., 2, R], merged
    if len(shape(wide)) != len(shape(node)) + 1 or not same_shape(shape(wide)[:-2], shape(node)[:-1]):
        return False
    if not is_call(wide, aten.expand.default) or not same_size(shape(wide)[-2], 2):
        return False
    source = wide.args[0]
    return len(shape(source)) == len(shape(wide)) and same_size(shape(source)[-2], 1)


def _check_tables(rope: Rope) -> None:
    """cos and sin are alike, shared by the heads, and as long as x."""
    length_dim, head_dim = (2, 1) if rope.dims is None else (1, 2)
    x, cos, sin = value(rope.x), value(rope.cos), value(rope.sin)
    for table, tensor in ((rope.cos, cos), (rope.sin, sin)):
        if tensor.dim() > 4 or tensor.dtype not in (value(rope.x).dtype, torch.float32, torch.complex64):
            raise Declined(f"{table.name}: cos or sin is {tensor.dtype} with {tensor.dim()} dimensions")
        padded = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
        if not same_size(padded[head_dim], 1):
            raise Declined(f"{table.name}: cos or sin of shape {tuple(tensor.shape)} differs between heads")
        if not same_size(padded[length_dim], x.shape[length_dim]):
            raise Declined(
                f"{table.name}: cos or sin of shape {tuple(tensor.shape)} does not have the length of {rope.x.name}"
            )
        if not same_size(padded[0], 1) and not same_size(padded[0], x.shape[0]):
            raise Declined(
                f"{table.name}: cos or sin of shape {tuple(tensor.shape)} does not have the batch of {rope.x.name}"
            )
    if cos.dtype != sin.dtype or not same_shape(cos.shape, sin.shape):
        raise Declined(f"{rope.cos.name}: cos is {cos.dtype} {tuple(cos.shape)}, sin is {sin.dtype} {tuple(sin.shape)}")
    if cos.shape[-1] not in (rope.rotary_dim, rope.rotary_dim // 2):
        raise Declined(f"{rope.cos.name}: cos has {cos.shape[-1]} columns for a rotary width of {rope.rotary_dim}")
