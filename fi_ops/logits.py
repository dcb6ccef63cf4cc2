"""Around the sampler: penalties, bias and token masks on the logits in front of it, top-k and log-probabilities beside it.

logits `[batch, vocab_size]` float32, bfloat16 or float16 with a contiguous last dimension. Nothing is written in place.
"""

from __future__ import annotations

import torch

from ._arguments import array_or_number

__all__ = [
    "apply_logits_processors",
    "apply_penalties",
    "apply_token_bitmask",
    "gather_logprobs",
    "top_k",
]


def apply_logits_processors(
    logits: torch.Tensor,
    *,
    output_counts: torch.Tensor | None = None,
    prompt_mask: torch.Tensor | None = None,
    repetition_penalty: float | torch.Tensor = 1.0,
    presence_penalty: float | torch.Tensor = 0.0,
    frequency_penalty: float | torch.Tensor = 0.0,
    logit_bias: torch.Tensor | None = None,
    bitmask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bias, then repetition, frequency and presence penalty, then an allowed-token mask, in one pass.

    Args:
        logits: `[batch, vocab_size]`.
        output_counts: int32 `[batch, vocab_size]`: how often each token has been generated.
        prompt_mask: bool `[batch, vocab_size]`: which tokens the prompt has.
        repetition_penalty: > 0: the logit of a token in the prompt or the output is divided by it where positive, else
            multiplied with it. A number or float32 `[batch]`, as the next two.
        presence_penalty: subtracted once for a token that has been generated.
        frequency_penalty: subtracted for each time that it has been.
        logit_bias: float32 `[vocab_size]` or `[batch, vocab_size]`, added.
        bitmask: int32 `[batch, ceil(vocab_size / 32)]`, bits little-endian (as xgrammar packs them): 1 is allowed, 0 sets
            the logit to -inf.

    Returns:
        `[batch, vocab_size]` of logits' dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices don't fit, or a penalty comes without what it counts.
    """
    repetition_arr, repetition = array_or_number(repetition_penalty, 1.0)
    presence_arr, presence = array_or_number(presence_penalty, 0.0)
    frequency_arr, frequency = array_or_number(frequency_penalty, 0.0)
    return torch.ops.fi.apply_logits_processors(
        logits, output_counts, prompt_mask, repetition_arr, repetition, presence_arr, presence, frequency_arr,
        frequency, logit_bias, bitmask,
    )  # fmt: skip


def apply_penalties(
    logits: torch.Tensor,
    prompt_mask: torch.Tensor | None,
    output_counts: torch.Tensor,
    presence_penalties: float | torch.Tensor,
    frequency_penalties: float | torch.Tensor,
    repetition_penalties: float | torch.Tensor,
) -> torch.Tensor:
    """vLLM's `apply_penalties` over what it counts (there: lists of token ids, and in place). See `apply_logits_processors`."""
    return apply_logits_processors(
        logits,
        output_counts=output_counts,
        prompt_mask=prompt_mask,
        repetition_penalty=repetition_penalties,
        presence_penalty=presence_penalties,
        frequency_penalty=frequency_penalties,
    )


def apply_token_bitmask(logits: torch.Tensor, bitmask: torch.Tensor) -> torch.Tensor:
    """xgrammar's allowed-token mask, not in place. See `apply_logits_processors`."""
    return apply_logits_processors(logits, bitmask=bitmask)


def top_k(
    input: torch.Tensor, k: int, sorted: bool = False, deterministic: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, exact; among equals the lowest ids; NaN counts as the largest.

    Args:
        input: `[rows, vocab_size]` float32, bfloat16 or float16, last dimension contiguous.
        k: 1 to vocab_size.
        sorted: largest first; else in the order of the ids.
        deterministic: accepted and without effect: it always is.

    Returns:
        values `[rows, k]` of input's dtype, indices int64 `[rows, k]`.

    Raises:
        RuntimeError: k, shape or dtype don't fit.

    Source: FlashInfer `top_k`.
    """
    return torch.ops.fi.top_k(input, k, sorted=sorted)


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_logprobs: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities under `softmax(logits)` of one token a row and of the largest ones; no softmax is written out.

    Args:
        logits: `[rows, vocab_size]`.
        token_ids: int32 or int64 `[rows]`, the chosen tokens.
        num_logprobs: how many of the largest, 0 to vocab_size.

    Returns:
        logprobs float32 `[rows]` and ranks `[rows]` (from 1; r <= num_logprobs is top_ids[r - 1]) of token_ids;
        top_logprobs float32 and top_ids, both `[rows, num_logprobs]`, largest first, lowest ids first among equals. Ranks
        and ids have token_ids' dtype. NaN in a row that can't be sampled.

    Raises:
        RuntimeError: shapes or dtypes don't fit, or (on the CPU) a token is not of the vocabulary.

    Source: vLLM's sampler (whose rank counts all tokens that equal the chosen one).
    """
    return torch.ops.fi.gather_logprobs(logits, token_ids, num_logprobs)
