"""Sites that stock torch runs faster, by measurement: those are left to it.

A row of MEASURED says for which class of sites stock was faster, by how much, on which GPU, and which file under
`bench/results/` shows it; the reason in `explain` is made of that. A row matches on what is known when a graph is compiled:
device, dtype, head_dim, lengths, kind of mask, grade. Where a size is symbolic, only what is proven about it counts, so
that a site of which too little is known is rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..sites import StockIsFaster
from ..walk import at_least, same_size


@dataclass(frozen=True)
class Facts:
    """What is known of an attention site. Sizes may be symbolic."""

    device: str
    capability: tuple[int, int] | None
    """Compute capability of a CUDA device."""
    dtype: torch.dtype
    batch: Any
    qo_len: Any
    kv_len: Any
    head_dim: Any
    head_dim_vo: Any
    mask: str
    """none, bool or additive."""
    causal: bool
    heads: str
    """How the site hands over grouped heads: equal (there are none), grouped (enable_gqa) or repeated (repeat_kv)."""
    spelling: str
    """sdpa, or eager: products and a softmax."""
    grade: str
    """What it would be rewritten to."""
    is_proven: bool = False
    """The op does without a mask, or with a smaller one, where stock torch makes and reads one."""


@dataclass(frozen=True)
class Range:
    """Sizes from `low` to `high`, both included; None is no bound."""

    low: int | None = None
    high: int | None = None

    def holds(self, size: Any) -> bool:
        """`size` is known to be in the range."""
        return (self.low is None or at_least(size, self.low)) and (self.high is None or at_least(self.high, size))

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"= {self.low}" if self.low == self.high else f"{self.low} to {self.high}"
        return f">= {self.low}" if self.high is None else f"<= {self.high}"


@dataclass(frozen=True)
class Measured:
    """Stock was measured faster for this class of sites. None for a condition is "any"."""

    stock: str
    """Which kernel of stock torch: cuDNN, flash, ..."""
    ratio: float
    """Its time goes into ours this many times."""
    gpu: str
    """Where it was measured, as a reader knows it: H100."""
    source: str
    """The file with the numbers, from the repository's root."""

    device: str = "cuda"
    capability: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    head_dims_vo: tuple[int, ...] | None = None
    batch: Range | None = None
    qo_len: Range | None = None
    kv_len: Range | None = None
    same_lengths: bool = False
    """As many queries as keys are asked for."""
    masks: tuple[str, ...] = ("none",)
    causal: bool | None = None
    heads: tuple[str, ...] | None = None
    spellings: tuple[str, ...] = ("sdpa",)
    grades: tuple[str, ...] = ("attention",)

    def holds(self, facts: Facts) -> bool:
        def one_of(allowed: tuple | None, known: Any) -> bool:
            return allowed is None or known in allowed

        def one_size_of(allowed: tuple[int, ...] | None, size: Any) -> bool:
            return allowed is None or any(same_size(size, one) for one in allowed)

        def within(allowed: Range | None, size: Any) -> bool:
            return allowed is None or allowed.holds(size)

        return (
            facts.device == self.device
            and not facts.is_proven  # what was measured is what stock does without that mask
            and (self.capability is None or facts.capability == self.capability)
            and one_of(self.dtypes, facts.dtype)
            and one_size_of(self.head_dims, facts.head_dim)
            and one_size_of(self.head_dims_vo, facts.head_dim_vo)
            and within(self.batch, facts.batch)
            and within(self.qo_len, facts.qo_len)
            and within(self.kv_len, facts.kv_len)
            and (not self.same_lengths or same_size(facts.qo_len, facts.kv_len))
            and facts.mask in self.masks
            and (self.causal is None or facts.causal == self.causal)
            and one_of(self.heads, facts.heads)
            and facts.spelling in self.spellings
            and facts.grade in self.grades
        )

    def conditions(self) -> str:
        """The class of sites in words."""
        words = [str(dtype).removeprefix("torch.") for dtype in self.dtypes or ()]
        for name, sizes in (("head_dim", self.head_dims), ("head_dim_vo", self.head_dims_vo)):
            if sizes is not None:
                words.append(f"{name} {' or '.join(map(str, sizes))}")
        words += [
            f"{field.name} {getattr(self, field.name)}"
            for field in fields(self)
            if isinstance(getattr(self, field.name), Range)
        ]
        if self.same_lengths:
            words.append("qo_len = kv_len")
        words.append(" or ".join("no mask" if mask == "none" else f"{mask} mask" for mask in self.masks))
        if self.causal is not None:
            words.append("causal" if self.causal else "not causal")
        if self.heads is not None:
            words.append(f"{' or '.join(self.heads)} heads")
        return ", ".join(words)

    def reason(self) -> str:
        return (
            f"stock {self.stock} measured {self.ratio:.3g}x faster at {self.conditions()} ({self.gpu}, {self.source})"
        )


_H100_GRID = "bench/results/2026-11-22-nvidia-h100-decline.csv"
"""`python -m bench decline --device cuda`, 112 shapes: stock as torch chooses it was faster by more than 3% at four."""


def _on_h100(ratio: float, **conditions: Any) -> Measured:
    """Short calls of one sequence, whose query heads torch groups by itself."""
    return Measured(
        "cuDNN", ratio, "H100", _H100_GRID, capability=(9, 0), dtypes=(torch.bfloat16,), batch=Range(1, 1),
        kv_len=Range(129, 256), heads=("grouped",), **conditions,
    )  # fmt: skip


MEASURED: tuple[Measured, ...] = (
    _on_h100(1.17, head_dims=(64,), qo_len=Range(1, 1)),
    _on_h100(1.06, head_dims=(64,), qo_len=Range(16, 16)),
    _on_h100(1.15, head_dims=(128,), qo_len=Range(16, 16)),
    _on_h100(1.18, head_dims=(256,), qo_len=Range(16, 16)),
)


def capability_of(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def check_worth(name: str, facts: Callable[[], Facts]) -> None:
    """Refuse the site `name` where a measurement says that stock is faster."""
    if not MEASURED:
        return
    known = facts()
    for row in MEASURED:
        if row.holds(known):
            raise StockIsFaster(f"{name}: {row.reason()}")
