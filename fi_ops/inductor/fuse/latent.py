"""Attention over keys and values that a layer expands from compressed ones: the layer goes into queries and outputs instead.

    %y = mm(%ckv, permute(%weight)); %out = attention(%q, cat(%y[..., :N], %kpe), %y[..., N:])
->  %a = bmm(%q[..., :N], %weight[:, :N]); %o = fi.mla_paged_attention(%a, %q[..., N:], %ckv, %kpe, ...)
    %out = bmm(%o, permute(%weight[:, N:]))

The layer costs `C * (N + V)` products for each head and token in the cache, each time anew. Absorbed, it costs the same for each
head and query row, and what a row and a key have in common costs `2 C + R` products in place of `N + R + V`. So few rows over
many keys are absorbed, and prompts are not.

A dense cache is a paged one of one page a sequence, whose length is what the masks say. Where they say more (padding, windows), the
op is `fi.attention` with one KV head, over keys that are put together from both parts.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from ..normalize.attention import Attention, check_contiguous_last
from ..normalize.latent import HEADS_FIRST, Columns, Latent, joined_columns
from ..sites import Declined
from ..walk import aten, prims, same_shape, same_size, shape, value
from .emit import Emitter


def check_absorbed(attention: Attention, latent: Latent, query: Node, gone: set[Node]) -> None:
    """The layer is read by this attention alone, and costs less absorbed. `gone`: what goes with the attention."""
    rows, keys, name = shape(query)[2], shape(latent.kpe)[2], latent.expanded.name
    if attention.lse is not None:
        raise Declined(f"{attention.lse.name}: the log-sum-exp is used too")
    if latent.expanded not in gone:
        raise Declined(f"{name}: the expanded keys and values are used elsewhere too")
    for node in (latent.ckv, latent.kpe, latent.weight):
        if value(node).dtype != value(query).dtype or value(node).device != value(query).device:
            raise Declined(f"{node.name}: is {value(node).dtype} on {value(node).device}, unlike the query")
    if not same_size(shape(query)[1], latent.heads):
        raise Declined(f"{name}: expands {latent.heads} heads for {shape(query)[1]} query heads")
    _check_device(query, name)
    if not _is_cheaper(rows, keys, latent):
        raise Declined(f"{name}: {rows} rows over {keys} keys take less time with keys and values expanded")


def _is_cheaper(rows, keys, latent: Latent) -> bool:
    """Fewer products, for each head, even where all slots of the cache are live."""
    if not isinstance(rows, int) or same_size(rows, keys):
        return False
    a_row = latent.rank * (latent.keys.length + latent.values.length)  # as much as it is to expand a key and a value
    a_pair = max(
        0, 2 * latent.rank - latent.keys.length - latent.values.length
    )  # of a row and a key, more than expanded
    if isinstance(keys, int):
        return rows * (a_row + keys * a_pair) <= keys * a_row
    return 2 * rows * a_pair <= a_row


def check_compressed(attention: Attention) -> None:
    """Attention to compressed keys, as the model has it, is what the op computes."""
    query, key, query_pe, key_pe = attention.query, attention.key, attention.query_pe, attention.key_pe
    if attention.soft_cap:
        raise Declined(f"{attention.node.name}: a soft cap on the scores of compressed keys")
    for node in (key, query_pe, key_pe):
        if value(node).dtype != value(query).dtype or value(node).device != value(query).device:
            raise Declined(f"{node.name}: is {value(node).dtype} on {value(node).device}, unlike the query")
    sizes, width = shape(query), shape(query_pe)[3]
    if not same_shape(shape(query_pe), (*sizes[:3], width)):
        raise Declined(f"{query_pe.name}: {shape(query_pe)} does not fit the other part of the query, {sizes}")
    if not same_shape(shape(key_pe), (*shape(key)[:3], width)):
        raise Declined(f"{key_pe.name}: {shape(key_pe)} does not fit the other part of the keys, {shape(key)}")
    for which, node in (("query", query), ("query", query_pe), ("key", key), ("key", key_pe)):
        check_contiguous_last(node.name, which, value(node))
    _check_device(query, query.name)


def _check_device(query: Node, name: str) -> None:
    device = value(query).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        raise Declined(f"{name}: attention to compressed keys is fast on Hopper and CPUs, not on {device}")


def emit_compressed(attention: Attention, q_nope: Node, q_pe: Node, options: dict, emitter: Emitter) -> Node:
    """The result of attention to compressed keys, in the shape of its node; of `q_nope` [B, H, L, C] and `q_pe` [B, H, L, R]."""
    queries = by_row(q_nope, emitter), by_row(q_pe, emitter)
    ckv, kpe = (emitter.call(aten.select.int, key, 1, 0) for key in (attention.key, attention.key_pe))
    rows, heads, width = emitter.size(q_nope, 2), emitter.size(q_nope, 1), emitter.size(q_nope, 3)
    result = emit_paged(*queries, ckv, kpe, rows, options, emitter)
    result = emitter.call(aten.view.default, result, [-1, rows, heads, width])
    dims = [HEADS_FIRST[d] for d in attention.result_dims]
    if dims != [0, 1, 2, 3]:
        result = emitter.call(aten.permute.default, result, dims)
    batch = emitter.size(attention.key, 0)
    has_rows_of_all_heads = same_size(shape(attention.node)[0], value(batch))
    sizes = [batch, -1, width] if has_rows_of_all_heads else [-1, rows, width]
    return emitter.call(aten.reshape.default, result, sizes)


def by_row(node: Node, emitter: Emitter) -> Node:
    """[B * L, H, D] of [B, H, L, D]"""
    by_token = emitter.call(aten.permute.default, node, list(HEADS_FIRST))
    return emitter.call(aten.reshape.default, by_token, [-1, emitter.size(node, 1), emitter.size(node, 3)])


def emit_latent(latent: Latent, query: Node, attend: Callable[[Node, Node], Node], emitter: Emitter) -> Node:
    """[B, H, L, V]: attention of `query` [B, H, L, N + R] with the layer absorbed. `attend` puts the op into the graph, which
    makes [H, B * L, C] of that and of the query's other part, [B, H, L, R]."""
    q_nope, q_pe = (_columns(query, columns, emitter) for columns in (latent.nope, latent.pe))
    weight = _rows_of_weight(latent, latent.keys, emitter)
    result = attend(emitter.call(aten.bmm.default, by_head(q_nope, emitter), weight), q_pe)
    weight = emitter.call(aten.permute.default, _rows_of_weight(latent, latent.values, emitter), [0, 2, 1])
    return _by_sequence(emitter.call(aten.bmm.default, result, weight), query, emitter)


def attend_paged(latent: Latent, q_nope: Node, q_pe: Node, options: dict, emitter: Emitter) -> Node:
    """[H, B * L, C] of q_nope [H, B * L, C] and q_pe [B, H, L, R]"""
    by_token = emitter.call(aten.permute.default, q_nope, [1, 0, 2])
    kpe = emitter.call(aten.select.int, latent.kpe, 1, 0)
    parts = by_token, by_row(q_pe, emitter), _compressed(latent, emitter), kpe
    result = emit_paged(*parts, emitter.size(q_pe, 2), options, emitter)
    return emitter.call(aten.permute.default, result, [1, 0, 2])


def emit_paged(q_nope: Node, q_pe: Node, ckv: Node, kpe: Node, rows, options: dict, emitter: Emitter) -> Node:
    """[B * L, H, C] of q_nope [B * L, H, C], q_pe [B * L, H, R], ckv [B, S, C] and kpe [B, S, R], for L = `rows`. Each sequence has
    one page, of as many slots as the cache has; `options` say how many of them are keys."""
    batch = emitter.size(kpe, 0)
    ends = batch + 1 if isinstance(batch, int) else emitter.shared(operator.add, batch, 1)
    counted = dict(start=0, dtype=torch.int64, device=value(q_pe).device, requires_grad=False)
    arguments = dict(
        options,
        q_nope=q_nope,
        q_pe=q_pe,
        ckv_cache=ckv,
        kpe_cache=kpe,
        qo_indptr=emitter.shared(prims.iota.default, ends, step=rows, **counted),
        kv_indices=emitter.shared(prims.iota.default, batch, step=1, **counted),
        kv_indptr=emitter.shared(prims.iota.default, ends, step=1, **counted),
    )
    return emitter.call_op(torch.ops.fi.mla_paged_attention.default, arguments)


def dense_operands(latent: Latent, q_nope: Node, q_pe: Node, emitter: Emitter) -> dict[str, Node]:
    """One KV head, whose keys are put together from both parts."""
    ckv = emitter.call(aten.unsqueeze.default, _compressed(latent, emitter), 1)
    query = emitter.call(aten.cat.default, [_by_sequence(q_nope, q_pe, emitter), q_pe], -1)
    return dict(query=query, key=emitter.call(aten.cat.default, [ckv, latent.kpe], -1), value=ckv)


def by_head(node: Node, emitter: Emitter) -> Node:
    """[H, B * L, D] of [B, H, L, D]"""
    heads, width = shape(node)[1], shape(node)[3]
    node = emitter.call(aten.permute.default, node, [1, 0, 2, 3])
    return emitter.call(aten.reshape.default, node, [heads, -1, width])


def _by_sequence(node: Node, like: Node, emitter: Emitter) -> Node:
    """[B, H, L, D] of [H, B * L, D]; of as many rows L as `like`."""
    sizes = [shape(node)[0], -1, emitter.size(like, 2), shape(node)[2]]
    return emitter.call(aten.permute.default, emitter.call(aten.view.default, node, sizes), [1, 0, 2, 3])


def _columns(query: Node, columns: Columns, emitter: Emitter) -> Node:
    """Those columns of the query: a part that it was put together from, or a slice."""
    start = 0
    for part in joined_columns(query) or ():
        if start == columns.start and same_size(shape(part)[-1], columns.length):
            return part
        start += shape(part)[-1]
    return emitter.call(aten.slice.Tensor, query, 3, columns.start, columns.start + columns.length)


def _rows_of_weight(latent: Latent, rows: Columns, emitter: Emitter) -> Node:
    """[H, rows, C]"""
    weight = emitter.call(aten.view.default, latent.weight, [latent.heads, latent.width, latent.rank])
    return emitter.call(aten.slice.Tensor, weight, 1, rows.start, rows.start + rows.length)


def _compressed(latent: Latent, emitter: Emitter) -> Node:
    """[B, S, C]"""
    if len(shape(latent.ckv)) == 4:
        return emitter.call(aten.select.int, latent.ckv, 1, 0)
    if len(shape(latent.ckv)) == 3:
        return latent.ckv
    sizes = [*(emitter.size(latent.kpe, dim) for dim in (0, 2)), latent.rank]
    return emitter.call(aten.view.default, latent.ckv, sizes)
