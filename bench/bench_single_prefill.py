"""Attention of a whole prompt, one sequence: 32 query heads, 8 KV heads, head_dim 128, causal and full."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fi_ops.library import SPECS

from . import stock
from .harness import Candidate, Case, Options, within_budget

SPEC = SPECS["attention"]
QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
GROUP = QUERY_HEADS // KV_HEADS

# (length, causal)
CPU = [(512, True), (512, False), (2048, True), (2048, False)]
CUDA_QUICK = [(1024, True), (4096, True), (4096, False)]
CUDA = [*[(n, True) for n in (256, 1024, 4096, 16384)], *[(n, False) for n in (1024, 4096, 16384)]]
WITH_FLEX = {(4096, True), (4096, False)}


def shapes(options: Options) -> list[tuple[int, bool]]:
    if options.length:
        return [(options.length, True), (options.length, False)]
    if options.device == "cpu":
        return CPU[:2] if options.quick else CPU
    return CUDA_QUICK if options.quick else CUDA


def _check(query, key, value, causal: bool, rows: int = 1024):
    """By the reference on the last group of heads, the first and the last rows: float64 scores of all would not fit."""
    q, k, v = query[:, -GROUP:], key[:, -1:], value[:, -1:]
    rows = min(rows, q.shape[2])

    def ends(out: torch.Tensor) -> torch.Tensor:
        return torch.cat([out[:, :, :rows], out[:, :, -rows:]], dim=2)

    wide = [t.double() for t in (q, k, v)]
    seen = rows if causal else k.shape[2]  # keys that the first rows see
    first = SPEC.reference(wide[0][:, :, :rows], wide[1][:, :, :seen], wide[2][:, :, :seen], causal=causal)
    last = SPEC.reference(wide[0][:, :, -rows:], *wide[1:], causal=causal)
    same = stock.sdpa(q, k, v, causal)
    return within_budget(torch.cat([first, last], dim=2), ends(same), lambda out: ends(out[:, -GROUP:]))


def _ours(query, key, value, causal):
    return torch.ops.fi.attention(query, key, value, causal=causal)


def cases(options: Options) -> Iterator[Case]:
    dtype = options.pick(torch.bfloat16)
    for length, causal in shapes(options):
        query = torch.randn(1, QUERY_HEADS, length, HEAD_DIM, device=options.device).to(dtype)
        key, value = (torch.randn(1, KV_HEADS, length, HEAD_DIM, device=options.device).to(dtype) for _ in range(2))
        inputs = [(query, key, value, causal)]
        with_flex = options.device == "cuda" and (options.full or (length, causal) in WITH_FLEX)
        kind = "causal" if causal else "full"
        yield Case(
            f"n={length} {kind}, {str(dtype).removeprefix('torch.')}",
            [
                *stock.dense_peers(inputs, options, with_flex),
                Candidate("fi_ops", _ours, ours=True, inputs=inputs),
            ],
            SPEC.cost(query, key, value, causal=causal),
            _check(query, key, value, causal),
            dtype,
            series=kind,
            length=length,
        )
