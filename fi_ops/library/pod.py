"""POD-attention: the prefill of one request and the decode of a batch in one op, on CUDA in one launch where that is faster.

Prefill is bound by arithmetic, decode by memory: side by side on the same multiprocessors they take little longer than the
slower of the two. The prefill has keys and values of its own: `query_p [qo_len, num_qo_heads, head_dim]`, `key_p` and `value_p`
`[kv_len, num_kv_heads, head_dim]`, causal_p bottom-right, as in `single_prefill_with_kv_cache`. The decode has one query a request,
`query [batch, num_qo_heads, head_dim]`, over a paged cache as in `paged_attention`. Where the prefill's keys are in that cache too,
`paged_attention` of the mixed batch does both.

Outputs: prefill's output and LSE (float32, base 2, `[qo_len, num_qo_heads]`), decode's output and LSE `[batch, num_qo_heads]`.
Sources: POD-Attention (Kamath et al. 2024), FlashInfer `PODWithPagedKVCacheWrapper`.
"""

from __future__ import annotations

import torch

from ._attention_checks import check_numbers
from ._batch_checks import check_decode, check_prefill
from ._checks import check_same_device, check_same_dtype
from ._plan import request_lengths
from ._pod_samples import pod_errors, pod_samples
from ._spec import Cost, op
from .batch_attention import batch_cost, paged_attention_with_lse, ragged_attention_with_lse

_SCHEMA = (
    "(Tensor query_p, Tensor key_p, Tensor value_p, Tensor query, Tensor paged_k_cache, Tensor paged_v_cache, "
    "Tensor kv_indices, Tensor kv_indptr, Tensor kv_last_page_len, *, bool causal_p=False, int window_left_p=-1, "
    "float? scale_p=None, float logits_soft_cap_p=0.0, int window_left=-1, float? scale=None, float logits_soft_cap=0.0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _fake(
    query_p, key_p, value_p, query, k_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len, *, causal_p=False, window_left_p=-1,
    scale_p=None, logits_soft_cap_p=0.0, window_left=-1, scale=None, logits_soft_cap=0.0,
):  # fmt: skip
    name = "pod_attention"
    check_prefill(name, query_p, key_p, value_p)
    check_same_device(name, "query", query, "query_p", query_p)
    check_same_dtype(name, "query", query, "query_p", query_p)
    check_decode(name, query, k_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len)
    check_numbers(name, window_left_p, scale_p, logits_soft_cap_p, suffix="_p")
    check_numbers(name, window_left, scale, logits_soft_cap)
    outputs = []
    for q, value in ((query_p, value_p), (query, v_cache)):
        outputs += [q.new_empty(*q.shape[:2], value.shape[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)]
    return tuple(outputs)


def _cost(
    query_p, key_p, value_p, query, k_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len, *, causal_p=False, **_
):
    prefill = batch_cost(query_p, key_p, value_p, [(0, query_p.shape[0], 0, key_p.shape[0])], causal_p)
    each = torch.arange(query.shape[0] + 1)
    requests = request_lengths(each, kv_indptr, kv_last_page_len, k_cache.shape[1])
    decode = batch_cost(query, k_cache, v_cache, requests, False)
    return Cost(bytes=prefill.bytes + decode.bytes, flops=prefill.flops + decode.flops)


@op(_SCHEMA, fake=_fake, samples=pod_samples, errors=pod_errors, cost=_cost)
def pod_attention(
    query_p, key_p, value_p, query, paged_k_cache, paged_v_cache, kv_indices, kv_indptr, kv_last_page_len, *, causal_p=False,
    window_left_p=-1, scale_p=None, logits_soft_cap_p=0.0, window_left=-1, scale=None, logits_soft_cap=0.0,
):  # fmt: skip
    """Prefill of one request with its own keys, and decode of a batch over a paged cache, side by side (see the module)."""
    ends = (torch.tensor([0, t.shape[0]]) for t in (query_p, key_p))
    prefill = ragged_attention_with_lse(
        query_p, key_p, value_p, *ends, causal=causal_p, window_left=window_left_p, scale=scale_p,
        logits_soft_cap=logits_soft_cap_p,
    )  # fmt: skip
    each = torch.arange(query.shape[0] + 1)
    decode = paged_attention_with_lse(
        query, paged_k_cache, paged_v_cache, each, kv_indices, kv_indptr, kv_last_page_len, window_left=window_left, scale=scale,
        logits_soft_cap=logits_soft_cap,
    )  # fmt: skip
    return (*prefill, *decode)
