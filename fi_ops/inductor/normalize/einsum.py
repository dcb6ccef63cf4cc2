"""Attention by products whose scores have heads behind the rows, or are a sum over two parts of the keys.

    softmax(einsum("bshd,bthd->bsht", q, k) * scale + mask)                                               scores [B, L, H, S]
    softmax((einsum("bshc,btc->bsht", q_nope, ckv) + einsum("bshr,btr->bsht", q_pe, kpe)) * scale + mask), times ckv

The second is multi-head latent attention over the compressed keys themselves, as in DeepSeek's own inference code: whoever wrote
it has put the layer that expands keys and values into the query and behind the output. All heads share these keys; so the
products have rows of all heads (`einsum`), or keys expanded over the heads (`matmul`).
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.fx import Node

from ..sites import Declined
from ..walk import (
    argument,
    aten,
    is_call,
    is_tensor,
    same_shape,
    same_size,
    same_value,
    shape,
    strip,
    strip_casts,
    value,
)
from .attention import Attention
from .axes import Axes, Axis, axes_before, axes_in, sources
from .eager import check_weights, match_logits, narrow
from .masks import Mask
from .products import Views, result_of
from .softmax import match_softmax

BATCH, HEAD, ROW, KEY, WIDTH = range(5)
"""What a dimension of scores or of an operand is; the first four are the places in scores [B, H, L, S]."""

Roles = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Product:
    """A `bmm` whose result, or left operand, is a view of scores of four dimensions."""

    node: Node
    axes: Axes
    """The scores' axes in [x, y, S]."""


@dataclass(frozen=True)
class Operand:
    """`source.permute(dims)` is [B, H, L or S, D]; None is a dimension of size 1 that is put in."""

    source: Node
    dims: tuple[int | None, ...]

    def tensor(self, views: Views) -> Node:
        return views.arranged(self.source, self.dims)


def match_einsum(node: Node, views: Views) -> Attention | None:
    """The attention that ends in `node`, a `bmm` of softmax weights with the values; None where scores are of another kind."""
    if not is_call(node, aten.bmm.default):
        return None
    chain = sources(node.args[0], strip_casts)
    logits = match_softmax(chain[-1]) if len(shape(chain[-1])) == 4 else None
    axes = axes_in(chain, len(chain) - 1) if logits is not None else None
    if axes is None:
        return None
    is_behind = any(axis.dim == 2 for axis in axes[0])
    try:
        return _match(Product(node, axes), chain[-1], logits, is_behind, views)
    except Declined:
        if is_behind:
            raise
        return None  # `eager.py` says what it is


def _match(last: Product, weights: Node, logits: Node, is_behind: bool, views: Views) -> Attention | None:
    attention = Attention(last.node, last.node, last.node, last.node, spelling="eager")
    scores = match_logits(attention, logits, lambda node: bool(_products(node)))
    products = [last, *_products(scores)]
    if len(products) == 1:
        raise Declined(f"{scores.name}: {scores.target} of scores with heads behind the rows")
    if len(products) == 2 and not is_behind:
        return None  # scores [B, H, L, S], or rows of several heads
    check_weights(last.node)
    dims = _dims(products, attention.masks, shape(weights))
    operands = _match_operands(products, dims, {role: shape(weights)[dim] for role, dim in enumerate(dims)})
    set_operands = _set_operands if len(products) == 2 else _set_two_parts
    set_operands(attention, operands, last, dims, views)
    attention.masks = tuple(_mask_by_heads(mask, dims, views) for mask in attention.masks)
    attention.heads, attention.views = None, tuple(views.made)
    return attention


def _products(scores: Node) -> list[Product]:
    """The product that scores are, or both that they are the sum of."""
    if is_call(scores, aten.add.Tensor) and is_tensor(scores.args[1]) and argument(scores, 2, "alpha", 1) == 1:
        parts = [product for part in scores.args[:2] for product in _products_of(part)]
        return parts if len(parts) == 2 and all(same_shape(shape(p), shape(scores)) for p in scores.args[:2]) else []
    return _products_of(scores)


def _products_of(scores: Node) -> list[Product]:
    chain = sources(scores, strip_casts)
    axes = axes_before(chain) if is_call(chain[-1], aten.bmm.default) and len(shape(chain[0])) == 4 else None
    return [] if axes is None else [Product(chain[-1], axes)]


def _dims(products: list[Product], masks: tuple[Mask, ...], sizes: tuple) -> tuple[int, ...]:
    """The permutation that makes scores [B, H, L, S]."""
    name = products[0].node.name
    by_batch = {axis.dim for product in products for axis in product.axes[0]}
    by_row = {axis.dim for product in products for axis in product.axes[1]}
    for product in products:
        if any(axis.dim != 3 for axis in product.axes[2]) or 3 in by_batch | by_row:
            raise Declined(f"{name}: its product is not over all keys of a row")
    if 0 in by_row or {1, 2} <= by_batch:
        raise Declined(f"{name}: which dimensions of the scores are heads and rows is not clear")
    heads = by_batch - {0}
    if not heads:  # shared keys: what a mask differs over is rows; or else there may be one row
        rows = {d for mask in masks for d in (1, 2) if not same_size(_padded(mask.node)[d], 1)}
        rows = rows or {d for d in (1, 2) if same_size(sizes[d], 1)}
        heads = {1} if rows == {2} else {2}
    (head,) = heads
    return 0, head, 3 - head, 3


def _padded(mask: Node) -> tuple:
    return (1,) * (4 - len(shape(mask))) + shape(mask)


def _mask_by_heads(mask: Mask, dims: tuple[int, ...], views: Views) -> Mask:
    """A mask that broadcasts to scores, as one that broadcasts to [B, H, L, S]."""
    if mask.heads_merged or len(shape(mask.node)) > 4:
        raise Declined(f"{mask.node.name}: a mask of {shape(mask.node)} on scores with heads behind the rows")
    missing = 4 - len(shape(mask.node))
    return replace(mask, node=views.arranged(mask.node, tuple(None if d < missing else d - missing for d in dims)))


def _match_operands(products: list[Product], dims: tuple[int, ...], sizes: dict) -> list[tuple[Operand, Operand]]:
    """(values, values), and (query, key) of each product of scores; before a cast to float32, in which the ops multiply anyway."""
    last = products[0].node
    for through in (narrow, strip):
        found = []
        for product in products:
            batch, rows = (tuple(dims.index(axis.dim) for axis in group) for group in product.axes[:2])
            left, right = product.node.args[0], product.node.args[1]
            if product.node is last:
                values = _operand(right, (batch, (KEY,), (WIDTH,)), sizes, through)
                found.append((values, values))
            else:
                query = _operand(left, (batch, rows, (WIDTH,)), sizes, through)
                found.append((query, _operand(right, (batch, (WIDTH,), (KEY,)), sizes, through)))
        if all(value(operand.source).dtype == value(last).dtype for pair in found for operand in pair):
            break
    return found


def _operand(node: Node, roles: Roles, sizes: dict, through: Callable[[Node], Node]) -> Operand:
    """What an operand [x, y, z] of a product, whose dimensions have these roles, is a view of. `sizes`: of the scores."""
    chain = sources(node, through)
    length = KEY if any(KEY in group for group in roles) else ROW
    for index in reversed(range(len(chain))):
        axes = axes_in(chain, index) if len(shape(chain[index])) in (3, 4) else None
        places = _places(axes, roles, sizes) if axes is not None else None
        if places is None:
            continue
        free = [d for d in range(len(shape(chain[index]))) if d not in places.values()]
        dims = []
        for role in (BATCH, HEAD, length, WIDTH):
            place = places.get(role)
            dims.append(free.pop(0) if place is None and free else place)
        if not free:
            return Operand(chain[index], tuple(dims))
    raise Declined(f"{node.name}: {node.target} is not a view of a tensor that has the dimensions of queries or keys")


def _places(axes: Axes, roles: Roles, sizes: dict) -> dict[int, int | None] | None:
    """Which dimension of a tensor has which role; None for heads that it is expanded over."""
    places: dict[int, int | None] = {}
    for group, wanted in zip(axes, roles, strict=True):
        present: list[Axis] = list(group)
        if len(present) != len(wanted) and not (wanted in ((KEY,), (WIDTH,)) and not present):
            return None
        for role, axis in zip(wanted, present, strict=False):
            is_expanded = axis.dim is None and role != HEAD
            if is_expanded or (role in sizes and not same_size(axis.size, sizes[role])):
                return None
            places[role] = axis.dim
    return places


def _set_operands(
    attention: Attention, operands: list[tuple[Operand, Operand]], last: Product, dims, views: Views
) -> None:
    (values, _), (query, key) = operands
    if [dims.index(axis.dim) for axis in last.axes[0]] == [HEAD, BATCH]:
        raise Declined(f"{last.node.name}: heads are in front of the batch")
    attention.query, attention.key, attention.value = (operand.tensor(views) for operand in (query, key, values))
    attention.node = result_of(last.node, (*shape(attention.query)[:3], shape(attention.value)[3]))


def _set_two_parts(
    attention: Attention, operands: list[tuple[Operand, Operand]], last: Product, dims, views: Views
) -> None:
    """The first part has the keys that are the values as well."""
    (values, _), *parts = operands
    parts.sort(key=lambda part: not _same(part[1], values))
    (query, key), (query_pe, key_pe) = parts
    name = last.node.name
    if not _same(key, values):
        raise Declined(f"{name}: scores are the sum of two products, and values are the keys of neither")
    if any(part.dims[1] is not None and not same_size(shape(part.source)[part.dims[1]], 1) for part in (key, key_pe)):
        raise Declined(f"{name}: scores are the sum of two products, with keys of each head")
    attention.query, attention.key = query.tensor(views), key.tensor(views)
    attention.query_pe, attention.key_pe = query_pe.tensor(views), key_pe.tensor(views)
    attention.value = attention.key
    present = [dims.index(axis.dim) for group in last.axes[:2] for axis in group]
    attention.result_dims = (*(role for role in (BATCH, HEAD, ROW) if role not in present), *present, 3)


def _same(a: Operand, b: Operand) -> bool:
    return a.dims == b.dims and same_value(a.source, b.source)
