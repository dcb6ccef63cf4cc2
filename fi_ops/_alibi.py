"""ALiBi's slopes."""

from __future__ import annotations

import functools
import math

import torch

from ._arguments import require


@functools.lru_cache(maxsize=64)
def _alibi_slope_values(num_heads: int) -> tuple[float, ...]:
    def powers(n: int) -> list[float]:
        start = 2.0 ** (-8.0 / n)
        return [start ** (i + 1) for i in range(n)]

    closest = 2 ** math.floor(math.log2(num_heads))
    return tuple(powers(closest) + powers(2 * closest)[0::2][: num_heads - closest])


def get_alibi_slopes(num_heads: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The ALiBi slopes of `num_heads` heads, float32 `[num_heads]` (Press et al. 2022, "Train Short, Test Long")."""
    require(
        "get_alibi_slopes",
        num_heads > 0,
        f"num_heads must be positive, got {num_heads}; pass the number of query heads",
    )
    return torch.tensor(_alibi_slope_values(num_heads), dtype=torch.float32, device=device)
