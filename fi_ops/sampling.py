"""Sampling with FlashInfer's names, arguments and defaults (`flashinfer.sampling`), over `torch.ops.fi`.

What the samplers share:

- `probs` float32 `[rows, vocab_size]` (non-negative; a row is normalised by its own sum), `logits` float32, bfloat16 or
  float16 `[rows, vocab_size]`; the last dimension contiguous.
- `indices`: `[batch]` int32 or int64: draw i is from row `indices[i]`; default: batch = rows, row i.
- `deterministic`: accepted and without effect: results never depend on the batch or the thread count.
- The random numbers are made by ordinary torch ops and handed to the kernel as a tensor, so that `torch.compile`,
  functionalization and graph capture treat them as any other value. `uniform`: float32 `[batch]` of your own in [0, 1).
  `seed`, `offset`: ints or int64 tensors `[1]` or `[batch]`: see `philox_uniform`; a tensor `[batch]` of seeds makes each
  row's draw a function of its own row and seed alone; pass a new offset for new numbers. Else `torch.rand` from
  `generator` (eager only) or the default generator.
- `check_nan`: ValueError if the input has NaN (reads the values).
- They return `[batch]` int32, or indices' dtype; with `return_valid` a tuple with a bool tensor: a row that can't be
  sampled (NaN, a negative probability, no positive one) is id 0 and valid False.
- `RuntimeError` for shapes, dtypes, devices or parameters that don't fit; `TypeError` for calls of FlashInfer's older
  convention, which passed `uniform_samples` in the second place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ._arguments import array_or_number, require
from ._uniform import philox_uniform, uniform_numbers
from .renorm import softmax, top_k_mask_logits, top_k_renorm_probs, top_p_renorm_probs

__all__ = [
    "chain_speculative_sampling",
    "min_p_sampling_from_probs",
    "philox_uniform",
    "sampling_from_logits",
    "sampling_from_probs",
    "softmax",
    "top_k_mask_logits",
    "top_k_renorm_probs",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_probs",
    "top_p_sampling_from_probs",
]


def _refuse_uniform_samples(function: Callable) -> Callable:
    """A call with `uniform_samples=` is of FlashInfer's older convention: say what to write instead."""

    @functools.wraps(function)
    def checked(*args, **kwargs):
        if "uniform_samples" in kwargs:
            raise TypeError(_old_convention(function.__name__))
        return function(*args, **kwargs)

    return checked


def _old_convention(name: str) -> str:
    return (
        f"fi_ops.{name}: uniform_samples is FlashInfer's older convention; pass your numbers as uniform= (float32, one a "
        f"draw), or generator= or seed=, and the other arguments without it"
    )


def _draw(
    name: str,
    input: torch.Tensor,
    indices: torch.Tensor | None,
    filters: dict,
    check_nan: bool,
    generator,
    seed,
    offset,
    uniform: torch.Tensor | None,
    return_valid: bool,
):
    """Call op `name` with `filters` by name (numbers or tensors); the rest is as the samplers have it."""
    if indices is not None and (not isinstance(indices, torch.Tensor) or indices.dtype.is_floating_point):
        raise TypeError(_old_convention(name))
    if check_nan and torch.isnan(input).any():
        raise ValueError(f"fi_ops.{name}: the input has NaN; leave check_nan out to get id 0 and valid False there")
    batch = input.shape[0] if indices is None else indices.shape[0]
    if uniform is None:
        uniform = uniform_numbers(name, batch, 1, input.device, generator, seed, offset, None)[:, 0]
    else:
        uniform_numbers(name, batch, 1, input.device, generator, seed, offset, uniform)
    arguments = {}
    for key, value in filters.items():
        if key in ("top_k", "top_p", "min_p", "temperature"):
            arguments[f"{key}_arr"], arguments[key] = array_or_number(value, 0 if key in ("top_k", "min_p") else 1.0)
        else:
            arguments[key] = value
    samples, valid = getattr(torch.ops.fi, name)(input, uniform, **arguments, indices=indices)
    return (samples, valid) if return_valid else samples


def _joint_or_first(name: str, filter_apply_order: str) -> bool:
    require(
        name,
        filter_apply_order in ("top_k_first", "joint"),
        f"filter_apply_order must be 'top_k_first' or 'joint', got {filter_apply_order!r}; pass one of the two",
    )
    return filter_apply_order == "top_k_first"


Draws = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@_refuse_uniform_samples
def sampling_from_probs(
    probs: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    *,
    uniform: torch.Tensor | None = None,
    return_valid: bool = False,
) -> Draws:
    """Draw one token a row from probabilities. Arguments: see the module.

    Source: FlashInfer `sampling_from_probs`.
    """
    return _draw("sampling_from_probs", probs, indices, {}, check_nan, generator, seed, offset, uniform, return_valid)


@_refuse_uniform_samples
def sampling_from_logits(
    logits: torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    *,
    uniform: torch.Tensor | None = None,
    return_valid: bool = False,
) -> Draws:
    """Draw one token a row from `softmax(logits)`, which is not written out. Arguments: see the module.

    Source: FlashInfer `sampling_from_logits`.
    """
    return _draw("sampling_from_logits", logits, indices, {}, check_nan, generator, seed, offset, uniform, return_valid)


@_refuse_uniform_samples
def top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_p: float | torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    *,
    uniform: torch.Tensor | None = None,
    return_valid: bool = False,
) -> Draws:
    """Draw one token a row from the top-p of probabilities. The other arguments: see the module.

    Args:
        top_p: keep the smallest set of largest tokens whose mass reaches top_p, a number or float32 `[batch]`; >= 1 keeps
            all, 0 is argmax.

    Source: FlashInfer `top_p_sampling_from_probs`.
    """
    filters = {"top_p": top_p}
    return _draw(
        "top_p_sampling_from_probs", probs, indices, filters, check_nan, generator, seed, offset, uniform, return_valid
    )


@_refuse_uniform_samples
def top_k_sampling_from_probs(
    probs: torch.Tensor,
    top_k: int | torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    *,
    ties: str = "exact",
    uniform: torch.Tensor | None = None,
    return_valid: bool = False,
) -> Draws:
    """Draw one token a row from the top-k of probabilities. The other arguments: see the module.

    Args:
        top_k: keep the k largest, an int or an integer tensor `[batch]`; <= 0 or >= vocab_size keeps all.
        ties: what top-k does with tokens equal to the k-th: "exact" keeps k tokens, lowest ids first; "threshold" all.

    Source: FlashInfer `top_k_sampling_from_probs` (which accepts all ties at the k-th).
    """
    filters = {"top_k": top_k, "top_k_ties": ties}
    return _draw(
        "top_k_sampling_from_probs", probs, indices, filters, check_nan, generator, seed, offset, uniform, return_valid
    )


@_refuse_uniform_samples
def min_p_sampling_from_probs(
    probs: torch.Tensor,
    min_p: float | torch.Tensor,
    indices: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    *,
    uniform: torch.Tensor | None = None,
    return_valid: bool = False,
) -> Draws:
    """Draw one token a row from what min-p keeps of probabilities. The other arguments: see the module.

    Args:
        min_p: keep `p >= min_p * max(p)`, a number or float32 `[batch]`.

    Source: FlashInfer `min_p_sampling_from_probs`.
    """
    filters = {"min_p": min_p}
    return _draw(
        "min_p_sampling_from_probs", probs, indices, filters, check_nan, generator, seed, offset, uniform, return_valid
    )


@_refuse_uniform_samples
def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    *,
    min_p: float | torch.Tensor = 0.0,
    min_p_first: bool = False,
    ties: str = "exact",
    uniform: torch.Tensor | None = None,
    return_valid: bool = False,
) -> Draws:
    """Draw one token a row from probabilities, after top-k, min-p and top-p.

    The other arguments: see the module.

    Args:
        top_k: keep the k largest, an int or an integer tensor `[batch]`; <= 0 or >= vocab_size keeps all.
        top_p: keep the smallest set of largest tokens whose mass reaches top_p, a number or float32 `[batch]`; >= 1 keeps
            all, 0 is argmax.
        filter_apply_order: "top_k_first" (top-p's mass is that of what top-k left) or "joint" (that of the whole row).
        min_p: keep `p >= min_p * max(p)`, a number or float32 `[batch]`.
        min_p_first: whether top-p's mass is without what min-p removes (vLLM's order) or with it (Hugging Face's).
        ties: what top-k does with tokens equal to the k-th: "exact" keeps k tokens, lowest ids first; "threshold" all.

    Source: FlashInfer `top_k_top_p_sampling_from_probs` (which accepts all ties at the k-th).
    """
    top_k_first = _joint_or_first("top_k_top_p_sampling_from_probs", filter_apply_order)
    filters = {
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "top_k_first": top_k_first,
        "min_p_first": min_p_first,
        "top_k_ties": ties,
    }
    return _draw(
        "top_k_top_p_sampling_from_probs",
        probs,
        indices,
        filters,
        check_nan,
        generator,
        seed,
        offset,
        uniform,
        return_valid,
    )


@_refuse_uniform_samples
def top_k_top_p_sampling_from_logits(
    logits: torch.Tensor,
    top_k: int | torch.Tensor,
    top_p: float | torch.Tensor,
    indices: torch.Tensor | None = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    check_nan: bool = False,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    min_p_first: bool = False,
    ties: str = "exact",
    uniform: torch.Tensor | None = None,
    return_valid: bool = False,
) -> Draws:
    """Draw one token a row from logits, after temperature, top-k, min-p and top-p; no probabilities are written out.

    The other arguments: see the module.

    Args:
        top_k: keep the k largest, an int or an integer tensor `[batch]`; <= 0 or >= vocab_size keeps all.
        top_p: keep the smallest set of largest tokens whose mass reaches top_p, a number or float32 `[batch]`; >= 1 keeps
            all, 0 is argmax.
        filter_apply_order: "top_k_first" (top-p's mass is that of what top-k left) or "joint" (that of the whole row).
        temperature: a number or float32 `[batch]`; logits are divided by it, 0 is argmax.
        min_p: keep `p >= min_p * max(p)`, a number or float32 `[batch]`.
        min_p_first: whether top-p's mass is without what min-p removes (vLLM's order) or with it (Hugging Face's).
        ties: what top-k does with tokens equal to the k-th: "exact" keeps k tokens, lowest ids first; "threshold" all.

    Source: FlashInfer `top_k_top_p_sampling_from_logits` (which accepts all ties at the k-th).
    """
    top_k_first = _joint_or_first("top_k_top_p_sampling_from_logits", filter_apply_order)
    filters = {
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "temperature": temperature,
        "top_k_first": top_k_first,
        "min_p_first": min_p_first,
        "top_k_ties": ties,
    }
    return _draw(
        "top_k_top_p_sampling_from_logits",
        logits,
        indices,
        filters,
        check_nan,
        generator,
        seed,
        offset,
        uniform,
        return_valid,
    )


@_refuse_uniform_samples
def chain_speculative_sampling(
    draft_probs: torch.Tensor,
    draft_token_ids: torch.Tensor,
    target_probs: torch.Tensor,
    maybe_output_accepted_token_num: torch.Tensor | None = None,
    maybe_output_emitted_draft_token_num: torch.Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | torch.Tensor | None = None,
    offset: int | torch.Tensor | None = None,
    *,
    uniform: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Speculative sampling of a chain of draft tokens: the output is distributed as the target model's tokens.

    Args:
        draft_probs: float32 `[batch, num_speculative_tokens, vocab_size]`, what the draft tokens were drawn from.
        draft_token_ids: `[batch, num_speculative_tokens]` int32 or int64.
        target_probs: float32 `[batch, num_speculative_tokens + 1, vocab_size]`.
        maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num: int32 `[batch]`: the counts below are added
            to them, and they are what is returned.
        deterministic: accepted and without effect.
        generator, seed, offset: see the module.
        uniform: float32 `[batch, num_speculative_tokens + 1]` in [0, 1) in place of them: a number for each draft token's
            test and one for the last draw.

    Returns:
        output_token_ids `[batch, num_speculative_tokens + 1]` of draft_token_ids' dtype: the accepted draft tokens, one
        more token, then -1; how many draft tokens pass the test each by itself, int32 `[batch]`; how many of them the
        output has, int32 `[batch]`.

    Source: FlashInfer `chain_speculative_sampling`.
    """
    name = "chain_speculative_sampling"
    if target_probs.dim() == 2:  # [batch, num_speculative_tokens + 1]: uniform_samples' place
        raise TypeError(_old_convention(name))
    rows, columns = target_probs.shape[:2]
    uniform = uniform_numbers(name, rows, columns, target_probs.device, generator, seed, offset, uniform)
    output, accepted, emitted = torch.ops.fi.chain_speculative_sampling(
        draft_probs, draft_token_ids, uniform, target_probs
    )
    if maybe_output_accepted_token_num is not None:
        accepted = maybe_output_accepted_token_num.add_(accepted)
    if maybe_output_emitted_draft_token_num is not None:
        emitted = maybe_output_emitted_draft_token_num.add_(emitted)
    return output, accepted, emitted
