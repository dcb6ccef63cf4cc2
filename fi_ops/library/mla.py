"""Multi-head latent attention (DeepSeek-V2 and V3) over a paged cache of compressed keys, with the weights absorbed.

The cache holds, for each token and all heads, `ckv_cache [num_pages, page_size, 512]` (keys and values, compressed) and
`kpe_cache [num_pages, page_size, 64]` (the keys' rotated part); any widths. With W_UK absorbed into the query and W_UV into what
follows, a head's logits are `(q_nope . ckv + q_pe . kpe) * scale` and its output is the weighted sum of ckv: attention with one KV
head whose keys are 576 wide and whose values are the first 512 of them, so that a row of the cache is read once for all heads.

Requests, the page table, index tensors, LSE, empty rows, padding and unchecked tables are as in `paged_attention` (see
`batch_attention.py`): request b has the queries `qo_indptr[b]:qo_indptr[b + 1]`, the last of its keys. Caches are known by strides
with a contiguous last dimension: both may be views of one tensor `[num_pages, page_size, 576]`. They have q_nope's dtype, or
both are float8_e4m3fn or float8_e5m2, with kv_scale (float32 `[1]`) over both. scale is required: the head_dim before absorption is
not known here (DeepSeek-V3: 1 / sqrt(128 + 64), times YaRN's).

There is no plan to pass: the kernels find the schedule themselves, on the device and inside their launch, from these index tensors.

Sources: DeepSeek-V2 (2024), FlashMLA, FlashInfer `BatchMLAPagedAttentionWrapper`.
"""

from __future__ import annotations

from typing import Any

import torch

from ._checks import (
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from ._mla_samples import mla_errors, mla_samples
from ._plan import request_lengths
from ._spec import FLOATS, FP8, INDEX_TYPES, Cost, op
from .batch_attention import paged_attention_with_lse, query_key_pairs
from .plan import check_lengths

_SCHEMA = (
    "(Tensor q_nope, Tensor q_pe, Tensor ckv_cache, Tensor kpe_cache, Tensor qo_indptr, Tensor kv_indices, Tensor kv_indptr, "
    "Tensor kv_last_page_len, float scale, Tensor? kv_scale=None, *, bool causal=False)"
)


def _check_query(name: str, q_nope, q_pe) -> None:
    check_dtype(name, "q_nope", q_nope, FLOATS)
    check_ndim(name, "q_nope", q_nope, 3, "[nnz_qo, num_heads, head_dim_ckv]")
    check_last_dim_contiguous(name, "q_nope", q_nope)
    check_same_device(name, "q_pe", q_pe, "q_nope", q_nope)
    check_same_dtype(name, "q_pe", q_pe, "q_nope", q_nope)
    layout = "[nnz_qo, num_heads, head_dim_kpe]"
    check_ndim(name, "q_pe", q_pe, 3, layout)
    check_shape(name, "q_pe", q_pe, (*q_nope.shape[:2], q_pe.shape[2]), layout)
    check_last_dim_contiguous(name, "q_pe", q_pe)


def _check_caches(name: str, ckv_cache, kpe_cache, q_nope, q_pe) -> None:
    layout = "[num_pages, page_size, head_dim_ckv]"
    check_same_device(name, "ckv_cache", ckv_cache, "q_nope", q_nope)
    check_dtype(name, "ckv_cache", ckv_cache, (q_nope.dtype, *FP8))
    check_ndim(name, "ckv_cache", ckv_cache, 3, layout)
    check_shape(name, "ckv_cache", ckv_cache, (*ckv_cache.shape[:2], q_nope.shape[2]), layout)
    check_last_dim_contiguous(name, "ckv_cache", ckv_cache)
    check_same_device(name, "kpe_cache", kpe_cache, "q_nope", q_nope)
    check_same_dtype(name, "kpe_cache", kpe_cache, "ckv_cache", ckv_cache)
    layout = "[num_pages, page_size, head_dim_kpe]"
    check_shape(name, "kpe_cache", kpe_cache, (*ckv_cache.shape[:2], q_pe.shape[2]), layout)
    check_last_dim_contiguous(name, "kpe_cache", kpe_cache)


def _fake(name: str, with_lse: bool):
    def fake(
        q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, scale, kv_scale=None,
        *, causal=False,
    ):  # fmt: skip
        _check_query(name, q_nope, q_pe)
        _check_caches(name, ckv_cache, kpe_cache, q_nope, q_pe)
        check_same_device(name, "qo_indptr", qo_indptr, "q_nope", q_nope)
        check_lengths(name, qo_indptr, kv_indptr, kv_last_page_len, ckv_cache.shape[1])
        check_same_device(name, "kv_indices", kv_indices, "q_nope", q_nope)
        check_dtype(name, "kv_indices", kv_indices, INDEX_TYPES)
        check_ndim(name, "kv_indices", kv_indices, 1, "[nnz_pages]")
        text = "scale must be a number, got nan; pass 1/sqrt of the head_dim before absorption"
        check(name, scale == scale, lambda: text)
        if kv_scale is not None:
            check_same_device(name, "kv_scale", kv_scale, "q_nope", q_nope)
            check_dtype(name, "kv_scale", kv_scale, (torch.float32,))
            check_shape(name, "kv_scale", kv_scale, (1,), "[1]")
        output = q_nope.new_empty(q_nope.shape)
        return (output, q_nope.new_empty(q_nope.shape[:2], dtype=torch.float32)) if with_lse else output

    return fake


def _cost(
    q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, scale, kv_scale=None,
    *, causal=False,
):  # fmt: skip
    """Bytes: queries, the requests' rows of the cache once each, and the output. Flops: as `attention_cost`."""
    requests = request_lengths(qo_indptr, kv_indptr, kv_last_page_len, ckv_cache.shape[1])
    heads, ckv, kpe = q_nope.shape[1], q_nope.shape[2], q_pe.shape[2]
    keys = sum(kv_len for _, qo_len, _, kv_len in requests if qo_len)
    return Cost(
        bytes=2 * q_nope.nbytes + q_pe.nbytes + keys * (ckv + kpe) * ckv_cache.element_size(),
        flops=2 * heads * query_key_pairs(requests, causal) * (2 * ckv + kpe),
    )


_SPEC: dict[str, Any] = dict(samples=mla_samples, errors=mla_errors, cost=_cost)


@op(f"{_SCHEMA} -> Tensor", fake=_fake("mla_paged_attention", False), **_SPEC)
def mla_paged_attention(q_nope, *args, **kwargs):
    """Latent attention over a paged compressed cache, weights absorbed: `[nnz_qo, num_heads, head_dim_ckv]` (see the module)."""
    return mla_paged_attention_with_lse(q_nope, *args, **kwargs)[0]


@op(f"{_SCHEMA} -> (Tensor, Tensor)", fake=_fake("mla_paged_attention_with_lse", True), **_SPEC)
def mla_paged_attention_with_lse(
    q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, scale, kv_scale=None,
    *, causal=False,
):  # fmt: skip
    """`mla_paged_attention`, and the base-2 log-sum-exp of each row's logits, float32 `[nnz_qo, num_heads]`."""
    ckv, kpe = (t.to(q_nope.dtype).unsqueeze(2) for t in (ckv_cache, kpe_cache))
    return paged_attention_with_lse(
        torch.cat((q_nope, q_pe), -1), torch.cat((ckv, kpe), -1), ckv, qo_indptr, kv_indices, kv_indptr, kv_last_page_len,
        k_scale=kv_scale, v_scale=kv_scale, causal=causal, scale=scale,
    )  # fmt: skip
