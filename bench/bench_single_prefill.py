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


def cases(options: Options) -> Iterator[Case]:
    dtype = options.pick(torch.bfloat16)
    lengths = [options.length] if options.length else [512] if options.quick else [512, 2048]
    for length in lengths:
        for causal in (True, False):
            query = torch.randn(1, QUERY_HEADS, length, HEAD_DIM).to(dtype)
            key, value = (torch.randn(1, KV_HEADS, length, HEAD_DIM).to(dtype) for _ in range(2))
            # the reference on the last group of heads: float64 scores of all would not fit everywhere
            last = (query[:, -GROUP:], key[:, -1:], value[:, -1:])
            expected = SPEC.reference(*(t.double() for t in last), causal=causal)
            peers = stock.eager_and_compiled("torch SDPA", stock.sdpa, [(query, key, value, causal)], options)
            check = within_budget(expected, stock.sdpa(*last, causal), lambda out: out[:, -GROUP:])

            def ours(query=query, key=key, value=value, causal=causal):
                return torch.ops.fi.attention(query, key, value, causal=causal)

            yield Case(
                f"n={length} {'causal' if causal else 'full'}, {str(dtype).removeprefix('torch.')}",
                [*peers, Candidate("fi_ops", ours, ours=True)],
                SPEC.cost(query, key, value, causal=causal),
                check,
                dtype,
            )
