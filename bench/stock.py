"""What people run today, in stock torch: the peers of the benches."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .harness import Candidate, Options, cold


def own_code(fn: Callable) -> Callable:
    """The function with a code object of its own: Dynamo keeps compiled code by code object."""
    return types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


def eager_and_compiled(name: str, fn: Callable, copies: list[tuple], options: Options) -> list[Candidate]:
    """Both ways to run a stock function, over argument tuples in turn."""
    both = [Candidate(f"{name}, eager", cold(copies, fn))]
    if options.compiled:
        compiled = torch.compile(own_code(fn), dynamic=False)
        both.append(Candidate(f"{name}, compiled", cold(copies, compiled)))
    return both


def hf_sample(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Hugging Face's top-k and top-p warpers, softmax and multinomial, as `generate(do_sample=True)` runs them."""
    if top_k > 0:
        logits = logits.masked_fill(logits < torch.topk(logits, top_k)[0][..., -1, None], -float("inf"))
    if top_p < 1.0:
        sorted_logits, sorted_indices = torch.sort(logits, descending=False)
        cumulative = sorted_logits.softmax(dim=-1).cumsum(dim=-1)
        remove = cumulative <= (1 - top_p)
        remove[..., -1:] = False
        logits = logits.masked_fill(remove.scatter(1, sorted_indices, remove), -float("inf"))
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1).squeeze(1)


def gpt_fast_sample(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """gpt-fast's sampler: top-k, softmax, argmax over independent exponential clocks."""
    values, _ = torch.topk(logits, min(top_k, logits.size(-1)))
    logits = torch.where(logits < values.select(-1, -1).unsqueeze(-1), -float("Inf"), logits)
    probs = F.softmax(logits, dim=-1)
    return torch.argmax(probs / torch.empty_like(probs).exponential_(1), dim=-1)


def sdpa(query, key, value, causal: bool = False) -> torch.Tensor:
    """torch's flash kernel; GQA by its own flag."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def sdpa_repeat_kv(query, key, value, mask) -> torch.Tensor:
    """What stock models do over a static cache: repeat the heads of the whole cache, mask the empty slots."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
