"""The ops beside the samplers at vocabulary 128256: filters written out, top-k, log-probabilities, penalties, draws from probs,
chains of draft tokens.

Peers are stock torch's way to the same result: its softmax and topk, a sort where a filter is top-p, multinomial behind it.
The ceiling is what the op's spec says: each input read once, each output written once. On CUDA calls go over up to 32 copies
of the inputs, beyond the caches from a batch of 16 on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fi_ops.library import SPECS, Cost

from . import stock
from .harness import Candidate, Case, Options, copies_beyond_caches

OPS = torch.ops.fi
TOP_K, TOP_P, NUM_TOP, NUM_DRAFT = 50, 0.9, 20, 4


def batches(options: Options) -> tuple[int, ...]:
    if options.batch:
        return (options.batch,)
    return (1, 16) if options.device == "cpu" else (1, 128) if options.quick else (1, 16, 128)


def sorted_top_p(probs: torch.Tensor, top_p: float = TOP_P) -> torch.Tensor:
    values, ids = probs.sort(-1, descending=True)
    values = values.masked_fill(values.cumsum(-1) - values >= top_p, 0.0)
    values = values / values.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(1, ids, values)


def masked_top_k(x: torch.Tensor, low: float, k: int = TOP_K) -> torch.Tensor:
    return x.masked_fill(x < x.topk(k)[0][:, -1:], low)


def logprobs(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    every = logits.float().log_softmax(-1)
    chosen = every.gather(1, ids[:, None])
    return chosen, (every > chosen).sum(-1), *every.topk(NUM_TOP)


def penalised(logits, counts, prompt, repetition, presence, frequency) -> torch.Tensor:
    """vLLM's spelling."""
    seen = (counts > 0) | prompt
    repetition = torch.where(seen, repetition[:, None], 1.0)
    logits = torch.where(logits > 0, logits / repetition, logits * repetition)
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def _draw(probs: torch.Tensor) -> torch.Tensor:
    return torch.multinomial(probs, 1)


def jobs(batch: int, vocab: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, str, tuple, dict, Callable]]:
    """(name, op, its tensors, its options, what stock torch does with the tensors)."""
    logits = (torch.randn(batch, vocab, device=device) * 3).to(dtype)
    probs, uniform = logits.float().softmax(-1), torch.rand(batch, device=device)
    ids = torch.randint(0, vocab, (batch,), device=device)
    yield "softmax", "softmax", (logits,), {}, lambda x: x.float().softmax(-1)
    yield f"top-k {TOP_K} mask", "top_k_mask_logits", (logits,), {"top_k": TOP_K}, lambda x: masked_top_k(x, -torch.inf)
    yield f"top-p {TOP_P} renorm", "top_p_renorm_probs", (probs,), {"top_p": TOP_P}, sorted_top_p
    yield (
        f"top-k {TOP_K} renorm",
        "top_k_renorm_probs",
        (probs,),
        {"top_k": TOP_K},
        lambda p: torch.nn.functional.normalize(masked_top_k(p, 0.0), p=1, dim=-1),
    )
    for k in (TOP_K, 1000):
        yield f"top-k {k}", "top_k", (logits,), {"k": k}, lambda x, k=k: torch.topk(x, k)
    yield f"logprobs, top {NUM_TOP}", "gather_logprobs", (logits, ids), {"num_top": NUM_TOP}, logprobs
    yield "from probs", "sampling_from_probs", (probs, uniform), {}, lambda p, u: _draw(p)
    yield (
        f"from probs, top-k {TOP_K}",
        "top_k_sampling_from_probs",
        (probs, uniform),
        {"top_k": TOP_K},
        lambda p, u: _draw(masked_top_k(p, 0.0)),
    )
    yield (
        f"from probs, top-p {TOP_P}",
        "top_p_sampling_from_probs",
        (probs, uniform),
        {"top_p": TOP_P},
        lambda p, u: _draw(sorted_top_p(p)),
    )
    counts = torch.randint(-50, 3, (batch, vocab), device=device).clamp_min(0).int()
    numbers = torch.rand(batch, device=device) + 0.5
    tensors = (logits, counts, counts > 1, numbers, numbers, numbers)
    yield "penalties", "apply_logits_processors", tensors, {}, penalised
    draft = (torch.randn(batch, NUM_DRAFT, vocab, device=device) * 3).softmax(-1)
    # the target's rows are like the draft's: some chains are accepted as a whole, some end early
    target = (draft.log() + torch.randn(draft.shape, device=device)).softmax(-1)
    target = torch.cat([target, probs[:, None]], 1)
    ids = draft.view(-1, vocab).multinomial(1).view(batch, NUM_DRAFT)
    tensors = (draft, ids, torch.rand(batch, NUM_DRAFT + 1, device=device), target)
    yield f"{NUM_DRAFT} draft tokens", "chain_speculative_sampling", tensors, {}, stock.speculate


def _call(op: str, options: dict) -> Callable:
    if op != "apply_logits_processors":
        return lambda *tensors: getattr(OPS, op)(*tensors, **options)
    return lambda logits, counts, prompt, repetition, presence, frequency: OPS.apply_logits_processors(
        logits,
        counts,
        prompt,
        repetition_penalty_arr=repetition,
        presence_penalty_arr=presence,
        frequency_penalty_arr=frequency,
    )


def _cost(op: str, tensors: tuple, options: dict) -> Cost:
    """By bytes: exponentials are no matrix product."""
    if op == "apply_logits_processors":
        return Cost(SPECS[op].cost(*tensors[:3]).bytes)
    return Cost(SPECS[op].cost(*tensors, **options).bytes)


def cases(options: Options) -> Iterator[Case]:
    vocab, dtype, device = options.vocab or 128256, options.pick(torch.float32), options.device
    for batch in batches(options):
        for name, op, tensors, arguments, theirs in jobs(batch, vocab, dtype, device):
            nbytes = sum(t.nbytes for t in tensors)
            copies = copies_beyond_caches(tensors, nbytes, at_most=32 if device == "cuda" else 1)
            peers = stock.eager_and_compiled("torch", theirs, copies, options)
            yield Case(
                f"{name}, B={batch}, V={vocab}, {str(tensors[0].dtype).removeprefix('torch.')}",
                [*peers, Candidate("fi_ops", _call(op, arguments), ours=True, inputs=copies)],
                _cost(op, tensors, arguments),
            )
