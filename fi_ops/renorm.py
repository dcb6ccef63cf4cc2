"""Filtered distributions written out, with FlashInfer's names, arguments and defaults (`flashinfer.sampling`).

All: `[rows, vocab_size]` with a contiguous last dimension, parameters a number or a tensor `[rows]`; a row that can't be
sampled (NaN, a negative probability, no positive one) comes out as NaN; `RuntimeError` for shapes, dtypes, devices or
parameters that don't fit. The filters keep what the samplers keep.
"""

from __future__ import annotations

import torch

from ._arguments import array_or_number, refuse_pdl

__all__ = ["softmax", "top_k_mask_logits", "top_k_renorm_probs", "top_p_renorm_probs"]


def softmax(
    logits: torch.Tensor,
    temperature: float | torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """`softmax(logits / temperature)`, float32 `[rows, vocab_size]`.

    Args:
        logits: float32, bfloat16 or float16 `[rows, vocab_size]`.
        temperature: a number or float32 `[rows]`; None is 1; 0 is 1 at the largest logit (lowest id on ties).
        enable_pdl: None or False; True is refused.

    Source: FlashInfer `softmax`.
    """
    refuse_pdl("softmax", enable_pdl)
    return torch.ops.fi.softmax(logits, *array_or_number(1.0 if temperature is None else temperature, 1.0))


def top_p_renorm_probs(probs: torch.Tensor, top_p: float | torch.Tensor) -> torch.Tensor:
    """Probabilities of the smallest set of largest tokens whose mass reaches top_p, normalised; 0 elsewhere.

    Args:
        probs: float32 `[rows, vocab_size]`.
        top_p: a number or float32 `[rows]`; >= 1 keeps all, 0 the largest alone.

    Returns:
        float32 `[rows, vocab_size]`.

    Source: FlashInfer `top_p_renorm_probs`.
    """
    return torch.ops.fi.top_p_renorm_probs(probs, *array_or_number(top_p, 1.0))


def top_k_renorm_probs(probs: torch.Tensor, top_k: int | torch.Tensor, *, ties: str = "exact") -> torch.Tensor:
    """Probabilities of the k largest tokens, normalised; 0 elsewhere.

    Args:
        probs: float32 `[rows, vocab_size]`.
        top_k: an int or an integer tensor `[rows]`; <= 0 or >= vocab_size keeps all.
        ties: what becomes of tokens equal to the k-th: "exact" keeps k tokens, lowest ids first; "threshold" all.

    Returns:
        float32 `[rows, vocab_size]`.

    Source: FlashInfer `top_k_renorm_probs` (which keeps all ties at the k-th).
    """
    return torch.ops.fi.top_k_renorm_probs(probs, *array_or_number(top_k, 0), top_k_ties=ties)


def top_k_mask_logits(logits: torch.Tensor, top_k: int | torch.Tensor, *, ties: str = "exact") -> torch.Tensor:
    """Logits of the k largest tokens; -inf elsewhere.

    Args:
        logits: float32, bfloat16 or float16 `[rows, vocab_size]`.
        top_k, ties: as in `top_k_renorm_probs`.

    Returns:
        `[rows, vocab_size]` of logits' dtype.

    Source: FlashInfer `top_k_mask_logits` (which keeps all ties at the k-th).
    """
    return torch.ops.fi.top_k_mask_logits(logits, *array_or_number(top_k, 0), top_k_ties=ties)
