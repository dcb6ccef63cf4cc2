"""Gated activations with FlashInfer's names, arguments and defaults (`flashinfer.activation`), over `torch.ops.fi`.

All take input `[..., 2 * hidden_size]` (float32, bfloat16 or float16, last dim contiguous, any hidden_size) and return
`act(input[..., :hidden_size]) * input[..., hidden_size:]`, `[..., hidden_size]`, in `out` where given. `RuntimeError` for shapes,
dtypes or strides that don't fit, and for `enable_pdl=True`.
"""

from __future__ import annotations

import torch

from ._arguments import refuse_pdl, return_in

__all__ = ["gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"]


def silu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """`silu(gate) * up` (SwiGLU): see the module. Source: FlashInfer `silu_and_mul`."""
    refuse_pdl("silu_and_mul", enable_pdl)
    return return_in("silu_and_mul", out, torch.ops.fi.silu_and_mul(input))


def gelu_tanh_and_mul(
    input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None
) -> torch.Tensor:
    """`gelu(gate) * up` with gelu's tanh approximation: see the module. Source: FlashInfer `gelu_tanh_and_mul`."""
    refuse_pdl("gelu_tanh_and_mul", enable_pdl)
    return return_in("gelu_tanh_and_mul", out, torch.ops.fi.gelu_tanh_and_mul(input))


def gelu_and_mul(input: torch.Tensor, out: torch.Tensor | None = None, enable_pdl: bool | None = None) -> torch.Tensor:
    """`gelu(gate) * up` with the exact gelu (erf): see the module. Source: FlashInfer `gelu_and_mul`."""
    refuse_pdl("gelu_and_mul", enable_pdl)
    return return_in("gelu_and_mul", out, torch.ops.fi.gelu_and_mul(input))
