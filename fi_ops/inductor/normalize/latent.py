"""Keys and values that a linear layer expands from compressed ones: multi-head latent attention (DeepSeek-V2 and V3).

    y = mm(view(ckv, [B * S, C]), permute(weight, [1, 0]))                           a layer over all that is in the cache
    y = permute(view(y, [B, S, H, N + V]), [0, 2, 1, 3])
    key = cat([y[..., :N], expand(kpe, [B, H, S, R])], -1), value = y[..., N:]

`ckv` [B, S, C] and `kpe` [B, S, R], the keys' rotated part, are the same for all heads. A head's logits are
`q_nope . (W_UK ckv) + q_pe . kpe = (W_UK^T q_nope) . ckv + q_pe . kpe`, and its output is `W_UV` times the weighted sum of ckv; so
nothing needs to be expanded for each token in the cache.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Node

from ..walk import (
    END,
    VIEWS,
    argument,
    aten,
    dim_of,
    is_call,
    permutation,
    same_shape,
    same_size,
    same_value,
    shape,
    slice_range,
    strip,
)
from .linear import match_linear

HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class Columns:
    """`source[..., start : start + length]`"""

    source: Node
    start: int
    length: int


@dataclass(frozen=True)
class Latent:
    """What keys and values are expanded from."""

    ckv: Node
    """[B, 1, S, C], [B, S, C] or [B * S, C]"""
    kpe: Node
    """[B, 1, S, R]"""
    weight: Node
    """[H * (N + V), C]"""
    heads: int
    width: int
    """N + V, the rows of the weight that are a head's."""
    keys: Columns
    """Which of a head's rows make its keys."""
    values: Columns
    """Which make its values."""
    nope: Columns
    """Which columns of the key those are."""
    pe: Columns
    """Which columns of the key are kpe."""
    expanded: Node
    """The layer's result, [B * S, H * (N + V)]."""

    @property
    def rank(self) -> int:
        """C"""
        return shape(self.weight)[1]


def match_latent(key: Node, values: Node) -> Latent | None:
    """What key [B, H, S, N + R] and value [B, H, S, V] are expanded from; None where they are not."""
    parts = joined_columns(key)
    if parts is None or len(parts) != 2 or not isinstance(shape(key)[-1], int):
        return None
    found = [(columns_of(part), _shared_by_heads(part)) for part in parts]
    order = next((i for i in (0, 1) if found[i][0] is not None and found[1 - i][1] is not None), None)
    wanted = columns_of(values)
    if order is None or wanted is None:
        return None
    keys, kpe = found[order][0], found[1 - order][1]
    if not same_value(keys.source, wanted.source):
        return None
    layer = _layer_by_heads(keys.source)
    if layer is None or not isinstance(shape(layer.weight)[1], int):
        return None
    lengths = [shape(part)[-1] for part in parts]
    columns = [Columns(key, sum(lengths[:i]), length) for i, length in enumerate(lengths)]
    heads, width = shape(keys.source)[1], shape(keys.source)[3]
    ckv = _before_merge(layer.input, (shape(key)[0], shape(key)[2]))
    own = columns[order], columns[1 - order]
    return Latent(ckv, kpe, layer.weight, heads, width, keys, wanted, *own, layer.node)


def joined_columns(node: Node) -> list[Node] | None:
    """The tensors that `node` is, side by side in its last dimension: by `cat`, or by copies into slices of an empty tensor."""
    node = strip(node)
    last = len(shape(node)) - 1
    if is_call(node, aten.cat.default):
        return list(node.args[0]) if dim_of(node, argument(node, 1, "dim", 0)) == last else None
    parts: dict[int, tuple[int, Node]] = {}
    width = shape(node)[last]
    while is_call(node, aten.slice_scatter.default):
        base, part = node.args[:2]
        if dim_of(base, argument(node, 2, "dim", 0)) != last or argument(node, 5, "step", 1) != 1:
            return None
        start, end = argument(node, 3, "start", None) or 0, argument(node, 4, "end", None)
        end = width if end is None or end == END else end
        if is_call(part, aten.copy.default):
            place, part = part.args[:2]
            if not same_shape(shape(place), shape(part)):
                return None
        parts[start] = end, part
        node = strip(base)
    at = 0
    for start in sorted(parts):
        end, _ = parts[start]
        if start != at:
            return None
        at = end
    if not parts or not same_size(at, width):
        return None  # what was there before is a part as well
    return [parts[start][1] for start in sorted(parts)]


def columns_of(node: Node) -> Columns | None:
    """Which columns of which tensor a node is, as `split` or a slice takes them."""
    node = strip(node)
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.split_with_sizes.default, aten.split.Tensor):
        split, index = node.args[0], node.args[1]
        source, sizes = split.args[:2]
        if dim_of(source, argument(split, 2, "dim", 0)) != len(shape(source)) - 1:
            return None
        start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
        length = shape(node)[-1]
        return Columns(strip(source), start, length) if isinstance(start, int) and isinstance(length, int) else None
    parts = slice_range(node)
    if parts is None or parts[1] != len(shape(node)) - 1:
        return None
    source, _, start, _ = parts
    length = shape(node)[-1]
    return Columns(strip(source), start, length) if isinstance(start, int) and isinstance(length, int) else None


def _shared_by_heads(node: Node) -> Node | None:
    """x [B, 1, S, R] of which `node` [B, H, S, R] has one for each head."""
    node = strip(node)
    if not is_call(node, aten.expand.default):
        return None
    source = node.args[0]
    before, after = shape(source), shape(node)
    is_shared = len(before) == len(after) == 4 and same_size(before[1], 1)
    return source if is_shared and all(same_size(before[d], after[d]) for d in (0, 2, 3)) else None


def _layer_by_heads(node: Node):
    """The linear layer without a bias whose result [B * S, H * D] `node` [B, H, S, D] is."""
    found = permutation(node)
    if found is None or found[1] != HEADS_FIRST:
        return None
    by_token, sizes = found[0], shape(node)
    if not isinstance(sizes[1], int) or not isinstance(sizes[3], int):
        return None
    product = by_token
    while is_call(product, *VIEWS):
        product = strip(product.args[0])
    layer = match_linear(product)
    if layer is None or layer.bias is not None or not same_size(shape(product)[1], sizes[1] * sizes[3]):
        return None
    return layer


def _before_merge(node: Node, sizes: tuple) -> Node:
    """x [B, 1, S, C] or [B, S, C] that `node` [B * S, C] is a view of; `node` itself where it is of another shape."""
    source = strip(node)
    while is_call(source, *VIEWS):
        source = strip(source.args[0])
        known = shape(source)
        if same_shape(known[:-1], sizes) or same_shape(known[:-1], (sizes[0], 1, sizes[1])):
            return source if same_size(known[-1], shape(node)[-1]) else node
    return node
