"""Samplers from logits against Hugging Face's (sorts), gpt-fast's (top-k) and vLLM's (sorts, k and p by row), eager and compiled.

Ours includes the making of its random numbers (`torch.rand`), as the peers do. The ceiling is one read of the logits from
memory; logits that are still in a cache (they were just written, as in a model) can be read faster than that. On CUDA calls
go over up to 32 copies of the logits: beyond the caches from a batch of 16 on, inside them for a single row.

Vocabulary 128256, or `--vocab`; batches of 1, 16 and (CUDA) 128, or `--batch`. `--full` takes vocabularies of 32000, 128256 and
262144 and batches up to 512. Compiling takes longer than measuring, so peers are compiled at 128256 and up to a batch of 16
(torch 2.11 can't compile the sort of more rows than one on CUDA: those rows say so). On one H100: about a minute, and three.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import fi_ops
from fi_ops.library import SPECS, Cost
from fi_ops.library._sampling import kept_probs

from . import stock
from .harness import NAN, Candidate, Case, Options, copies_beyond_caches

SPEC = SPECS["top_k_top_p_sampling_from_logits"]
USUAL = 128256
CHECKED = 16  # rows: the float64 reference sorts them


@dataclass(frozen=True)
class Job:
    """A model's logits spread over some ten units; near-uniform ones keep most of the vocabulary: the worst case."""

    name: str
    top_k: int
    top_p: float
    by_row: bool = False
    spread: float = 3.0
    hard: bool = False


CPU = [
    Job("top-k 50 + top-p 0.9", 50, 0.9),
    Job("top-p 0.9", 0, 0.9),
    Job("top-k 200", 200, 1.0),
    Job("top-k 50 + top-p 0.9 by row", 50, 0.9, by_row=True),
]
CUDA = [
    Job("top-k 50 + top-p 0.95", 50, 0.95),
    Job("top-p 0.95", 0, 0.95),
    Job("top-k 50", 50, 1.0),
    Job("top-k 50 + top-p 0.95 by row", 50, 0.95, by_row=True),
]
HARD = [
    Job("top-p 0.9, near-uniform", 0, 0.9, spread=0.05, hard=True),
    Job("top-k 50000 + top-p 0.9", 50000, 0.9, hard=True),
]
# Microseconds by batch, for either filter or both of a usual row: what the project set out to reach.
TARGETS = {"cpu": {1: 200.0, 16: 2000.0}, "cuda": {1: 20.0, 16: 25.0, 128: 60.0}}


def jobs(options: Options, vocab: int) -> list[Job]:
    if vocab != USUAL and not options.vocab:
        return CPU if options.device == "cpu" else CUDA
    if options.device == "cpu":
        return CPU[:3] if options.quick else CPU + HARD
    return CUDA + HARD if options.full else CUDA + HARD[:1]


def shapes(options: Options) -> list[tuple[int, int]]:
    """(batch, vocabulary)."""
    vocabularies = [options.vocab] if options.vocab else [32000, USUAL, 262144] if options.full else [USUAL]
    batches = (1, 16) if options.device == "cpu" else (1, 128) if options.quick else (1, 16, 128)
    if options.batch:
        batches = (options.batch,)
    elif options.full and options.device == "cuda":
        batches = (*batches, 512)
    return [(batch, vocab) for vocab in vocabularies for batch in batches]


def _check(logits: torch.Tensor, job: Job):
    """Tokens are in the support by the float64 reference (ties at the k-th kept, as the peers do)."""
    probs = kept_probs(logits[:CHECKED], job.top_k, job.top_p, top_k_ties="threshold")

    def check(tokens) -> str:
        outside = int((probs.gather(1, tokens[:CHECKED].reshape(-1, 1).long()) == 0).sum())
        return "ok" if outside == 0 else f"{outside} tokens outside the support"

    return check


def _peers(copies: list[tuple], job: Job, options: Options) -> list[Candidate]:
    """`copies`: (logits, top_k, top_p), numbers or by row."""
    batch, vocab = copies[0][0].shape
    sorts = job.by_row or job.top_p < 1
    if job.by_row:
        name, fn, inputs = "vLLM", stock.vllm_sample, copies
    elif sorts:
        name, fn, inputs = "Hugging Face", stock.hf_sample, copies
    else:
        name, fn, inputs = "gpt-fast", stock.gpt_fast_sample, [args[:2] for args in copies]
    peers = stock.eager_and_compiled(name, fn, inputs, options)
    if options.device == "cuda":
        at_most = 16 if options.full or not sorts else 1
        if (vocab != USUAL and not options.vocab) or job.hard or batch > at_most:
            peers = peers[:1]
        if stock.flashinfer():
            peers.append(stock.eager("FlashInfer", stock.flashinfer_sample, copies))
    return peers


def _case(job: Job, batch: int, vocab: int, options: Options) -> Case:
    dtype, device = options.pick(torch.float32), options.device
    logits = (torch.randn(batch, vocab, device=device) * job.spread).to(dtype)
    filters: tuple = (job.top_k, job.top_p)
    if job.by_row:
        top_k = torch.full((batch,), job.top_k, dtype=torch.int32, device=device)
        filters = (top_k, torch.full((batch,), job.top_p, device=device))
    copies = copies_beyond_caches((logits, *filters), logits.nbytes, at_most=32 if device == "cuda" else 1)
    ours = Candidate("fi_ops", fi_ops.top_k_top_p_sampling_from_logits, ours=True, inputs=copies)
    usual = vocab == USUAL and dtype == torch.float32 and not job.hard
    return Case(
        f"{job.name}, B={batch}, V={vocab}, {str(dtype).removeprefix('torch.')}",
        [*_peers(copies, job, options), ours],
        # exponentials are no matrix product: judged by bytes
        Cost(SPEC.cost(logits, torch.empty(batch)).bytes),
        _check(logits, job),
        target_us=TARGETS[device].get(batch, NAN) if usual else NAN,
    )


def cases(options: Options) -> Iterator[Case]:
    for batch, vocab in shapes(options):
        for job in jobs(options, vocab):
            yield _case(job, batch, vocab, options)
