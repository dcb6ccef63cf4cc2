"""Attention of one new token: 32 query heads, 8 KV heads (or 32: "MHA"), head_dim 128.

"dense": the cache is exactly as long as the context. "static cache": it is built longer than the context and a boolean mask
`[batch, 1, 1, slots]` says which slots are live, as stock models have it under torch.compile. "ragged": each row has its own
length, padded on the right or on the left (lengths from an eighth to 15 eighths of n, n on average). The cost is that of the
live slots. Calls go over copies of the tensors in turn, more than any cache holds: a model's other layers would have evicted
them too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fi_ops.library import SPECS, Cost

from . import stock
from .harness import Candidate, Case, Options, copies_beyond_caches, within_budget

SPEC = SPECS["attention"]
QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128

# (batch, length, KV heads)
DENSE_CPU = [(1, 4096, 8), (1, 32768, 8), (8, 2048, 8)]
DENSE_CUDA_QUICK = [(1, 2048, 8), (1, 32768, 8), (16, 4096, 8)]
DENSE_CUDA = [
    *[(1, n, 8) for n in (512, 2048, 8192, 32768, 131072)],
    *[(16, n, 8) for n in (512, 2048, 4096, 16384)],
    (128, 1024, 8),
    (64, 8192, 8),
    (1, 8192, 32),
    (16, 4096, 32),
]
WITH_FLEX = {(1, 2048, 8), (16, 4096, 8)}

# (how the slots are filled, batch, length, slots)
MASKED_CPU = [("static cache", 1, 2048, 4096), ("static cache", 8, 2048, 4096)]
MASKED_CUDA_QUICK = [("static cache", 16, 2000, 8192)]
MASKED_CUDA = [
    ("static cache", 1, 2000, 8192),
    ("static cache", 16, 2000, 8192),
    ("ragged, right-padded", 16, 2000, 8192),
    ("ragged, left-padded", 16, 2000, 8192),
]


def dense_shapes(options: Options) -> list[tuple[int, int, int]]:
    if options.batch or options.length:
        return [(options.batch or 1, options.length or 4096, KV_HEADS)]
    if options.device == "cpu":
        return DENSE_CPU[:1] if options.quick else DENSE_CPU
    return DENSE_CUDA_QUICK if options.quick else DENSE_CUDA


def masked_shapes(options: Options) -> list[tuple[str, int, int, int]]:
    if options.batch or options.length:
        length = options.length or 2048
        return [("static cache", options.batch or 8, length, 2 * length)]
    if options.device == "cpu":
        return MASKED_CPU[1:] if options.quick else MASKED_CPU
    return MASKED_CUDA_QUICK if options.quick else MASKED_CUDA


def _tensors(batch: int, slots: int, kv_heads: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, device=device).to(dtype)
    key, value = (torch.randn(batch, kv_heads, slots, HEAD_DIM, device=device).to(dtype) for _ in range(2))
    return query, key, value


def live_slots(kind: str, batch: int, length: int, slots: int) -> torch.Tensor:
    """The mask `[batch, 1, 1, slots]` of a cache that is filled as `kind` says."""
    slot, lengths = torch.arange(slots), torch.full((batch, 1), length)
    if kind.startswith("ragged"):
        lengths = torch.linspace(length / 8, length * 15 / 8, batch).long()[:, None]
    longest = lengths.max()
    live = slot < lengths if kind != "ragged, left-padded" else (slot < longest) & (slot >= longest - lengths)
    return live[:, None, None]


def _cost(query: torch.Tensor, key: torch.Tensor, live: int) -> Cost:
    """Of `live` slots in the whole batch."""
    return Cost(
        bytes=2 * query.nbytes + 2 * live * key.shape[1] * HEAD_DIM * key.element_size(),
        flops=4 * live * QUERY_HEADS * HEAD_DIM,
    )


def _check(query, key, value, mask=None):
    """By the reference on the first and the last sequence (their lengths are the extremes)."""
    rows = sorted({0, query.shape[0] - 1})
    some = [t[rows] for t in (query, key, value)]
    mask = None if mask is None else mask[rows]
    expected, same = SPEC.reference(*(t.double() for t in some), mask), SPEC.reference(*some, mask)
    return within_budget(expected, same, lambda out: out[rows])


def dense(batch: int, length: int, kv_heads: int, options: Options, with_flex: bool = False) -> Case:
    dtype = options.pick(torch.bfloat16)
    query, key, value = _tensors(batch, length, kv_heads, dtype, options.device)
    copies = copies_beyond_caches((query, key, value), key.nbytes + value.nbytes)
    kind = "dense" if kv_heads == KV_HEADS else "dense MHA"
    return Case(
        f"{kind}, B={batch} n={length}, {str(dtype).removeprefix('torch.')}",
        [
            *stock.dense_peers(copies, options, with_flex),
            Candidate("fi_ops", torch.ops.fi.attention.default, ours=True, inputs=copies),
        ],
        _cost(query, key, batch * length),
        _check(query, key, value),
        dtype,
        series=f"{kind}, B={batch}",
        length=length,
    )


def cases(options: Options) -> Iterator[Case]:
    dtype, device = options.pick(torch.bfloat16), options.device
    label, on_cuda = str(dtype).removeprefix("torch."), device == "cuda"
    for shape in dense_shapes(options):
        yield dense(*shape, options, on_cuda and (options.full or shape in WITH_FLEX))
    for kind, batch, length, slots in masked_shapes(options):
        query, key, value = _tensors(batch, slots, KV_HEADS, dtype, device)
        mask = live_slots(kind, batch, length, slots).to(device)
        live = int(mask.sum())
        cost = _cost(query, key, live)
        copies = copies_beyond_caches((query, key, value, mask), cost.bytes)
        yield Case(
            f"{kind} of {slots} with a bool mask, B={batch} n={length}, {label}",
            [
                *stock.masked_peers(copies, options, with_flex=on_cuda and options.full),
                Candidate("fi_ops", torch.ops.fi.attention.default, ours=True, inputs=copies),
            ],
            cost,
            _check(query, key, value, mask),
            dtype,
        )
