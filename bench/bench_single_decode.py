"""Attention of one new token: 32 query heads, 8 KV heads, head_dim 128.

"dense": the cache is exactly as long as the context. "static cache": it is built for twice the context and a boolean mask
says which slots are live, as stock models have it under torch.compile; the cost is that of the live slots. Calls go over
copies of the tensors in turn, more than any cache holds: a model's other layers would have evicted them too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fi_ops.library import SPECS

from . import stock
from .harness import Candidate, Case, Options, cold, copies_beyond_caches, within_budget

SPEC = SPECS["attention"]
QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def _tensors(batch: int, slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM).to(dtype)
    key, value = (torch.randn(batch, KV_HEADS, slots, HEAD_DIM).to(dtype) for _ in range(2))
    return query, key, value


def _check(query, key, value, mask=None):
    """By the reference on the first sequence."""
    first = (query[:1], key[:1], value[:1])
    expected = SPEC.reference(*(t.double() for t in first), mask)
    same = SPEC.reference(*first, mask)
    return within_budget(expected, same, lambda out: out[:1])


def cases(options: Options) -> Iterator[Case]:
    dtype = options.pick(torch.bfloat16)
    label = str(dtype).removeprefix("torch.")
    dense = [(options.batch or 1, options.length or 4096)]
    if not (options.quick or options.batch or options.length):
        dense += [(1, 32768), (8, 2048)]
    for batch, length in dense:
        query, key, value = _tensors(batch, length, dtype)
        copies = copies_beyond_caches((query, key, value), key.nbytes + value.nbytes)
        yield Case(
            f"dense, B={batch} n={length}, {label}",
            [
                *stock.eager_and_compiled("torch SDPA", stock.sdpa, copies, options),
                Candidate("fi_ops", cold(copies, torch.ops.fi.attention), ours=True),
            ],
            SPEC.cost(query, key, value),
            _check(query, key, value),
            dtype,
        )
    masked = [(options.batch or 8, options.length or 2048)]
    if not (options.quick or options.batch or options.length):
        masked.insert(0, (1, 2048))
    for batch, length in masked:
        query, key, value = _tensors(batch, 2 * length, dtype)
        mask = (torch.arange(2 * length) < length)[None, None, None]
        live = (key[:, :, :length], value[:, :, :length])
        copies = copies_beyond_caches((query, key, value, mask), key.nbytes)  # half of the slots are live
        yield Case(
            f"static cache of {2 * length} with a bool mask, B={batch} n={length}, {label}",
            [
                *stock.eager_and_compiled("torch repeat_kv + mask", stock.sdpa_repeat_kv, copies, options),
                Candidate("fi_ops", cold(copies, torch.ops.fi.attention), ours=True),
            ],
            SPEC.cost(query, *live),
            _check(query, key, value, mask),
            dtype,
        )
