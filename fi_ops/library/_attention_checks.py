"""Argument checks that the attention ops share, for their fakes; `csrc/cpu/attention*.cpp` has the same for the kernels."""

from __future__ import annotations

import torch

from ._checks import (
    all_of,
    any_of,
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    dtype_name,
    shape_of,
)
from ._spec import FLOATS, FP8


def _check_operand(op: str, name: str, t: torch.Tensor, query: torch.Tensor, takes_fp8: bool) -> None:
    """Keys or values: query's dtype or, where the op takes it and query has more, one of 8 bits."""
    check_same_device(op, name, t, "query", query)
    if not takes_fp8 or query.dtype in FP8 or t.dtype not in FP8:
        check_same_dtype(op, name, t, "query", query)
    check_ndim(op, name, t, 4, "[batch, num_kv_heads, kv_len, head_dim]")
    check_last_dim_contiguous(op, name, t)


def check_query_key_value(
    op: str,
    query,
    key,
    value,
    key_name: str = "key",
    value_name: str = "value",
    takes_fp8: bool = False,
    query_dtypes=FLOATS,
) -> None:
    check_dtype(op, "query", query, query_dtypes)
    check_ndim(op, "query", query, 4, "[batch, num_qo_heads, qo_len, head_dim]")
    check_last_dim_contiguous(op, "query", query)
    _check_operand(op, key_name, key, query, takes_fp8)
    _check_operand(op, value_name, value, query, takes_fp8)
    if takes_fp8:
        check_same_dtype(op, value_name, value, key_name, key)
    batch, num_qo_heads, _, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    check_shape(op, key_name, key, (batch, num_kv_heads, kv_len, head_dim), "[batch, num_kv_heads, kv_len, head_dim]")
    check_shape(
        op,
        value_name,
        value,
        (batch, num_kv_heads, kv_len, value.shape[3]),
        "[batch, num_kv_heads, kv_len, head_dim_vo]",
    )
    check(
        op,
        num_qo_heads % num_kv_heads == 0 if num_kv_heads else num_qo_heads == 0,
        lambda: (
            f"query must have a multiple of {key_name}'s {num_kv_heads} heads, got {num_qo_heads}; "
            f"repeat or drop heads so that they divide"
        ),
    )


def check_mask(op: str, mask, query, kv_len, dtype: torch.dtype | None = None) -> None:
    """`dtype`: of additive masks besides float32; None: query's."""
    if mask is None:
        return
    check_same_device(op, "mask", mask, "query", query)
    check_dtype(op, "mask", mask, tuple(dict.fromkeys((torch.bool, torch.float32, dtype or query.dtype))))
    batch, heads, qo_len, _ = query.shape
    ok = mask.dim() == 4
    if ok:
        sizes = zip(mask.shape, (batch, heads, qo_len, kv_len), strict=True)
        ok = all_of(*(any_of(have == 1, have == want) for have, want in sizes))
    want = f"[batch, num_qo_heads, qo_len, kv_len] = [{batch}, {heads}, {qo_len}, {kv_len}]"
    check(
        op,
        ok,
        lambda: f"mask must broadcast to {want}, got {shape_of(mask)}; check the sizes against the other arguments",
    )


def check_per_head(op: str, name: str, t, query) -> None:
    if t is not None:
        check_same_device(op, name, t, "query", query)
        check_dtype(op, name, t, (torch.float32,))
        check_shape(op, name, t, (query.shape[1],), "[num_qo_heads]")


def check_scale(op: str, name: str, t, query, heads, heads_name: str = "num_kv_heads", head: str = "KV head") -> None:
    """What 8-bit values are to be multiplied by: float32, one or one a head."""
    if t is not None:
        check_same_device(op, name, t, "query", query)
        check_dtype(op, name, t, (torch.float32,))
        ok = t.dim() == 1 and any_of(t.shape[0] == 1, t.shape[0] == heads)
        check(
            op,
            ok,
            lambda: f"{name} must be [1 or {heads_name} {heads}], got {shape_of(t)}; pass one scale, or one a {head}",
        )


def check_numbers(op: str, window_left, scale, logits_soft_cap, suffix: str = "") -> None:
    """`suffix`: of the arguments' names."""
    check(
        op,
        window_left >= -1,
        lambda: f"window_left{suffix} must be -1 (no window) or more, got {window_left}; pass -1 for none",
    )
    check(
        op,
        scale is None or scale == scale,
        lambda: f"scale{suffix} must be a number, got nan; leave it out for 1/sqrt(head_dim)",
    )
    check(
        op,
        logits_soft_cap >= 0,
        lambda: f"logits_soft_cap{suffix} must be 0 (none) or more, got {number(logits_soft_cap)}; pass 0 for none",
    )


def number(value: float) -> str:
    """A float as C++ streams print it (`%g`), so that both sides say the same."""
    return f"{value:g}"


def output_dtype(query: torch.Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """What attention of `query` returns."""
    return query.dtype if query.dtype not in FP8 else out_dtype or torch.bfloat16


def _check_8_bits(op: str, scales: str, given: bool, name: str, t: torch.Tensor) -> None:
    check(
        op,
        not given or t.dtype in FP8,
        lambda: (
            f"{scales} must be left out where {name} is not of 8 bits, got {name} in {dtype_name(t.dtype)}; fold them into "
            f"scale and the output"
        ),
    )


def check_query_options(op: str, query, q_scale, out_dtype) -> None:
    """The scale of 8-bit queries `[batch or tokens, num_qo_heads, ...]`, and the dtype that their output has."""
    check_scale(op, "q_scale", q_scale, query, query.shape[1], "num_qo_heads", "head")
    _check_8_bits(op, "q_scale", q_scale is not None, "query", query)
    if query.dtype in FP8:
        check(
            op,
            out_dtype is None or out_dtype in FLOATS,
            lambda: (
                f"out_dtype must be float32, bfloat16 or float16, got {dtype_name(out_dtype)}; leave it out for bfloat16"
            ),
        )
    else:
        check(
            op,
            out_dtype is None or out_dtype == query.dtype,
            lambda: (
                f"out_dtype must be query's dtype {dtype_name(query.dtype)}, got {dtype_name(out_dtype)}; leave it out and "
                f"convert the output"
            ),
        )


def _check_fp8_options(op: str, query, key, q_scale, k_scale, v_scale, out_dtype) -> None:
    """The scales of 8-bit tensors, and the dtype that an output of 8-bit queries has."""
    check_query_options(op, query, q_scale, out_dtype)
    check_scale(op, "k_scale", k_scale, query, key.shape[1])
    check_scale(op, "v_scale", v_scale, query, key.shape[1])
    _check_8_bits(op, "k_scale and v_scale", k_scale is not None or v_scale is not None, "key", key)


def check_attention(
    op, query, key, value, mask, window_left, scale, logits_soft_cap, alibi_slopes, sinks, fp8_options=None
) -> None:
    """fp8_options: `(q_scale, k_scale, v_scale, out_dtype)` of an op that takes them, and 8-bit queries."""
    query_dtypes = FLOATS if fp8_options is None else (*FLOATS, *FP8)
    check_query_key_value(op, query, key, value, takes_fp8=True, query_dtypes=query_dtypes)
    dtype = None
    if fp8_options is not None:
        _check_fp8_options(op, query, key, *fp8_options)
        dtype = output_dtype(query, fp8_options[3])
    check_mask(op, mask, query, key.shape[2], dtype)
    check_per_head(op, "alibi_slopes", alibi_slopes, query)
    check_per_head(op, "sinks", sinks, query)
    check_numbers(op, window_left, scale, logits_soft_cap)


def _check_table(op: str, name: str, t, query, length, pairs: int, want: str) -> None:
    check_same_device(op, name, t, "query", query)
    check_dtype(op, name, t, tuple(dict.fromkeys((torch.float32, query.dtype))))
    check_last_dim_contiguous(op, name, t)
    ok = t.dim() == 3
    if ok:
        batch_ok = any_of(t.shape[0] == 1, t.shape[0] == query.shape[0])
        width_ok = any_of(t.shape[2] == pairs, t.shape[2] == 2 * pairs)
        ok = all_of(batch_ok, t.shape[1] == length, width_ok)
    check(op, ok, lambda: f"{name} must be {want}, got {shape_of(t)}; check rotary_dim and the lengths")


def check_cos_sin(op: str, cos, sin, query, length, rotary_dim: int, length_name: str) -> None:
    """cos and sin `[batch or 1, length, R or 2R]`, float32 or query's dtype."""
    head_dim = query.shape[-1]
    check(
        op,
        all_of(rotary_dim >= 0, rotary_dim <= head_dim, (rotary_dim or head_dim) % 2 == 0),
        lambda: f"rotary_dim must be even and at most head_dim {head_dim}, got {rotary_dim}; pass 0 for the whole head",
    )
    pairs = (rotary_dim or head_dim) // 2
    want = f"[1 or batch, {length_name}, R or 2R] = [1 or {query.shape[0]}, {length}, {pairs} or {2 * pairs}]"
    for name, t in (("cos", cos), ("sin", sin)):
        _check_table(op, name, t, query, length, pairs, want)
    check_same_dtype(op, "sin", sin, "cos", cos)
    check_shape(op, "sin", sin, cos.shape, "cos's shape")


def check_rows_in_table(op: str, qo_len, kv_len, q_offset) -> None:
    """Query i takes row i + q_offset of cos and sin, which have kv_len rows."""
    first = kv_len - qo_len if q_offset is None else q_offset
    check(
        op,
        all_of(first >= 0, first + qo_len <= kv_len),
        lambda: (
            f"q_offset must place the {qo_len} query rows among the {kv_len} rows of cos and sin, got {first}; "
            f"pass longer keys or fewer queries"
        ),
    )


def empty_output(query, head_dim_vo, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    batch, heads, qo_len, _ = query.shape
    dtype = output_dtype(query, out_dtype)
    return torch.empty((batch, qo_len, heads, head_dim_vo), dtype=dtype, device=query.device).transpose(1, 2)


def empty_lse(query) -> torch.Tensor:
    return torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
