"""Static KV caches `[batch, num_kv_heads, max_len, head_dim]`: append, and attention that appends first.

Shapes as in `attention.py`; key and value are the new tokens' (`[batch, num_kv_heads, qo_len, head_dim]`), `positions`
`[qo_len]` or `[batch, qo_len]` (int32 or int64) the cache slots they are written to. k_cache and v_cache are written, nothing
else is. Two tokens of one request must not share a slot. Positions outside the cache are an error before anything is written.
Query row i of a request stands at `query_positions[i]` (shapes and dtypes as `positions`; None: at its own token's slot): causal
sees slots up to there, a window counts back from there, ALiBi measures from there. That may be anywhere, also outside the cache.
Source: FlashInfer's `append_paged_kv_cache` and in-kernel RoPE, for caches without pages.
"""

from __future__ import annotations

import torch

from ._attention_checks import (
    check_cos_sin,
    check_mask,
    check_numbers,
    check_per_head,
    check_query_key_value,
    empty_output,
)
from ._attention_samples import (
    append_attention_errors,
    append_attention_samples,
    append_kv_errors,
    append_kv_samples,
    rope_append_attention_errors,
    rope_append_attention_samples,
)
from ._checks import (
    all_of,
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    shape_of,
)
from ._reference import attend, rotate
from ._spec import FLOATS, INDEX_TYPES, Cost, op
from .attention import attention_cost


def _check_positions(op_name: str, name: str, positions, k_cache, qo_len, meaning: str) -> None:
    check_same_device(op_name, name, positions, "k_cache", k_cache)
    check_dtype(op_name, name, positions, INDEX_TYPES)
    batch = k_cache.shape[0]
    ok = positions.dim() in (1, 2)
    if ok:
        ok = positions.shape[-1] == qo_len
        if positions.dim() == 2:
            ok = all_of(ok, positions.shape[0] == batch)
    check(
        op_name,
        ok,
        lambda: (
            f"{name} must be [qo_len] or [batch, qo_len] = [{qo_len}] or [{batch}, {qo_len}], "
            f"got {shape_of(positions)}; pass {meaning}"
        ),
    )


def _check_new_tokens(op_name: str, k_cache, v_cache, key, value, positions, qo_len) -> None:
    """The new tokens and their slots, against caches that are checked already."""
    batch, num_kv_heads = k_cache.shape[0], k_cache.shape[1]
    for name, t, cache_name, cache in (("key", key, "k_cache", k_cache), ("value", value, "v_cache", v_cache)):
        check_same_device(op_name, name, t, cache_name, cache)
        check_same_dtype(op_name, name, t, cache_name, cache)
        check_shape(
            op_name, name, t, (batch, num_kv_heads, qo_len, cache.shape[3]), "[batch, num_kv_heads, qo_len, head_dim]"
        )
        check_last_dim_contiguous(op_name, name, t)
    _check_positions(op_name, "positions", positions, k_cache, qo_len, "the cache slot of each new token")


def _append_kv_fake(k_cache, v_cache, key, value, positions):
    name = "append_kv"
    check_dtype(name, "k_cache", k_cache, FLOATS)
    check_ndim(name, "k_cache", k_cache, 4, "[batch, num_kv_heads, max_len, head_dim]")
    check_last_dim_contiguous(name, "k_cache", k_cache)
    check_same_device(name, "v_cache", v_cache, "k_cache", k_cache)
    check_same_dtype(name, "v_cache", v_cache, "k_cache", k_cache)
    check_ndim(name, "v_cache", v_cache, 4, "[batch, num_kv_heads, max_len, head_dim]")
    check_last_dim_contiguous(name, "v_cache", v_cache)
    check_shape(
        name, "v_cache", v_cache, (*k_cache.shape[:3], v_cache.shape[3]), "[batch, num_kv_heads, max_len, head_dim_vo]"
    )
    check_ndim(name, "key", key, 4, "[batch, num_kv_heads, qo_len, head_dim]")
    _check_new_tokens(name, k_cache, v_cache, key, value, positions, key.shape[2])


def _check_append_attention(
    name, query, key, value, k_cache, v_cache, positions, mask, window_left, scale, cap, alibi, sinks, query_positions
):
    check_query_key_value(name, query, k_cache, v_cache, "k_cache", "v_cache")
    _check_new_tokens(name, k_cache, v_cache, key, value, positions, query.shape[2])
    if query_positions is not None:
        _check_positions(
            name, "query_positions", query_positions, k_cache, query.shape[2], "the position of each query row"
        )
    check_mask(name, mask, query, k_cache.shape[2])
    check_per_head(name, "alibi_slopes", alibi, query)
    check_per_head(name, "sinks", sinks, query)
    check_numbers(name, window_left, scale, cap)


def _append_attention_fake(
    query, key, value, k_cache, v_cache, positions, mask=None, *, causal=False, window_left=-1, scale=None,
    logits_soft_cap=0.0, alibi_slopes=None, sinks=None, query_positions=None,
):  # fmt: skip
    _check_append_attention(
        "append_attention", query, key, value, k_cache, v_cache, positions, mask, window_left, scale, logits_soft_cap,
        alibi_slopes, sinks, query_positions,
    )  # fmt: skip
    return empty_output(query, value.shape[3])


def _rope_append_attention_fake(
    query, key, value, cos, sin, k_cache, v_cache, positions, mask=None, *, interleaved=False, rotary_dim=0, causal=False,
    window_left=-1, scale=None, logits_soft_cap=0.0, sinks=None, query_positions=None,
):  # fmt: skip
    name = "rope_append_attention"
    _check_append_attention(
        name, query, key, value, k_cache, v_cache, positions, mask, window_left, scale, logits_soft_cap, None, sinks,
        query_positions,
    )  # fmt: skip
    check_cos_sin(name, cos, sin, query, query.shape[2], rotary_dim, "qo_len")
    return empty_output(query, value.shape[3])


def _append_kv_cost(k_cache, v_cache, key, value, positions):
    return Cost(bytes=2 * (key.nbytes + value.nbytes))


def _append_attention_cost(query, key, value, k_cache, v_cache, positions, mask=None, **options):
    return attention_cost(query, k_cache, v_cache)


def _rope_append_attention_cost(query, key, value, cos, sin, k_cache, v_cache, positions, mask=None, **options):
    return attention_cost(query, k_cache, v_cache)


@op(
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor key, Tensor value, Tensor positions) -> ()",
    fake=_append_kv_fake,
    samples=append_kv_samples,
    errors=append_kv_errors,
    cost=_append_kv_cost,
    exact=True,
)
def append_kv(k_cache, v_cache, key, value, positions):
    """Write `key[b, :, i]`, `value[b, :, i]` to slot `positions[b, i]` (or `positions[i]`) of the caches."""
    slots = positions.expand(key.shape[0], -1).long()
    rows = torch.arange(key.shape[0], device=key.device)[:, None]
    k_cache.transpose(1, 2)[rows, slots] = key.transpose(1, 2)
    v_cache.transpose(1, 2)[rows, slots] = value.transpose(1, 2)


@op(
    "(Tensor query, Tensor key, Tensor value, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, Tensor? mask=None, *, "
    "bool causal=False, int window_left=-1, float? scale=None, float logits_soft_cap=0.0, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, Tensor? query_positions=None) -> Tensor",
    fake=_append_attention_fake,
    samples=append_attention_samples,
    errors=append_attention_errors,
    cost=_append_attention_cost,
)
def append_attention(
    query, key, value, k_cache, v_cache, positions, mask=None, *, causal=False, window_left=-1, scale=None,
    logits_soft_cap=0.0, alibi_slopes=None, sinks=None, query_positions=None,
):  # fmt: skip
    """`append_kv`, then `attention` over the whole cache (mask `[.., qo_len, max_len]`), query i at `query_positions[i]`."""
    append_kv(k_cache, v_cache, key, value, positions)
    placed = torch.atleast_2d(positions if query_positions is None else query_positions)
    return attend(
        query, k_cache, v_cache, mask, placed, causal, window_left, scale, logits_soft_cap, alibi_slopes, sinks
    )[0]


@op(
    "(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor positions, Tensor? mask=None, *, bool interleaved=False, int rotary_dim=0, bool causal=False, "
    "int window_left=-1, float? scale=None, float logits_soft_cap=0.0, Tensor? sinks=None, "
    "Tensor? query_positions=None) -> Tensor",
    fake=_rope_append_attention_fake,
    samples=rope_append_attention_samples,
    errors=rope_append_attention_errors,
    cost=_rope_append_attention_cost,
)
def rope_append_attention(
    query, key, value, cos, sin, k_cache, v_cache, positions, mask=None, *, interleaved=False, rotary_dim=0, **options
):
    """RoPE on query and key by `cos`, `sin` `[1 or batch, qo_len, R or 2R]`, then `append_attention` of the rotated."""
    q = rotate(query, cos, sin, interleaved, rotary_dim)
    k = rotate(key, cos, sin, interleaved, rotary_dim)
    return append_attention(q, k, value, k_cache, v_cache, positions, mask, **options)
