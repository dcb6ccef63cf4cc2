"""Attention of a ragged batch over a paged cache or ragged keys and values: decode, append and prefill in one op, in any mix.

Request b has the queries `query[qo_indptr[b]:qo_indptr[b + 1]]` of `query [nnz_qo, num_qo_heads, head_dim]`, and they are
the last of its keys: query i stands at position `i + kv_len - qo_len` among them (bottom-right). Its keys are, paged, those
in the pages `kv_indices[kv_indptr[b]:kv_indptr[b + 1]]` of the cache `[num_pages, page_size, num_kv_heads, head_dim]`, all
full but the last, which holds `kv_last_page_len[b]` (1 to page_size; 0 for a request without pages); ragged,
`key[kv_indptr[b]:kv_indptr[b + 1]]`. Caches are known by strides with a contiguous last dimension: HND caches are the view
`cache.transpose(1, 2)`, the parts of one tensor of both `cache[:, 0]` and `cache[:, 1]`. Keys and values have query's
dtype, or both are float8_e4m3fn or float8_e5m2; query may be of these, too, where they are.

Outputs: `[nnz_qo, num_qo_heads, head_dim_vo]` in query's dtype, for 8-bit queries in `out_dtype`, bfloat16 by default, and
LSE, float32, base 2, `[nnz_qo, num_qo_heads]`. A query that sees no key, and tokens of no request (before qo_indptr[0], from
qo_indptr[-1] on: the padding of a captured graph): 0 and -inf.

Logits are `soft_cap(q . k * scale * q_scale * k_scale) + alibi_slope * (j - position)`, the output is `weights @ v * v_scale`.
- k_scale, v_scale: float32, `[1]` or `[num_kv_heads]`.
- q_scale: float32, `[1]` or `[num_qo_heads]`, what 8-bit queries are to be multiplied by; the products may be rounded to
  `out_dtype`. Weights of requests with many such queries may be rounded to float8_e4m3fn before they meet the values, as tensor
  cores take both in 8 bits; the sum that divides is that of the weights as they were.
- custom_mask: uint8, bits, lowest first: of request b `[qo_len, kv_len]` row by row from byte `mask_indptr[b]` on
  (`segment_packbits` makes it of bools); a key takes part where its bit is set, and causal and window allow it.
- cos_sin_cache: float32 `[max_len, rotary_dim]`, cosines of all pairs, then sines: queries and keys are rotated by the row
  of their position; the cache holds keys that are not. A request may have more queries than keys only without any keys.
- plan: from `batch_attention_plan` with these arguments, for a step's many layers; none: made by the op.
- fixed_split_size: keys are split at its multiples alone: a request's result does not depend, bit for bit, on the rest of
  the batch.

Index tensors are int32 or int64, each by itself, with any stride. Values are checked on the CPU always, on CUDA under
FI_OPS_CHECK=1; unchecked, keys that the table places nowhere don't take part, or as zeros (many queries, and latent
attention, on Hopper), and nothing outside the tensors is read.
Sources: PagedAttention (vLLM), FlashInfer's batch wrappers, FlashAttention-2, Stream-K.
"""

from __future__ import annotations

from typing import Any

import torch

from ._attention_checks import output_dtype
from ._batch_checks import check_batch, check_paged, check_ragged
from ._batch_samples import paged_errors, paged_samples, ragged_errors, ragged_samples
from ._plan import request_lengths
from ._reference import attend, dequantised, rotate
from ._spec import FP8, Cost, op

_TAIL = (
    "Tensor? custom_mask=None, Tensor? mask_indptr=None, Tensor? k_scale=None, Tensor? v_scale=None, Tensor? alibi_slopes=None, "
    "Tensor? sinks=None, Tensor? cos_sin_cache=None, Tensor? plan=None, *, bool causal=False, int window_left=-1, "
    "float? scale=None, float logits_soft_cap=0.0, bool interleaved=False, int fixed_split_size=0, "
    "Tensor? q_scale=None, ScalarType? out_dtype=None)"
)
_PAGED = (
    "(Tensor query, Tensor paged_k_cache, Tensor paged_v_cache, Tensor qo_indptr, Tensor kv_indices, Tensor kv_indptr, "
    f"Tensor kv_last_page_len, {_TAIL}"
)
_RAGGED = f"(Tensor query, Tensor key, Tensor value, Tensor qo_indptr, Tensor kv_indptr, {_TAIL}"


def _unpacked(custom_mask, mask_indptr, b: int, qo_len: int, kv_len: int):
    """The bits of request b as `[1, 1, qo_len, kv_len]` bool."""
    if custom_mask is None:
        return None
    bits = custom_mask[int(mask_indptr[b]) :, None] >> torch.arange(8, device=custom_mask.device) & 1
    return bits.flatten()[: qo_len * kv_len].view(1, 1, qo_len, kv_len).bool()


def _heads(scale, like) -> torch.Tensor:
    return scale.to(like.dtype).view(1, -1, 1, 1)


def _attend_request(query, key, value, options, mask):
    """One request, in float32 but for what RoPE rounds: `[qo_len, heads, head_dim]`, keys `[kv_len, kv_heads, ...]`."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (t.to(query.dtype).transpose(0, 1)[None] for t in (query, key, value))
    qo_len, kv_len, table = q.shape[2], k.shape[2], options["cos_sin_cache"]
    positions = torch.arange(qo_len, device=q.device)[None] + kv_len - qo_len
    if table is not None and kv_len > 0:
        pairs = table.shape[1] // 2
        cos, sin = table[None, :, :pairs], table[None, :, pairs:]
        q = rotate(q, cos[:, positions[0]], sin[:, positions[0]], options["interleaved"], 2 * pairs)
        k = rotate(k, cos[:, :kv_len], sin[:, :kv_len], options["interleaved"], 2 * pairs)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if options["k_scale"] is not None:
        k = k * _heads(options["k_scale"], k)
    if options["v_scale"] is not None:
        v = v * _heads(options["v_scale"], v)
    names = ("causal", "window_left", "scale", "logits_soft_cap", "alibi_slopes", "sinks", "weights_dtype")
    output, lse = attend(q, k, v, mask, positions, *(options[name] for name in names))
    return output[0].transpose(0, 1), lse[0].T


def _attend(query, head_dim_vo, requests, keys_of, options):
    options["weights_dtype"] = torch.float8_e4m3fn if query.dtype in FP8 else None
    query = dequantised(query, options["q_scale"], output_dtype(query, options["out_dtype"]))
    output = query.new_zeros(*query.shape[:2], head_dim_vo)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
    if query.dtype == torch.float64:
        lse = lse.double()
    for b, request in enumerate(requests):
        q_begin, qo_len, _, kv_len = request
        mask = _unpacked(options["custom_mask"], options["mask_indptr"], b, qo_len, kv_len)
        rows = slice(q_begin, q_begin + qo_len)
        key, value = keys_of(request)
        output[rows], lse[rows] = _attend_request(query[rows], key, value, options, mask)
    return output, lse


def _outputs(query, head_dim_vo, with_lse: bool, out_dtype):
    output = query.new_empty(query.shape[0], query.shape[1], head_dim_vo, dtype=output_dtype(query, out_dtype))
    return (output, query.new_empty(query.shape[:2], dtype=torch.float32)) if with_lse else output


_DEFAULTS: dict[str, Any] = dict(
    custom_mask=None, mask_indptr=None, k_scale=None, v_scale=None, alibi_slopes=None, sinks=None, cos_sin_cache=None, plan=None,
    causal=False, window_left=-1, scale=None, logits_soft_cap=0.0, interleaved=False, fixed_split_size=0,
    q_scale=None, out_dtype=None,
)  # fmt: skip


def _options(args, kwargs) -> dict:
    """What follows the index tensors, by name."""
    return _DEFAULTS | dict(zip(_DEFAULTS, args, strict=False)) | kwargs


def _paged_fake(name: str, with_lse: bool):
    def fake(query, paged_k_cache, paged_v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, *args, **kwargs):
        options = _options(args, kwargs)
        check_paged(name, query, paged_k_cache, paged_v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len)
        check_batch(name, query, paged_k_cache.shape[2], qo_indptr, options)
        return _outputs(query, paged_v_cache.shape[3], with_lse, options["out_dtype"])

    return fake


def _ragged_fake(name: str, with_lse: bool):
    def fake(query, key, value, qo_indptr, kv_indptr, *args, **kwargs):
        options = _options(args, kwargs)
        check_ragged(name, query, key, value, qo_indptr, kv_indptr)
        check_batch(name, query, key.shape[1], qo_indptr, options)
        return _outputs(query, value.shape[2], with_lse, options["out_dtype"])

    return fake


def query_key_pairs(requests, causal: bool) -> int:
    """How many pairs of a query and a key that it sees a batch has."""
    return sum(q * kv - (q * (q - 1) // 2 if causal and kv >= q else 0) for _, q, _, kv in requests)


def batch_cost(query, key, value, requests, causal: bool, out_dtype: torch.dtype | None = None) -> Cost:
    """Bytes: queries, the requests' keys and values once each, and the output. Flops: as `attention_cost`."""
    heads, head_dim, head_dim_vo = query.shape[1], query.shape[2], value.shape[-1]
    output = query.shape[0] * heads * head_dim_vo * output_dtype(query, out_dtype).itemsize
    keys = sum(kv_len for _, qo_len, _, kv_len in requests if qo_len)
    return Cost(
        bytes=query.nbytes + keys * key.shape[-2] * (head_dim + head_dim_vo) * key.element_size() + output,
        flops=2 * heads * query_key_pairs(requests, causal) * (head_dim + head_dim_vo),
    )


def _paged_cost(query, k_cache, v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, *args, **kwargs):
    requests = request_lengths(qo_indptr, kv_indptr, kv_last_page_len, k_cache.shape[1])
    options = _options(args, kwargs)
    return batch_cost(query, k_cache, v_cache, requests, options["causal"], options["out_dtype"])


def _ragged_cost(query, key, value, qo_indptr, kv_indptr, *args, **kwargs):
    requests = request_lengths(qo_indptr, kv_indptr, None, 1)
    options = _options(args, kwargs)
    return batch_cost(query, key, value, requests, options["causal"], options["out_dtype"])


_PAGED_SPEC: dict[str, Any] = dict(samples=paged_samples, errors=paged_errors, cost=_paged_cost)
_RAGGED_SPEC: dict[str, Any] = dict(samples=ragged_samples, errors=ragged_errors, cost=_ragged_cost)


@op(f"{_PAGED} -> Tensor", fake=_paged_fake("paged_attention", False), **_PAGED_SPEC)
def paged_attention(query, paged_k_cache, paged_v_cache, *args, **kwargs):
    """Attention of a ragged batch over a paged cache: decode, append, prefill or any mix (see the module's docstring)."""
    return paged_attention_with_lse(query, paged_k_cache, paged_v_cache, *args, **kwargs)[0]


@op(f"{_PAGED} -> (Tensor, Tensor)", fake=_paged_fake("paged_attention_with_lse", True), **_PAGED_SPEC)
def paged_attention_with_lse(
    query, paged_k_cache, paged_v_cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, *args, **kwargs
):
    """`paged_attention`, and the base-2 log-sum-exp of each row's logits (sinks counted)."""
    page_size = paged_k_cache.shape[1]

    def keys_of(request):
        _, _, first, kv_len = request
        pages = kv_indices[first : first - (-kv_len // page_size)].long()
        return (t[pages].flatten(0, 1)[:kv_len] for t in (paged_k_cache, paged_v_cache))

    requests = request_lengths(qo_indptr, kv_indptr, kv_last_page_len, page_size)
    return _attend(query, paged_v_cache.shape[3], requests, keys_of, _options(args, kwargs))


@op(f"{_RAGGED} -> Tensor", fake=_ragged_fake("ragged_attention", False), **_RAGGED_SPEC)
def ragged_attention(query, key, value, *args, **kwargs):
    """Attention of a ragged batch over ragged keys `[nnz_kv, num_kv_heads, head_dim]` and values (see the module)."""
    return ragged_attention_with_lse(query, key, value, *args, **kwargs)[0]


@op(f"{_RAGGED} -> (Tensor, Tensor)", fake=_ragged_fake("ragged_attention_with_lse", True), **_RAGGED_SPEC)
def ragged_attention_with_lse(query, key, value, qo_indptr, kv_indptr, *args, **kwargs):
    """`ragged_attention`, and the base-2 log-sum-exp of each row's logits (sinks counted)."""

    def keys_of(request):
        _, _, first, kv_len = request
        return key[first : first + kv_len], value[first : first + kv_len]

    requests = request_lengths(qo_indptr, kv_indptr, None, 1)
    return _attend(query, value.shape[2], requests, keys_of, _options(args, kwargs))
