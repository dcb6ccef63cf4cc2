"""Filtered distributions written out: softmax with temperature, renormalised probabilities, masked logits.

Shapes: logits or probs `[rows, vocab_size]` (last dim contiguous), arrays `[rows]`, outputs `[rows, vocab_size]`. The
filters mean what they mean in the samplers, so a sampler behind one of these draws from the same distribution as the
sampler that has the filters itself. A row that can't be sampled comes out as NaN.
"""

from __future__ import annotations

import math

import torch

from ._sampling import ALL_FILTERS, RowOp, filters_of, in_order, kept_probs
from ._sampling_samples import row_errors, row_samples
from ._spec import Cost, op


def _row_filter(source: str, *filters: str, masks: bool = False):
    """Register the decorated reference, which gets its arguments as the op does. `masks`: the output is as the input."""

    def decorate(reference):
        row_op = RowOp(reference.__name__, source, filters, draws=False)

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


def _probs(source: str, filters: tuple[str, ...], args: tuple, kwargs: dict) -> torch.Tensor:
    a = RowOp("", source, filters, draws=False).bind(args, kwargs)
    dtype = torch.float64 if a["input"].dtype == torch.float64 else torch.float32
    return kept_probs(a["input"], from_probs=source == "probs", **filters_of(a)).to(dtype)


@_row_filter("logits", "temperature")
def softmax(*args, **kwargs):
    """`softmax(logits / temperature)` in float32; temperature 0 is 1 at the largest logit (lowest id on ties)."""
    return _probs("logits", ("temperature",), args, kwargs)


@_row_filter("logits", *ALL_FILTERS, "temperature")
def top_k_top_p_softmax(*args, **kwargs):
    """The distribution that `top_k_top_p_sampling_from_logits` draws from, float32, 0 where a token is not kept."""
    return _probs("logits", (*ALL_FILTERS, "temperature"), args, kwargs)


@_row_filter("probs", "top_p")
def top_p_renorm_probs(*args, **kwargs):
    """Probabilities with all but the smallest prefix whose mass reaches top_p set to 0, normalised."""
    return _probs("probs", ("top_p",), args, kwargs)


@_row_filter("probs", "top_k")
def top_k_renorm_probs(*args, **kwargs):
    """Probabilities with all but the k largest set to 0, normalised."""
    return _probs("probs", ("top_k",), args, kwargs)


@_row_filter("probs", *ALL_FILTERS)
def top_k_top_p_renorm_probs(*args, **kwargs):
    """The distribution that `top_k_top_p_sampling_from_probs` draws from, 0 where a token is not kept."""
    return _probs("probs", ALL_FILTERS, args, kwargs)


@_row_filter("logits", "top_k", masks=True)
def top_k_mask_logits(*args, **kwargs):
    """Logits with all but the k largest set to -inf, in logits' dtype; a row with NaN is all NaN.

    An infinite logit is a number like any other here: +inf is the largest.
    """
    a = RowOp("", "logits", ("top_k",), draws=False).bind(args, kwargs)
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
