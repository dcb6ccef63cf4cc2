"""Matrix products of a decode step, over `torch.ops.fi`."""

from __future__ import annotations

import torch

__all__ = ["linear"]


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` for few rows: `input @ weight.T + bias`, the weights read once for up to 16 rows.

    Args:
        input: `[..., in_features]`, float32, bfloat16 or float16, with a contiguous last dimension.
        weight: `[out_features, in_features]`, input's dtype, with a contiguous last dimension; rows may be strided.
        bias: `[out_features]`, input's dtype.

    Returns:
        `[..., out_features]`, contiguous, input's dtype: products and sums in float32, rounded once, after the bias.

    Source: `torch.nn.functional.linear`.
    """
    return torch.ops.fi.linear(input, weight, bias)
