"""What the ops of the sampling family share: the order of tokens, the distribution that filters leave, checks, samples.

A row is a row of logits or of probabilities. Every filter keeps a prefix of it in one fixed order, larger first and lower
id first among equals, so the kept set is always a prefix too. Rows with special values: any NaN, a negative probability,
or nothing but -inf (or 0) can't be sampled; where a row has +inf, those tokens alone share the probability, equally (the
limit of ever larger values). Probabilities need not sum to 1: each row is normalised by its own sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ._checks import check, check_dtype, check_last_dim_contiguous, check_ndim, check_same_device, check_shape
from ._spec import FLOATS, INDEX_TYPES

# ---------------------------------------------------------------------------------------------------- arguments

# What a row may be filtered by, in the order of the schemas. Each has an `_arr [batch]` that overrides its scalar.
_PARAMETERS = {
    "top_k": "Tensor? top_k_arr=None, int top_k=0",
    "top_p": "Tensor? top_p_arr=None, float top_p=1.0",
    "min_p": "Tensor? min_p_arr=None, float min_p=0.0",
    "temperature": "Tensor? temperature_arr=None, float temperature=1.0",
}
ALL_FILTERS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class RowOp:
    """The arguments of an op that filters rows of logits or probabilities, and samples from them where it `draws`."""

    name: str
    source: str
    """"logits" or "probs": the first argument."""
    filters: tuple[str, ...]
    draws: bool

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return FLOATS if self.source == "logits" else (torch.float32,)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the arguments behind the tensors that every such op has."""
        orders = ("top_k_first", "min_p_first") if self.filters[:3] == ALL_FILTERS else ()
        ties = ("top_k_ties",) if "top_k" in self.filters else ()
        arrays = tuple(name for f in self.filters for name in (f"{f}_arr", f))
        return (*arrays, *(("indices",) if self.draws else ()), *orders, *ties)

    @property
    def schema(self) -> str:
        parts = [f"Tensor {self.source}", *(["Tensor uniform"] if self.draws else [])]
        parts += [_PARAMETERS[f] for f in self.filters]
        parts += ["Tensor? indices=None"] if self.draws else []
        keywords = ["bool top_k_first=True, bool min_p_first=False"] if "top_k_first" in self.options else []
        keywords += ['str top_k_ties="exact"'] if "top_k_ties" in self.options else []
        parts += ["*", *keywords] if keywords else []
        return f"({', '.join(parts)}) -> " + ("(Tensor, Tensor)" if self.draws else "Tensor")

    def bind(self, args: tuple, kwargs: dict) -> dict:
        """All that such an op can be given, by name: what this one doesn't have at its default.

        The row is `input`, and `from_probs` says what it is.
        """
        positional = (self.source, *(("uniform",) if self.draws else ()), *self.options)
        bound = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "top_k_ties": "exact"}
        bound |= {f"{f}_arr": None for f in _PARAMETERS}
        bound |= {"uniform": None, "indices": None, "top_k_first": True, "min_p_first": False}
        bound |= dict(zip(positional, args, strict=False)) | kwargs
        bound |= {"input": bound.pop(self.source), "from_probs": self.source == "probs"}
        return bound

    def check(self, args: tuple, kwargs: dict) -> tuple[dict, int]:
        """The arguments by name and the batch; RuntimeError where their metadata or scalars don't fit."""
        name, a = self.name, self.bind(args, kwargs)
        check_rows(name, self.source, a["input"], self.dtypes)
        batch = check_indices(name, a["indices"], self.source, a["input"])
        if self.draws:
            check_uniform(name, a["uniform"], self.source, a["input"], batch)
        for f in _PARAMETERS:
            dtypes = INDEX_TYPES if f == "top_k" else (torch.float32,)
            check_per_row(name, f"{f}_arr", a[f"{f}_arr"], dtypes, self.source, a["input"], batch)
        top_p, min_p, temperature, ties = a["top_p"], a["min_p"], a["temperature"], a["top_k_ties"]
        check(name, top_p >= 0, lambda: f"top_p must be a number >= 0, got {top_p:g}; pass 1 to keep all tokens")
        check(name, 0 <= min_p <= 1, lambda: f"min_p must be in [0, 1], got {min_p:g}; pass 0 to keep all tokens")
        check(
            name,
            temperature >= 0,
            lambda: f"temperature must be a number >= 0, got {temperature:g}; pass 0 for argmax",
        )
        check(
            name,
            ties in ("exact", "threshold"),
            lambda: f"top_k_ties must be 'exact' or 'threshold', got '{ties}'; pass one of the two",
        )
        return a, batch


def check_rows(name: str, arg: str, x: torch.Tensor, dtypes) -> None:
    check_dtype(name, arg, x, dtypes)
    check_ndim(name, arg, x, 2, "[rows, vocab_size]")
    check_last_dim_contiguous(name, arg, x)
    check(name, x.shape[1] > 0, lambda: f"{arg} must have at least one column, got vocab_size 0; pass a row of {arg}")


def check_indices(name: str, indices: torch.Tensor | None, arg: str, x: torch.Tensor):
    """Returns the batch: how many draws there are."""
    if indices is None:
        return x.shape[0]
    check_same_device(name, "indices", indices, arg, x)
    check_dtype(name, "indices", indices, INDEX_TYPES)
    check_ndim(name, "indices", indices, 1, "[batch]")
    return indices.shape[0]


def check_uniform(name: str, uniform: torch.Tensor, arg: str, x: torch.Tensor, batch) -> None:
    check_same_device(name, "uniform", uniform, arg, x)
    check_dtype(name, "uniform", uniform, (torch.float32,))
    shape = (1, batch) if uniform.dim() == 2 else (batch,)
    check_shape(name, "uniform", uniform, shape, "[batch] or [1, batch]")


def check_per_row(name: str, arg: str, t: torch.Tensor | None, dtypes, ref_name: str, ref: torch.Tensor, batch):
    if t is not None:
        check_same_device(name, arg, t, ref_name, ref)
        check_dtype(name, arg, t, dtypes)
        check_shape(name, arg, t, (batch,), "[batch]")


# ---------------------------------------------------------------------------------------------------- references


def in_order(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted, and the ids: NaN first, then larger first, lower id first among equals (-0 is 0)."""
    x = torch.where(x.isnan(), math.nan, x)  # a sort need not put -NaN where it puts NaN
    return torch.sort(x, dim=-1, descending=True, stable=True)


def limit_of_infinite(x: torch.Tensor, from_probs: bool) -> torch.Tensor:
    """Rows with +inf as the limit of ever larger values: only those tokens have a weight."""
    infinite = x == math.inf
    high, low = (1.0, 0.0) if from_probs else (0.0, -math.inf)
    return torch.where(infinite.any(-1, keepdim=True), torch.where(infinite, high, low), x)


def kept_probs(
    x,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    temperature=1.0,
    *,
    from_probs=False,
    top_k_first=True,
    min_p_first=False,
    top_k_ties="exact",
) -> torch.Tensor:
    """The distribution that is sampled from: float64, filtered, normalised; rows that can't be sampled are all NaN.

    x `[batch, vocab_size]`, logits or (`from_probs`) probabilities; each parameter a number or a tensor `[batch]`.
    """
    x = x.double()
    batch, vocab = x.shape

    def column(value) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=x.device).expand(batch)[:, None]

    k, p, m, t = (column(v) for v in (top_k, top_p, min_p, temperature))
    invalid = x.isnan() | (x < 0) if from_probs else x.isnan()
    x = torch.where(invalid.any(-1, keepdim=True), math.nan, x)
    x, ids = in_order(limit_of_infinite(x, from_probs))
    rank = torch.arange(vocab, device=x.device).expand(batch, vocab)
    if from_probs:
        weight = x
    else:
        below = x - x[:, :1]  # -inf - -inf is NaN: those rows can't be sampled, and end as NaN
        weight = torch.where(t > 0, (below / t.clamp_min(1e-300)).exp(), (below == 0).double())
        weight = torch.where(below == -math.inf, 0.0, weight)
    # temperature 0 and top_p 0 are argmax, whatever else is asked for
    k = torch.where((k <= 0) | (k >= vocab), float(vocab), k)
    first_only = (t == 0) | (p == 0)

    in_top_k = rank < k
    if top_k_ties == "threshold":
        in_top_k = x >= x.gather(1, (k.long() - 1).clamp_min(0))
    in_min_p = weight >= m * weight[:, :1]
    everything = torch.ones_like(in_top_k)
    mass = weight * ((in_top_k if top_k_first else everything) & (in_min_p if min_p_first else everything))
    before = mass.cumsum(-1) - mass  # the mass in front of a token: it is kept while that is short of p
    in_top_p = (p >= 1) | (before < p * mass.sum(-1, keepdim=True)) | (rank == 0)
    keep = torch.where(first_only, rank == 0, in_top_k & in_min_p & in_top_p)

    kept = torch.zeros_like(weight).scatter(1, ids, weight * keep)
    return kept / kept.sum(-1, keepdim=True)


def draw(probs: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse CDF in the order of the ids: `(samples int64, valid)` of `probs [batch, vocab_size]`, NaN where invalid."""
    valid = ~probs.isnan().any(-1)
    cdf = probs.cumsum(-1)
    token = (cdf <= uniform.reshape(-1, 1).double() * cdf[:, -1:]).sum(-1)
    last = (probs > 0).long().mul(torch.arange(1, probs.shape[1] + 1, device=probs.device)).amax(-1) - 1
    return torch.where(valid, torch.minimum(token, last), 0), valid


def middle_uniform(probs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Float32 `[batch]` near `wanted`, in the middle of a token's interval: rounding can't change what is drawn."""
    cdf = probs.nan_to_num(0).cumsum(-1)
    token = (cdf <= wanted.double()[:, None] * cdf[:, -1:]).sum(-1, keepdim=True).clamp_max(probs.shape[1] - 1)
    upper = cdf.gather(1, token)
    lower = torch.where(token > 0, cdf.gather(1, (token - 1).clamp_min(0)), 0.0)
    return ((lower + upper) / 2).float().squeeze(1).clamp(0, 1 - 2**-24)


def filters_of(a: dict) -> dict:
    """The parameters of `kept_probs` among the bound arguments of an op (`RowOp.bind`), by name."""
    filters = {f: a[f] if a[f"{f}_arr"] is None else a[f"{f}_arr"] for f in _PARAMETERS}
    return filters | {key: a[key] for key in ("from_probs", "top_k_first", "min_p_first", "top_k_ties")}
