"""Prefill and append attention with FlashInfer's names, arguments and defaults: of one request, here, and of a batch.

Thin: tensors of one request are viewed as `[1, heads, len, head_dim]` and handed to `torch.ops.fi.attention` or `rope_attention`.
"""

from __future__ import annotations

import functools

import torch

from ._alibi import get_alibi_slopes
from ._arguments import require
from ._batch_prefill import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
from .library._spec import FP8

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper",
    "get_alibi_slopes",
    "single_prefill_with_kv_cache",
    "single_prefill_with_kv_cache_return_lse",
]

_POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")
_KV_LAYOUTS = ("NHD", "HND")
_BACKENDS = ("auto", "fa2", "fa3", "cudnn", "trtllm-gen")


def _unpack_mask(function: str, packed: torch.Tensor, qo_len: int, kv_len: int) -> torch.Tensor:
    needed = (qo_len * kv_len + 7) // 8
    require(
        function,
        packed.dtype == torch.uint8 and packed.dim() == 1 and packed.shape[0] >= needed,
        f"packed_custom_mask must be uint8 with at least {needed} bytes (qo_len * kv_len bits), got {packed.dtype} "
        f"{list(packed.shape)}; pack it with packbits(mask.flatten(), bitorder='little')",
    )
    bits = (packed[:needed, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: qo_len * kv_len].view(qo_len, kv_len).bool()


def _per_head(scale: torch.Tensor, num_qo_heads: int) -> torch.Tensor:
    """A scale tensor of one element, or one a KV (or query) head, as `[num_qo_heads or 1, 1]` for `[len, heads, dim]`."""
    flat = scale.reshape(-1).float()
    if flat.shape[0] not in (1, num_qo_heads):
        flat = flat.repeat_interleave(num_qo_heads // flat.shape[0])
    return flat[:, None]


def attend_one_request(
    function: str, q, k, v, *, mask, causal, kv_layout, pos_encoding_mode, sm_scale, window_left, logits_soft_cap, rope_scale,
    rope_theta, q_scale, k_scale, v_scale, return_lse, o_dtype=None,
):  # fmt: skip
    """What decode and prefill share: q `[qo_len, num_qo_heads, head_dim]` -> (output like q, LSE `[qo_len, num_qo_heads]`)."""
    require(
        function,
        kv_layout in _KV_LAYOUTS,
        f"kv_layout must be one of {_KV_LAYOUTS}, got {kv_layout!r}; pass 'NHD' or 'HND'",
    )
    require(
        function,
        pos_encoding_mode in _POS_ENCODING_MODES,
        f"pos_encoding_mode must be one of {_POS_ENCODING_MODES}, got {pos_encoding_mode!r}; rotate q and k beforehand for others",
    )
    for name, t in (("q", q), ("k", k), ("v", v)):
        require(
            function,
            t.dim() == 3,
            f"{name} must have 3 dimensions [len, heads, head_dim], got {list(t.shape)}; see the docstring",
        )
    query = q.transpose(0, 1)[None]
    key, value = (t.transpose(0, 1)[None] if kv_layout == "NHD" else t[None] for t in (k, v))
    qo_len, kv_len, num_qo_heads, head_dim = q.shape[0], key.shape[2], q.shape[1], q.shape[2]

    scale = head_dim**-0.5 if sm_scale is None else sm_scale
    output_scale = None
    fp8_options: dict = {}
    if q.dtype in FP8:
        fp8_options["out_dtype"] = o_dtype
        for name, factor in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
            if isinstance(factor, torch.Tensor):
                fp8_options[name] = factor.flatten().float()
    for name, factor in (("q_scale", q_scale), ("k_scale", k_scale)):
        if name in fp8_options:
            continue
        if isinstance(factor, torch.Tensor):
            query = (query.transpose(1, 2) * _per_head(factor, num_qo_heads)).to(q.dtype).transpose(1, 2)
        elif factor is not None:
            scale = scale * factor
    if v_scale is not None and "v_scale" not in fp8_options:
        output_scale = _per_head(v_scale, num_qo_heads) if isinstance(v_scale, torch.Tensor) else v_scale

    options = {
        "causal": causal and mask is None,
        "window_left": window_left,
        "scale": scale,
        "logits_soft_cap": logits_soft_cap or 0.0,
    }
    if pos_encoding_mode == "ALIBI":
        options["alibi_slopes"] = get_alibi_slopes(num_qo_heads, q.device)
    if pos_encoding_mode == "ROPE_LLAMA":
        require(
            function,
            qo_len <= kv_len,
            f"ROPE_LLAMA needs qo_len <= kv_len (queries are the last tokens), got {qo_len} and {kv_len}; append k and v first",
        )
        positions = torch.arange(kv_len, device=q.device)
        cos, sin = torch.ops.fi.rope_cos_sin(
            positions,
            head_dim,
            rope_scale=1.0 if rope_scale is None else rope_scale,
            rope_theta=1e4 if rope_theta is None else rope_theta,
        )
        inputs: tuple = (query, key, value, cos[None], sin[None], mask)
        op = torch.ops.fi.rope_attention_with_lse if return_lse else torch.ops.fi.rope_attention
    else:
        inputs = (query, key, value, mask)
        op = torch.ops.fi.attention_with_lse if return_lse else torch.ops.fi.attention
    result = op(*inputs, **options, **fp8_options)
    output, lse = result if return_lse else (result, None)
    output = output[0].transpose(0, 1)
    if output_scale is not None:
        output = (output * output_scale).to(output.dtype)
    return output, None if lse is None else lse[0].transpose(0, 1)


def single_prefill_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale_q: float | torch.Tensor | None = None,
    scale_k: float | torch.Tensor | None = None,
    scale_v: float | torch.Tensor | None = None,
    o_dtype: torch.dtype | None = None,
    custom_mask: torch.Tensor | None = None,
    packed_custom_mask: torch.Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Prefill or append attention of one request: its last `qo_len` tokens over its whole KV cache.

    Args:
        q: `[qo_len, num_qo_heads, head_dim]`, float32, bfloat16, float16, float8_e4m3fn or float8_e5m2 (then not with ROPE_LLAMA).
        k: `[kv_len, num_kv_heads, head_dim]` (`kv_layout="NHD"`) or `[num_kv_heads, kv_len, head_dim]` ("HND"), q's dtype.
        v: like k, with its own `head_dim_vo`.
        scale_q, scale_k, scale_v: dequantisation scales, a number or a tensor of one element or one a head; q's and k's
            multiply the logits, v's the output.
        o_dtype: the output's dtype; default q's, bfloat16 where that has 8 bits.
        custom_mask: bool `[qo_len, kv_len]`, True = attend. Replaces `causal`.
        packed_custom_mask: the same as packed little-endian bits, uint8 (`packbits(mask.flatten(), "little")`).
        causal: query i sees key j when `j <= i + kv_len - qo_len` (bottom-right aligned).
        pos_encoding_mode: "NONE", "ROPE_LLAMA" (rotate-half RoPE on q and k in the kernel; queries are the last tokens) or "ALIBI".
        use_fp16_qk_reduction: accepted and without effect: accumulation is always float32.
        sm_scale: default `1 / sqrt(head_dim)`.
        window_left: how far back a query sees, inclusive; -1 is no window.
        logits_soft_cap: `cap * tanh(logits / cap)`; None or 0 is none.
        rope_scale, rope_theta: for ROPE_LLAMA; default 1.0 and 1e4.
        backend: FlashInfer's choices are accepted; there is one implementation a device.
        return_lse: also return the log-sum-exp, base 2.

    Returns:
        `[qo_len, num_qo_heads, head_dim_vo]`, and with `return_lse` float32 `[qo_len, num_qo_heads]`. A query that sees
        nothing gives 0 and -inf.

    Raises:
        RuntimeError: shapes, dtypes, devices or options that don't fit; the message says which.

    Source: FlashInfer `single_prefill_with_kv_cache`; FlashAttention-2.
    """
    name = "single_prefill_with_kv_cache"
    require(name, backend in _BACKENDS, f"backend must be one of {_BACKENDS}, got {backend!r}; leave it at 'auto'")
    kv_len = k.shape[0 if kv_layout == "NHD" else 1]
    mask = custom_mask
    if mask is None and packed_custom_mask is not None:
        mask = _unpack_mask(name, packed_custom_mask, q.shape[0], kv_len)
    if mask is not None:
        shape = [q.shape[0], kv_len]
        require(
            name,
            mask.dtype == torch.bool and list(mask.shape) == shape,
            f"custom_mask must be bool [qo_len, kv_len] = {shape}, got {mask.dtype} {list(mask.shape)}; True means attend",
        )
        mask = mask[None, None]
    output, lse = attend_one_request(
        name, q, k, v, mask=mask, causal=causal, kv_layout=kv_layout, pos_encoding_mode=pos_encoding_mode, sm_scale=sm_scale,
        window_left=window_left, logits_soft_cap=logits_soft_cap, rope_scale=rope_scale, rope_theta=rope_theta, q_scale=scale_q,
        k_scale=scale_k, v_scale=scale_v, return_lse=return_lse, o_dtype=o_dtype,
    )  # fmt: skip
    output = output if o_dtype is None else output.to(o_dtype)
    return output if lse is None else (output, lse)


single_prefill_with_kv_cache_return_lse = functools.partial(single_prefill_with_kv_cache, return_lse=True)
