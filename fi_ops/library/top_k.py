"""The largest values of each row, and log-probabilities of the chosen and of the largest tokens.

Rows `[rows, vocab_size]` (last dim contiguous). One order throughout: NaN first (as torch.topk and torch.sort have it),
then larger first, lower id first among equals.
"""

from __future__ import annotations

import math

import torch

from ._checks import all_of, check
from ._sampling import check_per_row, check_rows, in_order, limit_of_infinite
from ._spec import FLOATS, INDEX_TYPES, Cost, ErrorSample, Sample, op


def _top_k_fake(input, k, *, sorted=True):
    name = "top_k"
    check_rows(name, "input", input, FLOATS)
    vocab = input.shape[1]
    check(name, all_of(k >= 1, k <= vocab), lambda: f"k must be in [1, {vocab}], got {k}; pass at most vocab_size")
    shape = (input.shape[0], k)
    values = torch.empty(shape, dtype=input.dtype, device=input.device)
    return values, torch.empty(shape, dtype=torch.int64, device=input.device)


def _rows(device, dtype):
    """Random, tied and special rows by name."""
    generator = torch.Generator().manual_seed(21)

    def rand(*shape, spread=3.0):
        return (torch.randn(*shape, generator=generator) * spread).to(dtype)

    yield "typical", rand(4, 1000)
    yield "odd", rand(5, 97)
    yield "one column", rand(3, 1)
    yield "long", rand(2, 40_001)
    yield "long, tight", rand(2, 20_000, spread=1e-3) + 8
    yield "strided rows", rand(6, 512)[::2, :300]
    yield "ties", torch.randint(-3, 4, (4, 300), generator=generator).to(dtype)
    yield "long ties", torch.randint(-9, 10, (2, 20_000), generator=generator).to(dtype)
    yield "all equal", torch.full((2, 5001), -2.5).to(dtype)
    special = rand(9, 5500)
    special[0, [17, 3]] = torch.nan
    special[0, 4] = -torch.nan
    special[1] = -torch.inf
    special[2] = torch.nan
    special[3, [5, 70, 71]] = torch.inf
    special[4, 3:] = -torch.inf
    special[5] = torch.where(special[5] > 0, 0.0, -0.0)
    special[6, ::2] = torch.finfo(dtype).max
    special[7] *= 1e-41
    special[8, ::2], special[8, 9] = -torch.inf, torch.inf
    yield "special rows", special
    yield "special short rows", special[:, :60].contiguous()
    yield "no rows", rand(0, 10)


def _top_k_samples(device, dtype):
    for name, x in _rows(device, dtype):
        vocab = x.shape[1]
        for k in dict.fromkeys(min(k, vocab) for k in (20, 1, vocab // 2 + 1, vocab)):
            for options in ({}, {"sorted": False}):
                yield Sample((x, k), options, f"{name}, k {k}").map_tensors(lambda t: t.to(device))


def _top_k_errors(device):
    x = torch.rand(2, 8, device=device)
    yield ErrorSample((x.double(), 2), r"input must be float32, bfloat16 or float16, got float64; convert")
    yield ErrorSample((x[0], 2), r"input must be \[rows, vocab_size\], got \[8\]; reshape it to 2 dimensions")
    yield ErrorSample((x.t(), 2), r"input must have a contiguous last dimension, got strides \[1, 8\]; call")
    yield ErrorSample((x[:, :0], 1), r"input must have at least one column, got vocab_size 0; pass")
    yield ErrorSample((x, 0), r"k must be in \[1, 8\], got 0; pass at most vocab_size")
    yield ErrorSample((x, 9), r"k must be in \[1, 8\], got 9; pass at most vocab_size")


def _top_k_cost(input, k, *, sorted=True):
    return Cost(bytes=input.nbytes + input.shape[0] * k * (input.element_size() + 8))


@op(
    "(Tensor input, SymInt k, *, bool sorted=True) -> (Tensor, Tensor)",
    fake=_top_k_fake,
    samples=_top_k_samples,
    errors=_top_k_errors,
    cost=_top_k_cost,
)
def top_k(input, k, *, sorted=True):
    """The k largest of each row: `(values, indices int64)`, both `[rows, k]`, exact, lower ids first among equals.

    Largest first where `sorted`, else in the order of the ids. NaN counts as the largest.
    """
    ids = in_order(input)[1][:, :k]
    if not sorted:
        ids = ids.sort(-1).values
    return input.gather(1, ids), ids


# ---------------------------------------------------------------------------------------------------- log-probabilities


def _logprobs_fake(logits, token_ids, num_top=0):
    name = "gather_logprobs"
    check_rows(name, "logits", logits, FLOATS)
    rows, vocab = logits.shape
    check_per_row(name, "token_ids", token_ids, INDEX_TYPES, "logits", logits, rows)
    check(
        name,
        all_of(num_top >= 0, num_top <= vocab),
        lambda: f"num_top must be in [0, {vocab}], got {num_top}; pass at most vocab_size",
    )

    def empty(dtype, *shape):
        return torch.empty(shape, dtype=dtype, device=logits.device)

    ids = token_ids.dtype
    return (
        empty(torch.float32, rows),
        empty(ids, rows),
        empty(torch.float32, rows, num_top),
        empty(ids, rows, num_top),
    )


def _logprobs_samples(device, dtype):
    generator = torch.Generator().manual_seed(22)
    for name, x in _rows(device, dtype):
        rows, vocab = x.shape
        top = (min(20, vocab), 0, 1, vocab // 2)
        for num_top in dict.fromkeys(top[: 4 if vocab < 9000 else 2]):
            ids = torch.randint(0, vocab, (rows,), generator=generator)
            ids = ids if num_top != 1 else ids.int()
            yield Sample((x, ids, num_top), {}, f"{name}, top {num_top}").map_tensors(lambda t: t.to(device))
        yield Sample((x, x.argmax(-1) if rows else x.new_zeros(0).long()), {}, name).map_tensors(lambda t: t.to(device))


def _logprobs_errors(device):
    x, ids = torch.rand(2, 8, device=device), torch.tensor([0, 7], device=device)
    yield ErrorSample((x.double(), ids), r"logits must be float32, bfloat16 or float16, got float64; convert")
    yield ErrorSample((x[0], ids), r"logits must be \[rows, vocab_size\], got \[8\]; reshape it to 2 dimensions")
    yield ErrorSample((x[:, :0], ids), r"logits must have at least one column, got vocab_size 0; pass")
    yield ErrorSample((x, ids.float()), r"token_ids must be int32 or int64, got float32; convert")
    yield ErrorSample((x, ids[:1]), r"token_ids must be \[batch\] = \[2\], got \[1\]; check")
    yield ErrorSample((x, ids, -1), r"num_top must be in \[0, 8\], got -1; pass at most vocab_size")
    yield ErrorSample((x, ids, 9), r"num_top must be in \[0, 8\], got 9; pass at most vocab_size")
    bad = r"token_ids must be in \[0, 8\), got {} at {}; pass tokens of the vocabulary"
    yield ErrorSample((x, ids + 1), bad.format(8, 1), needs_values=True)
    yield ErrorSample((x, ids - 1), bad.format(-1, 0), needs_values=True)


def _logprobs_cost(logits, token_ids, num_top=0):
    return Cost(bytes=logits.nbytes + logits.shape[0] * (12 + 12 * num_top), flops=11 * logits.numel())


@op(
    "(Tensor logits, Tensor token_ids, SymInt num_top=0) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_logprobs_fake,
    samples=_logprobs_samples,
    errors=_logprobs_errors,
    cost=_logprobs_cost,
)
def gather_logprobs(logits, token_ids, num_top=0):
    """Log-probabilities under `softmax(logits)`: of one token a row, its rank, and of the num_top largest.

    `token_ids [rows]`. Returns `(logprobs [rows], ranks [rows], top_logprobs [rows, num_top], top_ids [rows, num_top])`,
    logprobs float32, ids and ranks of token_ids' dtype. The rank is the token's place, from 1, in the order of the top
    ids: a token of rank r <= num_top is `top_ids[r - 1]` (vLLM counts all of the tied tokens in it). A row that can't be
    sampled has NaN for all of its log-probabilities.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = torch.where(logits.isnan().any(-1, keepdim=True), math.nan, logits.double())
    x = limit_of_infinite(x, from_probs=False)
    below = x - x.amax(-1, keepdim=True)  # NaN where there is nothing but -inf
    logprobs = (below - below.exp().sum(-1, keepdim=True).log()).to(dtype)
    order = in_order(logits)[1]
    ranks = (order == token_ids[:, None]).long().argmax(-1) + 1
    chosen = logprobs.gather(1, token_ids.long()[:, None]).squeeze(1)
    top_ids = order[:, :num_top]
    return chosen, ranks.to(token_ids.dtype), logprobs.gather(1, top_ids), top_ids.to(token_ids.dtype)
