"""Samplers at vocabulary 128256, against Hugging Face's sort-based one and gpt-fast's top-k one, eager and compiled.

Ours includes the making of its random numbers (`torch.rand`), as the peers do. The ceiling is one read of the logits from
memory; logits that are still in a cache (they were just written, as in a model) can be read faster than that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fi_ops
from fi_ops.library import SPECS, Cost
from fi_ops.library.sampling import kept_probs

from . import stock
from .harness import Candidate, Case, Options

SPEC = SPECS["top_k_top_p_sampling_from_logits"]


def _logits(batch: int, vocab: int, spread: float, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(batch, vocab) * spread).to(dtype)


def _check(logits: torch.Tensor, top_k: int, top_p: float):
    """Tokens are in the support by the float64 reference (ties at the k-th kept, as the peers do)."""
    probs = kept_probs(logits, top_k, top_p, top_k_ties="threshold")

    def check(tokens) -> str:
        outside = int((probs.gather(1, tokens.reshape(-1, 1).long()) == 0).sum())
        return "ok" if outside == 0 else f"{outside} tokens outside the support"

    return check


def cases(options: Options) -> Iterator[Case]:
    vocab, dtype = options.length or 128256, options.pick(torch.float32)
    # a model's logits spread over some ten units; near-uniform ones keep most of the vocabulary: the worst case
    rows = [("top-k 50 + top-p 0.9", 50, 0.9, 3.0), ("top-p 0.9", 0, 0.9, 3.0), ("top-k 200", 200, 1.0, 3.0)]
    if not options.quick:
        rows += [("top-p 0.9, near-uniform", 0, 0.9, 0.05), ("top-k 50000 + top-p 0.9", 50000, 0.9, 3.0)]
    for batch in (options.batch,) if options.batch else (1, 16):
        for name, top_k, top_p, spread in rows:
            logits = _logits(batch, vocab, spread, dtype)
            peers = stock.eager_and_compiled("Hugging Face", stock.hf_sample, [(logits, top_k, top_p)], options)
            if top_p == 1.0:
                peers = stock.eager_and_compiled("gpt-fast", stock.gpt_fast_sample, [(logits, top_k)], options)

            def ours(logits=logits, top_k=top_k, top_p=top_p):
                return fi_ops.top_k_top_p_sampling_from_logits(logits, top_k, top_p)

            yield Case(
                f"{name}, B={batch}, V={vocab}, {str(dtype).removeprefix('torch.')}",
                [*peers, Candidate("fi_ops", ours, ours=True)],
                Cost(
                    SPEC.cost(logits, torch.empty(batch)).bytes
                ),  # exponentials are no matrix product: judged by bytes
                _check(logits, top_k, top_p),
            )
