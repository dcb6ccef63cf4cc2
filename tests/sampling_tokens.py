"""The same draws wherever they are made: rows, filters and numbers by name, and how often rounding may change a token.

FI_OPS_CPU_ISA=avx2 python tests/sampling_tokens.py 4000 tokens.pt     # the CPU's tokens, by an instruction set
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import torch

import fi_ops
from fi_ops.library._sampling import kept_probs

SPREADS = (4.0, 1.0, 0.02)  # of the logits of a case's rows


@dataclass(frozen=True)
class Case:
    source: str
    filters: dict = field(default_factory=dict)
    vocab_size: int = 1000
    share: float = 1.0  # of the draws asked for

    @property
    def name(self) -> str:
        filters = ", ".join(f"{k} {v}" for k, v in self.filters.items())
        return f"{self.source}, {self.vocab_size}: {filters or 'no filter'}"

    def rows(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(51)
        logits = torch.randn(len(SPREADS), self.vocab_size, generator=generator) * torch.tensor(SPREADS)[:, None]
        return logits if self.source == "logits" else logits.softmax(-1)

    def tokens(self, draws: int, device: str = "cpu") -> torch.Tensor:
        """`[draws]` int64 on the CPU; draw i is of row i mod 3."""
        op = getattr(torch.ops.fi, f"top_k_top_p_sampling_from_{self.source}")
        indices, uniform = (t.to(device) for t in numbers(draws))
        tokens, valid = op(self.rows().to(device), uniform, indices=indices, **self.filters)
        assert valid.all()
        return tokens.cpu()


ALL = {"top_k": 300, "top_p": 0.9, "min_p": 0.002}
CASES = [
    Case("logits"),
    Case("logits", {"top_k": 50}),
    Case("logits", {"top_k": 700}),
    Case("logits", {"top_p": 0.9}),
    Case("logits", {"min_p": 0.02}),
    Case("logits", {"top_k": 50, "top_p": 0.8}),
    Case("logits", {"top_k": 300, "top_p": 0.6, "top_k_first": False}),
    Case("logits", ALL | {"temperature": 0.7}),
    Case("logits", {}, 128_256, 0.01),
    Case("logits", {"top_p": 0.7}, 128_256, 0.01),
    Case("probs"),
    Case("probs", {"top_k": 50}),
    Case("probs", {"top_p": 0.9}),
    Case("probs", {"min_p": 0.02}),
    Case("probs", ALL),
    Case("probs", {"top_p": 0.9}, 128_256, 0.01),
]


def numbers(draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and uniform number of each draw, both a function of its place alone."""
    return torch.arange(draws) % len(SPREADS), fi_ops.philox_uniform(52, 0, draws)


def draws_of(case: Case, draws: int) -> int:
    return max(300, int(draws * case.share))


@dataclass(frozen=True)
class Boundaries:
    """Float64 truth of a case, and how far two devices' boundaries between tokens can be apart (all `[rows, vocab_size]`).

    docs/kernels/sampling_cuda.md has the argument.
    """

    probs: torch.Tensor
    upper: torch.Tensor
    """Of each token's interval."""
    apart: torch.Tensor
    """At most, of that upper end."""

    def expected(self, rows: torch.Tensor) -> float:
        """How many of these draws' tokens (their rows: int64) differ, at most, in the mean over random numbers."""
        chance = self.apart.where(self.probs > 0, 0.0).sum(-1)
        return float(chance[rows].sum())


def boundaries(case: Case) -> Boundaries:
    """AssertionError where a filter ends so near to a token that rounding could move it: then intervals differ as a whole."""
    filters = case.filters
    probs = kept_probs(case.rows(), from_probs=case.source == "probs", **filters)
    every = {**filters, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    whole = kept_probs(case.rows(), from_probs=case.source == "probs", **every)
    largest = whole.amax(-1, keepdim=True)
    # of a weight, relative: exponentials (2^-22 on CUDA, 2^-23 on the CPU), and its exponent's rounding; of each, absolute:
    # fixed point
    relative = torch.zeros_like(whole)
    if case.source == "logits":
        octaves = (largest / whole.clamp_min(1e-300)).log2()
        relative = 2.0**-22 + 2.0**-23 + octaves * math.log(2) * 2.0**-24
    error = (probs * relative + largest / whole.sum(-1, keepdim=True) * 2.0**-44).where(probs > 0, 0.0)
    upper = probs.cumsum(-1)
    before = error.cumsum(-1)
    apart = (1 - upper).clamp_min(0) * before + upper * (before[:, -1:] - before)

    reach = 2 * error.sum(-1).max().item() + 1e-12
    if filters.get("top_p", 1.0) < 1:
        counted = kept_probs(
            case.rows(),
            from_probs=case.source == "probs",
            **{**filters, "top_p": 1.0, "min_p": 0.0, **({} if filters.get("top_k_first", True) else {"top_k": 0})},
        )
        sums = counted.sort(-1, descending=True).values.cumsum(-1)
        assert (sums - filters["top_p"]).abs().min() > 2 * reach, f"{case.name}: top_p ends at a boundary"
    if filters.get("min_p"):
        weights = (whole / largest).log()
        assert (weights - math.log(filters["min_p"])).abs().min() > 1e-5, f"{case.name}: min_p ends at a boundary"
    return Boundaries(probs, upper, apart)


def differing(case: Case, mine: torch.Tensor, theirs: torch.Tensor) -> tuple[int, float, int]:
    """How many tokens differ, how many may (mean, and what is exceeded once in a million times).

    AssertionError where one is not in the support, or where the number is not at a boundary between the two tokens: then not
    rounding was it.
    """
    truth = boundaries(case)
    rows, uniform = numbers(len(mine))
    for tokens in (mine, theirs):
        assert (truth.probs[rows, tokens] > 0).all(), f"{case.name}: a token outside of the support"
    where = (mine != theirs).nonzero().flatten()
    row, u = rows[where], uniform[where].double()
    low, high = torch.minimum(mine, theirs)[where], torch.maximum(mine, theirs)[where]
    # neighbours: the number is at the upper end of the one's interval and at the lower end of the other's
    reach = truth.apart.amax(-1)[row] + 2.0**-50
    assert ((truth.upper[row, low] - u).abs() <= reach).all(), f"{case.name}: a token changed within its interval"
    assert ((truth.upper[row, high] - truth.probs[row, high] - u).abs() <= reach).all(), (
        f"{case.name}: a token changed to one that is no neighbour"
    )
    mean = truth.expected(rows)
    return len(where), mean, exceeded_once_in_a_million(mean)


def exceeded_once_in_a_million(mean: float) -> int:
    """The number that a Poisson variable of that mean exceeds with a probability below 1e-6."""
    n = torch.arange(int(mean + 10 * mean**0.5) + 20, dtype=torch.float64)
    above = torch.special.gammainc(n + 1, torch.tensor(mean, dtype=torch.float64))
    return int((above >= 1e-6).sum())


def main() -> None:
    draws, path = int(sys.argv[1]), sys.argv[2]
    torch.save({case.name: case.tokens(draws_of(case, draws)) for case in CASES}, path)


if __name__ == "__main__":
    main()
