"""Attention over SDPA-shaped tensors: plain, with LSE, with RoPE fused in. (`kv_cache.py` has the forms that write a cache.)

Shapes: query `[batch, num_qo_heads, qo_len, head_dim]`, key `[batch, num_kv_heads, kv_len, head_dim]`, value
`[batch, num_kv_heads, kv_len, head_dim_vo]`, any strides with a contiguous last dimension; key and value have query's dtype
or both are float8_e4m3fn or float8_e5m2. The output has query's dtype and shape `[batch, num_qo_heads, qo_len, head_dim_vo]`,
laid out in memory as `[batch, qo_len, num_qo_heads, head_dim_vo]`, which is what a model's transpose + reshape after
attention wants. LSE: float32, base 2, `[batch, num_qo_heads, qo_len]`.

8 bits (not with RoPE): query may have them too, in key's and value's format. `q_scale` (float32, `[1]` or `[num_qo_heads]`),
`k_scale` and `v_scale` (`[1]` or `[num_kv_heads]`) are what the stored values are to be multiplied by; only tensors of 8 bits
have one, and the products may be rounded to the output's dtype. That is `out_dtype`, bfloat16 by default, for 8-bit queries.
Their weights may be rounded to float8_e4m3fn before they meet the values, as tensor cores take both in 8 bits; the sum that
divides is that of the weights as they were.

Query row i stands at position `i + q_offset` among the keys; `q_offset=None` is `kv_len - qo_len` (bottom-right, FlashInfer's
meaning), torch's `is_causal` is `q_offset=0`. mask: bool (True = attend) or additive float, broadcast to
`[batch, num_qo_heads, qo_len, kv_len]`; it combines with causal and window. Logits are
`soft_cap(q . k * scale) + alibi_slope * (j - position) + mask`. A row with nothing to attend to: output 0, LSE -inf.
Sources: FlashAttention-2 (online softmax), Flash-Decoding (split KV), FlashInfer (`single_prefill_with_kv_cache`).
"""

from __future__ import annotations

from typing import Any

import torch

from ._attention_checks import (
    check_attention,
    check_cos_sin,
    check_rows_in_table,
    empty_lse,
    empty_output,
    output_dtype,
)
from ._attention_samples import attention_errors, attention_samples, rope_attention_errors, rope_attention_samples
from ._reference import attend, dequantised, rotate
from ._spec import FP8, Cost, op

_TAIL = (
    "bool causal=False, SymInt? q_offset=None, int window_left=-1, float? scale=None, float logits_soft_cap=0.0, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None)"
)
_FP8 = "Tensor? q_scale=None, Tensor? k_scale=None, Tensor? v_scale=None, ScalarType? out_dtype=None"
_PLAIN = f"(Tensor query, Tensor key, Tensor value, Tensor? mask=None, *, {_TAIL.removesuffix(')')}, {_FP8})"
_ROPE = (
    "(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor? mask=None, *, bool interleaved=False, "
    f"int rotary_dim=0, {_TAIL}"
)


def attention_cost(query, key, value, *, causal=False, out_dtype=None, **_) -> Cost:
    """Bytes: q, k, v once and the output. Flops: two GEMMs over the pairs that `causal` keeps (masks are not counted)."""
    batch, heads, qo_len, head_dim = query.shape
    kv_len, head_dim_vo = key.shape[2], value.shape[3]
    pairs = qo_len * kv_len - (qo_len * (qo_len - 1) // 2 if causal else 0)
    output = batch * heads * qo_len * head_dim_vo * output_dtype(query, out_dtype).itemsize
    return Cost(
        bytes=query.nbytes + key.nbytes + value.nbytes + output,
        flops=2 * batch * heads * pairs * (head_dim + head_dim_vo),
    )


def _plain_cost(query, key, value, mask=None, **options):
    return attention_cost(query, key, value, **options)


def _rope_cost(query, key, value, cos, sin, mask=None, **options):
    return attention_cost(query, key, value, **options)


def row_positions(query, key, q_offset) -> torch.Tensor:
    offset = key.shape[2] - query.shape[2] if q_offset is None else q_offset
    return torch.arange(query.shape[2], device=query.device)[None] + offset


def _outputs(query, head_dim_vo, with_lse: bool, out_dtype=None):
    output = empty_output(query, head_dim_vo, out_dtype)
    return (output, empty_lse(query)) if with_lse else output


def _plain_fake(name: str, with_lse: bool):
    def fake(
        query, key, value, mask=None, *, causal=False, q_offset=None, window_left=-1, scale=None, logits_soft_cap=0.0,
        alibi_slopes=None, sinks=None, q_scale=None, k_scale=None, v_scale=None, out_dtype=None,
    ):  # fmt: skip
        fp8_options = (q_scale, k_scale, v_scale, out_dtype)
        check_attention(
            name, query, key, value, mask, window_left, scale, logits_soft_cap, alibi_slopes, sinks, fp8_options
        )
        return _outputs(query, value.shape[3], with_lse, out_dtype)

    return fake


def _rope_fake(name: str, with_lse: bool):
    def fake(
        query, key, value, cos, sin, mask=None, *, interleaved=False, rotary_dim=0, causal=False, q_offset=None, window_left=-1,
        scale=None, logits_soft_cap=0.0, alibi_slopes=None, sinks=None,
    ):  # fmt: skip
        check_attention(name, query, key, value, mask, window_left, scale, logits_soft_cap, alibi_slopes, sinks)
        check_cos_sin(name, cos, sin, query, key.shape[2], rotary_dim, "kv_len")
        check_rows_in_table(name, query.shape[2], key.shape[2], q_offset)
        return _outputs(query, value.shape[3], with_lse)

    return fake


_PLAIN_SPEC: dict[str, Any] = dict(samples=attention_samples, errors=attention_errors, cost=_plain_cost)
_ROPE_SPEC: dict[str, Any] = dict(samples=rope_attention_samples, errors=rope_attention_errors, cost=_rope_cost)


@op(f"{_PLAIN} -> Tensor", fake=_plain_fake("attention", False), **_PLAIN_SPEC)
def attention(query, key, value, mask=None, **options):
    """Softmax attention with grouped heads, mask, causal, window, soft cap, ALiBi and sinks (see the module's docstring)."""
    return attention_with_lse(query, key, value, mask, **options)[0]


@op(f"{_PLAIN} -> (Tensor, Tensor)", fake=_plain_fake("attention_with_lse", True), **_PLAIN_SPEC)
def attention_with_lse(
    query, key, value, mask=None, *, causal=False, q_offset=None, window_left=-1, scale=None, logits_soft_cap=0.0,
    alibi_slopes=None, sinks=None, q_scale=None, k_scale=None, v_scale=None, out_dtype=None,
):  # fmt: skip
    """`attention`, and the base-2 log-sum-exp of each row's logits (sinks counted)."""
    positions = row_positions(query, key, q_offset)
    dtype = output_dtype(query, out_dtype)
    q, k, v = (dequantised(t, factor, dtype) for t, factor in ((query, q_scale), (key, k_scale), (value, v_scale)))
    return attend(
        q, k, v, mask, positions, causal, window_left, scale, logits_soft_cap, alibi_slopes, sinks,
        weights_dtype=torch.float8_e4m3fn if query.dtype in FP8 else None,
    )  # fmt: skip


@op(f"{_ROPE} -> Tensor", fake=_rope_fake("rope_attention", False), **_ROPE_SPEC)
def rope_attention(query, key, value, cos, sin, mask=None, **options):
    """`attention` of rotated query and key: key j by row j of `cos`, `sin`, query i by row `i + q_offset`.

    `cos`, `sin` `[1 or batch, kv_len, R or 2R]`, float32 or query's dtype, `2R = rotary_dim` (0: head_dim).
    FlashInfer's `pos_encoding_mode="ROPE_LLAMA"`.
    """
    return rope_attention_with_lse(query, key, value, cos, sin, mask, **options)[0]


@op(f"{_ROPE} -> (Tensor, Tensor)", fake=_rope_fake("rope_attention_with_lse", True), **_ROPE_SPEC)
def rope_attention_with_lse(
    query, key, value, cos, sin, mask=None, *, interleaved=False, rotary_dim=0, q_offset=None, **options
):
    """`rope_attention`, and the base-2 log-sum-exp of each row's logits (sinks counted)."""
    positions = row_positions(query, key, q_offset)
    q = rotate(query, cos[:, positions[0]], sin[:, positions[0]], interleaved, rotary_dim)
    k = rotate(key.to(query.dtype), cos, sin, interleaved, rotary_dim)
    return attention_with_lse(q, k, value, mask, q_offset=q_offset, **options)
