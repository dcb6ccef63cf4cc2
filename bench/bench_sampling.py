"""Samplers at vocabulary 128256, against Hugging Face's sort-based one and gpt-fast's top-k one, eager and compiled.

Ours includes the making of its random numbers (`torch.rand`), as the peers do. The ceiling is one read of the logits from
memory; logits that are still in a cache (they were just written, as in a model) can be read faster than that. On CUDA calls
go over up to 32 copies of the logits: beyond the caches from a batch of 16 on, inside them for a single row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fi_ops
from fi_ops.library import SPECS, Cost
from fi_ops.library._sampling import kept_probs

from . import stock
from .harness import Candidate, Case, Options, copies_beyond_caches

SPEC = SPECS["top_k_top_p_sampling_from_logits"]

# (name, top_k, top_p, spread): a model's logits spread over some ten units; near-uniform ones keep most of the
# vocabulary: the worst case
CPU = [("top-k 50 + top-p 0.9", 50, 0.9, 3.0), ("top-p 0.9", 0, 0.9, 3.0), ("top-k 200", 200, 1.0, 3.0)]
HARD = [("top-p 0.9, near-uniform", 0, 0.9, 0.05), ("top-k 50000 + top-p 0.9", 50000, 0.9, 3.0)]
CUDA = [("top-k 50 + top-p 0.95", 50, 0.95, 3.0), ("top-p 0.95", 0, 0.95, 3.0), ("top-k 50", 50, 1.0, 3.0)]


def rows(options: Options) -> list[tuple[str, int, float, float]]:
    if options.device == "cpu":
        return CPU if options.quick else CPU + HARD
    return CUDA + HARD if options.full else CUDA + HARD[:1]


def batches(options: Options) -> tuple[int, ...]:
    if options.batch:
        return (options.batch,)
    if options.device == "cpu":
        return (1, 16)
    return (1, 128) if options.quick else (1, 16, 128)


def _check(logits: torch.Tensor, top_k: int, top_p: float):
    """Tokens are in the support by the float64 reference (ties at the k-th kept, as the peers do)."""
    probs = kept_probs(logits, top_k, top_p, top_k_ties="threshold")

    def check(tokens) -> str:
        outside = int((probs.gather(1, tokens.reshape(-1, 1).long()) == 0).sum())
        return "ok" if outside == 0 else f"{outside} tokens outside the support"

    return check


def _peers(copies: list[tuple], top_k: int, top_p: float, hard: bool, options: Options) -> list[Candidate]:
    if top_p == 1.0:
        inputs = [(logits, top_k) for (logits,) in copies]
        peers = stock.eager_and_compiled("gpt-fast", stock.gpt_fast_sample, inputs, options)
    else:
        inputs = [(logits, top_k, top_p) for (logits,) in copies]
        peers = stock.eager_and_compiled("Hugging Face", stock.hf_sample, inputs, options)
        if options.device == "cuda" and not options.full and (hard or copies[0][0].shape[0] > 1):
            peers = peers[:1]  # compiling takes long; torch 2.11 can't compile the sort of more rows than one
    if options.device == "cuda" and stock.flashinfer():
        inputs = [(logits, top_k, top_p) for (logits,) in copies]
        peers.append(stock.eager("FlashInfer", stock.flashinfer_sample, inputs))
    return peers


def cases(options: Options) -> Iterator[Case]:
    vocab, dtype, device = options.length or 128256, options.pick(torch.float32), options.device
    for batch in batches(options):
        for name, top_k, top_p, spread in rows(options):
            logits = (torch.randn(batch, vocab, device=device) * spread).to(dtype)
            copies = copies_beyond_caches((logits,), logits.nbytes, at_most=32 if device == "cuda" else 1)

            def ours(logits, top_k=top_k, top_p=top_p):
                return fi_ops.top_k_top_p_sampling_from_logits(logits, top_k, top_p)

            peers = _peers(copies, top_k, top_p, (name, top_k, top_p, spread) in HARD, options)
            yield Case(
                f"{name}, B={batch}, V={vocab}, {str(dtype).removeprefix('torch.')}",
                [*peers, Candidate("fi_ops", ours, ours=True, inputs=copies)],
                # exponentials are no matrix product: judged by bytes
                Cost(SPEC.cost(logits, torch.empty(batch)).bytes),
                _check(logits, top_k, top_p),
            )
