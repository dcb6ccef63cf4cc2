"""Decode attention of one request, with FlashInfer's names, arguments and defaults: `single_decode_with_kv_cache`."""

from __future__ import annotations

import torch

from ._arguments import require
from .prefill import attend_one_request

__all__ = ["single_decode_with_kv_cache"]


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token over its request's KV cache; the token stands at position `kv_len - 1`.

    Args:
        q: `[num_qo_heads, head_dim]`, float32, bfloat16 or float16.
        k: `[kv_len, num_kv_heads, head_dim]` (`kv_layout="NHD"`) or `[num_kv_heads, kv_len, head_dim]` ("HND"), q's dtype.
        v: like k, with its own `head_dim_vo`.
        pos_encoding_mode: "NONE", "ROPE_LLAMA" (rotate-half RoPE on q and k in the kernel) or "ALIBI".
        use_tensor_cores: accepted and without effect: the kernel chooses by shape.
        q_scale, k_scale, v_scale: dequantisation scales, a number or a tensor of one element or one a head.
        window_left: how far back the query sees, inclusive; -1 is no window.
        logits_soft_cap: `cap * tanh(logits / cap)`; None or 0 is none.
        sm_scale: default `1 / sqrt(head_dim)`.
        rope_scale, rope_theta: for ROPE_LLAMA; default 1.0 and 1e4.
        return_lse: also return the log-sum-exp, base 2.

    Returns:
        `[num_qo_heads, head_dim_vo]`, and with `return_lse` float32 `[num_qo_heads]`.

    Raises:
        RuntimeError: shapes, dtypes, devices or options that don't fit; the message says which.

    Source: FlashInfer `single_decode_with_kv_cache`; Flash-Decoding (split KV).
    """
    name = "single_decode_with_kv_cache"
    require(
        name,
        q.dim() == 2,
        f"q must be [num_qo_heads, head_dim], got {list(q.shape)}; for more tokens use single_prefill_with_kv_cache",
    )
    output, lse = attend_one_request(
        name, q[None], k, v, mask=None, causal=False, kv_layout=kv_layout, pos_encoding_mode=pos_encoding_mode,
        sm_scale=sm_scale, window_left=window_left, logits_soft_cap=logits_soft_cap, rope_scale=rope_scale, rope_theta=rope_theta,
        q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse,
    )  # fmt: skip
    return output[0] if lse is None else (output[0], lse[0])
