"""RMSNorm and LayerNorm with FlashInfer's names, arguments and defaults (`flashinfer.norm`), over `torch.ops.fi`.

All: input float32, bfloat16 or float16 `[..., hidden_size]` with a contiguous last dimension (FlashInfer: two or three dimensions),
statistics in float32, `RuntimeError` for shapes, dtypes, devices or strides that don't fit, and for `enable_pdl=True`.
"""

from __future__ import annotations

import torch

from ._arguments import refuse_pdl, return_in

__all__ = ["fused_add_rmsnorm", "gemma_fused_add_rmsnorm", "gemma_rmsnorm", "layernorm", "rmsnorm"]


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """`input / sqrt(mean(input^2) + eps) * weight` over the last dimension.

    Args:
        input: `[..., hidden_size]`.
        weight: `[hidden_size]`, input's dtype or float32.
        eps: added to the mean of squares.
        out: where to put the result, input's shape and dtype; it may be `input`.
        enable_pdl: None or False; True is refused.

    Returns:
        `[..., hidden_size]`, input's dtype: `out` where given.

    Source: FlashInfer `rmsnorm`.
    """
    refuse_pdl("rmsnorm", enable_pdl)
    return return_in("rmsnorm", out, torch.ops.fi.rmsnorm(input, weight, eps))


def fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """In place: `residual += input`, then `input = rmsnorm(residual)` of the sum before it is rounded.

    Args:
        input: `[..., hidden_size]`, overwritten with the norm.
        residual: input's shape and dtype, overwritten with the sum.
        weight: `[hidden_size]`, input's dtype or float32.
        eps: added to the mean of squares.
        enable_pdl: None or False; True is refused.

    Source: FlashInfer `fused_add_rmsnorm`.
    """
    refuse_pdl("fused_add_rmsnorm", enable_pdl)
    torch.ops.fi.fused_add_rmsnorm(input, residual, weight, eps)


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """`rmsnorm` with `weight + 1`, as Gemma has it; arguments as in `rmsnorm`.

    Source: FlashInfer `gemma_rmsnorm`.
    """
    refuse_pdl("gemma_rmsnorm", enable_pdl)
    return return_in("gemma_rmsnorm", out, torch.ops.fi.gemma_rmsnorm(input, weight, eps))


def gemma_fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """`fused_add_rmsnorm` with `weight + 1`, as Gemma has it; arguments as there.

    Source: FlashInfer `gemma_fused_add_rmsnorm`.
    """
    refuse_pdl("gemma_fused_add_rmsnorm", enable_pdl)
    torch.ops.fi.gemma_fused_add_rmsnorm(input, residual, weight, eps)


def layernorm(input: torch.Tensor, gemma: torch.Tensor, beta: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`(input - mean) / sqrt(var + eps) * gemma + beta` over the last dimension.

    Args:
        input: `[..., hidden_size]`; float32, bfloat16 or float16 (FlashInfer: bfloat16).
        gemma: the weight (FlashInfer's name for it), `[hidden_size]`, input's dtype or float32 (FlashInfer: float32).
        beta: the bias, like `gemma`.
        eps: added to the variance.

    Returns:
        `[..., hidden_size]`, input's dtype.

    Source: FlashInfer `layernorm`.
    """
    return torch.ops.fi.layernorm(input, gemma, beta, eps)
