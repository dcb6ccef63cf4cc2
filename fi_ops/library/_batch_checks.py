"""Argument checks of attention over a batch, for its fakes; `csrc/binding/batch_attention.h` has the same for the kernels."""

from __future__ import annotations

import torch

from ._attention_checks import check_numbers, check_per_head, check_query_options, check_scale
from ._checks import (
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    shape_of,
)
from ._plan import plan_size
from ._spec import FLOATS, FP8, INDEX_TYPES
from .plan import check_fixed_split, check_lengths


def _check_query(op: str, query, name: str = "query", tokens: str = "nnz_qo", takes_fp8: bool = False) -> None:
    check_dtype(op, name, query, (*FLOATS, *FP8) if takes_fp8 else FLOATS)
    check_ndim(op, name, query, 3, f"[{tokens}, num_qo_heads, head_dim]")
    check_last_dim_contiguous(op, name, query)


def _check_keys(
    op: str, key_name: str, key, value_name: str, value, query, layout: str, query_name: str = "query"
) -> None:
    """Keys and values `[..., num_kv_heads, head_dim]`: two tensors alike, of query's dtype or, where that has more, 8 bits."""
    for name, t in ((key_name, key), (value_name, value)):
        check_same_device(op, name, t, query_name, query)
        if query.dtype in FP8:
            check_same_dtype(op, name, t, query_name, query)
        else:
            check_dtype(op, name, t, (query.dtype, *FP8))
        check_ndim(op, name, t, layout.count(",") + 1, layout)
        check_last_dim_contiguous(op, name, t)
    check_same_dtype(op, value_name, value, key_name, key)
    check_shape(op, key_name, key, (*key.shape[:-1], query.shape[2]), layout)
    want = layout.replace("head_dim", "head_dim_vo")
    check_shape(op, value_name, value, (*key.shape[:-1], value.shape[-1]), want)
    heads, kv_heads = query.shape[1], key.shape[-2]
    check(
        op,
        heads % kv_heads == 0 if kv_heads else heads == 0,
        lambda: (
            f"{query_name} must have a multiple of {key_name}'s {kv_heads} heads, got {heads}; repeat or drop heads so that "
            f"they divide"
        ),
    )


def check_prefill(op: str, query_p, key_p, value_p) -> None:
    """One request with keys and values of its own."""
    _check_query(op, query_p, "query_p", "qo_len")
    _check_keys(op, "key_p", key_p, "value_p", value_p, query_p, "[kv_len, num_kv_heads, head_dim]", "query_p")


def _check_cache(op: str, query, k_cache, v_cache, takes_fp8_query: bool = False) -> None:
    _check_query(op, query, takes_fp8=takes_fp8_query)
    layout = "[num_pages, page_size, num_kv_heads, head_dim]"
    _check_keys(op, "paged_k_cache", k_cache, "paged_v_cache", v_cache, query, layout)
    check(
        op,
        k_cache.shape[1] >= 1,
        lambda: (
            f"paged_k_cache must have pages of at least 1 token, got {shape_of(k_cache)}; allocate it with a page_size"
        ),
    )


def check_indices(op: str, name: str, t, query) -> None:
    check_same_device(op, name, t, "query", query)
    check_dtype(op, name, t, INDEX_TYPES)


def check_paged(op, query, k_cache, v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len) -> None:
    _check_cache(op, query, k_cache, v_cache, takes_fp8_query=True)
    check_same_device(op, "qo_indptr", qo_indptr, "query", query)
    check_lengths(op, qo_indptr, kv_indptr, kv_last_page_len, k_cache.shape[1])
    check_indices(op, "kv_indices", kv_indices, query)
    check_ndim(op, "kv_indices", kv_indices, 1, "[nnz_pages]")


def check_decode(op, query, k_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len) -> None:
    """`check_paged` of one query a request."""
    _check_cache(op, query, k_cache, v_cache)
    batch = query.shape[0]
    check_indices(op, "kv_indices", kv_indices, query)
    check_ndim(op, "kv_indices", kv_indices, 1, "[nnz_pages]")
    check_indices(op, "kv_indptr", kv_indptr, query)
    check_shape(op, "kv_indptr", kv_indptr, (batch + 1,), "[batch + 1]")
    check_indices(op, "kv_last_page_len", kv_last_page_len, query)
    check_shape(op, "kv_last_page_len", kv_last_page_len, (batch,), "[batch]")


def check_ragged(op, query, key, value, qo_indptr, kv_indptr) -> None:
    _check_query(op, query, takes_fp8=True)
    _check_keys(op, "key", key, "value", value, query, "[nnz_kv, num_kv_heads, head_dim]")
    check_same_device(op, "qo_indptr", qo_indptr, "query", query)
    check_lengths(op, qo_indptr, kv_indptr, None, 1)


def _check_custom_mask(op: str, custom_mask, mask_indptr, query, qo_indptr) -> None:
    check(
        op,
        (custom_mask is None) == (mask_indptr is None),
        lambda: "custom_mask and mask_indptr must be given together, got one of them; pass both or none",
    )
    if custom_mask is not None:
        check_same_device(op, "custom_mask", custom_mask, "query", query)
        check_dtype(op, "custom_mask", custom_mask, (torch.uint8,))
        check_ndim(op, "custom_mask", custom_mask, 1, "[bytes]")
        check_last_dim_contiguous(op, "custom_mask", custom_mask)
        check_same_device(op, "mask_indptr", mask_indptr, "query", query)
        check_dtype(op, "mask_indptr", mask_indptr, INDEX_TYPES)
        check_shape(op, "mask_indptr", mask_indptr, tuple(qo_indptr.shape), "[batch + 1]")


def _check_table(op: str, table, query) -> None:
    if table is not None:
        check_same_device(op, "cos_sin_cache", table, "query", query)
        check_dtype(op, "cos_sin_cache", table, (torch.float32,))
        check_ndim(op, "cos_sin_cache", table, 2, "[max_len, rotary_dim]")
        check_last_dim_contiguous(op, "cos_sin_cache", table)
        width, head_dim = table.shape[1], query.shape[2]
        check(
            op,
            2 <= width <= head_dim and width % 2 == 0,
            lambda: (
                f"cos_sin_cache must be [max_len, rotary_dim] with an even rotary_dim, at least 2 and at most head_dim "
                f"{head_dim}, got {shape_of(table)}; check its width"
            ),
        )


def check_plan(op: str, plan, query, group_size, qo_indptr) -> None:
    if plan is not None:
        check_same_device(op, "plan", plan, "query", query)
        check_dtype(op, "plan", plan, (torch.int32,))
        size = plan_size(qo_indptr.shape[0] - 1, query.shape[0], group_size)
        check_shape(op, "plan", plan, (size,), "what batch_attention_plan returns for these sizes")
        check_last_dim_contiguous(op, "plan", plan)


def check_batch(op: str, query, kv_heads, qo_indptr, options) -> None:
    """What paged and ragged attention share."""
    check_query_options(op, query, options["q_scale"], options["out_dtype"])
    _check_custom_mask(op, options["custom_mask"], options["mask_indptr"], query, qo_indptr)
    for name in ("k_scale", "v_scale"):
        check_scale(op, name, options[name], query, kv_heads)
    for name in ("alibi_slopes", "sinks"):
        check_per_head(op, name, options[name], query)
    _check_table(op, options["cos_sin_cache"], query)
    check_plan(op, options["plan"], query, query.shape[1] // kv_heads if kv_heads else 1, qo_indptr)
    check_numbers(op, options["window_left"], options["scale"], options["logits_soft_cap"])
    check_fixed_split(op, options["fixed_split_size"])
