"""Sampling from logits or probabilities: filters and the draw in one op, the random numbers an argument.

Shapes: logits or probs `[rows, vocab_size]` (last dim contiguous), everything per draw `[batch]`; `indices [batch]` maps
a draw to its row (default: draw i uses row i, batch = rows). Every op returns `(samples, valid)`, both `[batch]`: samples
int32 or of indices' dtype; a row that can't be sampled (NaN, a negative probability, no positive one) is id 0 and valid
False. The token is the first kept one, in the order of the ids, whose cumulative weight exceeds `uniform * total`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ._sampling import ALL_FILTERS, RowOp, draw, filters_of, kept_probs
from ._sampling_samples import row_errors, row_samples
from ._spec import Cost, op


def _sampler(source: str, *filters: str):
    """Register the decorated function of the bound arguments (`RowOp.bind`)."""

    def decorate(of_bound: Callable[[dict], tuple[torch.Tensor, torch.Tensor]]):
        row_op = RowOp(of_bound.__name__, source, filters, draws=True)

        @functools.wraps(of_bound)
        def reference(*args, **kwargs):
            return of_bound(row_op.bind(args, kwargs))

        def fake(*args, **kwargs):
            a, batch = row_op.check(args, kwargs)
            dtype = torch.int32 if a["indices"] is None else a["indices"].dtype
            device = a["input"].device
            return (
                torch.empty((batch,), dtype=dtype, device=device),
                torch.empty((batch,), dtype=torch.bool, device=device),
            )

        def cost(x, uniform, *rest, **options):
            """One read of each row; a subtraction, a multiplication, an exponential (8) and a sum for each logit."""
            flops = 11 if source == "logits" else 1
            return Cost(bytes=x.nbytes + 12 * uniform.numel(), flops=flops * uniform.numel() * x.shape[1])

        return op(
            row_op.schema,
            fake=fake,
            samples=row_samples(row_op),
            errors=row_errors(row_op),
            cost=cost,
            dtypes=row_op.dtypes,
            exact=True,
        )(reference)

    return decorate


def _sample(a: dict) -> tuple[torch.Tensor, torch.Tensor]:
    x = a["input"] if a["indices"] is None else a["input"][a["indices"].long()]
    samples, valid = draw(kept_probs(x, **filters_of(a)), a["uniform"])
    return samples.to(torch.int32 if a["indices"] is None else a["indices"].dtype), valid


@_sampler("logits")
def sampling_from_logits(a):
    """Draw one token for each entry of `uniform` from `softmax(logits)`, which is not written out."""
    return _sample(a)


@_sampler("logits", *ALL_FILTERS, "temperature")
def top_k_top_p_sampling_from_logits(a):
    """Draw one token for each entry of `uniform` from `softmax(logits / temperature)`, of the tokens that are kept.

    Filters (an `_arr [batch]` overrides its scalar): top_k keeps the k largest (<= 0 or >= vocab_size: all; ties by
    `top_k_ties`: "exact" keeps k tokens, lowest ids first, "threshold" all that equal the k-th); min_p keeps
    `p >= min_p * max(p)`; top_p keeps the smallest prefix, in descending order, whose mass reaches top_p, at least one
    token. That mass is the whole row's, without what top-k (`top_k_first`) or min-p (`min_p_first`) removed: the order in
    which the filters are applied. temperature 0 and top_p 0 are argmax (lowest id on ties).
    """
    return _sample(a)


@_sampler("probs")
def sampling_from_probs(a):
    """Draw one token for each entry of `uniform` from rows of probabilities (any non-negative weights)."""
    return _sample(a)


@_sampler("probs", "top_p")
def top_p_sampling_from_probs(a):
    """Draw from the smallest prefix, in descending order, whose mass reaches top_p of the row's own sum."""
    return _sample(a)


@_sampler("probs", "top_k")
def top_k_sampling_from_probs(a):
    """Draw from the k largest probabilities (ties at the k-th as in `top_k_top_p_sampling_from_logits`)."""
    return _sample(a)


@_sampler("probs", "min_p")
def min_p_sampling_from_probs(a):
    """Draw from the tokens with `p >= min_p * max(p)`."""
    return _sample(a)


@_sampler("probs", *ALL_FILTERS)
def top_k_top_p_sampling_from_probs(a):
    """Draw from what top-k, min-p and top-p keep, as `top_k_top_p_sampling_from_logits` does."""
    return _sample(a)
