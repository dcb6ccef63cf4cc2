"""Filtered distributions written out: softmax with temperature, renormalised probabilities, masked logits.

Shapes: logits or probs `[rows, vocab_size]` (last dim contiguous), arrays `[rows]`, outputs `[rows, vocab_size]`. The
filters mean what they mean in the samplers, so a sampler behind one of these draws from the same distribution as the
sampler that has the filters itself. A row that can't be sampled comes out as NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from ._sampling import ALL_FILTERS, RowOp, filters_of, in_order, kept_probs
from ._sampling_samples import row_errors, row_samples
from ._spec import Cost, op


def _row_filter(source: str, *filters: str, masks: bool = False):
    """Register the decorated function of the bound arguments (`RowOp.bind`). `masks`: the output is as the input."""

    def decorate(of_bound: Callable[[dict], torch.Tensor]):
        row_op = RowOp(of_bound.__name__, source, filters, draws=False)

        @functools.wraps(of_bound)
        def reference(*args, **kwargs):
            return of_bound(row_op.bind(args, kwargs))

        def fake(*args, **kwargs):
            a, _ = row_op.check(args, kwargs)
            x = a["input"]
            return torch.empty(x.shape, dtype=x.dtype if masks else torch.float32, device=x.device)

        def cost(x, *rest, **options):
            """Each row read once and written once; per logit an exponential (8) and three more operations."""
            flops = 11 if source == "logits" and not masks else 2
            return Cost(bytes=x.nbytes + (x.nbytes if masks else 4 * x.numel()), flops=flops * x.numel())

        return op(
            row_op.schema,
            fake=fake,
            samples=row_samples(row_op),
            errors=row_errors(row_op),
            cost=cost,
            dtypes=row_op.dtypes,
        )(reference)

    return decorate


def _probs(a: dict) -> torch.Tensor:
    dtype = torch.float64 if a["input"].dtype == torch.float64 else torch.float32
    return kept_probs(a["input"], **filters_of(a)).to(dtype)


@_row_filter("logits", "temperature")
def softmax(a):
    """`softmax(logits / temperature)` in float32; temperature 0 is 1 at the largest logit (lowest id on ties)."""
    return _probs(a)


@_row_filter("logits", *ALL_FILTERS, "temperature")
def top_k_top_p_softmax(a):
    """The distribution that `top_k_top_p_sampling_from_logits` draws from, float32, 0 where a token is not kept."""
    return _probs(a)


@_row_filter("probs", "top_p")
def top_p_renorm_probs(a):
    """Probabilities with all but the smallest prefix whose mass reaches top_p set to 0, normalised."""
    return _probs(a)


@_row_filter("probs", "top_k")
def top_k_renorm_probs(a):
    """Probabilities with all but the k largest set to 0, normalised."""
    return _probs(a)


@_row_filter("probs", *ALL_FILTERS)
def top_k_top_p_renorm_probs(a):
    """The distribution that `top_k_top_p_sampling_from_probs` draws from, 0 where a token is not kept."""
    return _probs(a)


@_row_filter("logits", "top_k", masks=True)
def top_k_mask_logits(a):
    """Logits with all but the k largest set to -inf, in logits' dtype; a row with NaN is all NaN.

    An infinite logit is a number like any other here: +inf is the largest.
    """
    x, ids = in_order(a["input"])
    rows, vocab = x.shape
    k = a["top_k"] if a["top_k_arr"] is None else a["top_k_arr"]
    k = torch.as_tensor(k, device=x.device).expand(rows)[:, None]
    k = torch.where((k <= 0) | (k >= vocab), vocab, k).long()
    rank = torch.arange(vocab, device=x.device).expand(rows, vocab)
    keep = rank < k if a["top_k_ties"] == "exact" else x >= x.gather(1, k - 1)
    keep = torch.zeros_like(keep).scatter(1, ids, keep)
    masked = torch.where(keep, a["input"], -math.inf)
    return torch.where(x.isnan().any(-1, keepdim=True), math.nan, masked)
