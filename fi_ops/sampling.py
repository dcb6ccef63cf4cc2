"""Sampling with FlashInfer's names, arguments and defaults (`flashinfer.sampling`), over `torch.ops.fi`.

The random numbers are made here by ordinary torch ops and handed to the kernel as a tensor, so that `torch.compile`,
functionalization and graph capture treat them as any other value:

- `uniform=`: your own numbers in [0, 1), one a draw.
- `seed=` (and `offset=`): a pure function of them, Philox4x32-10 (below); works under `torch.compile(fullgraph=True)`.
- else `torch.rand` from `generator` or the default generator (a generator argument is for eager: it breaks graphs).
"""

from __future__ import annotations

import torch

from ._arguments import require

__all__ = ["philox_uniform", "top_k_top_p_sampling_from_logits"]

_MASK = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def _philox_4x32_10(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ten rounds on four counter words and two key words of 32 bits, each an int64 tensor; no product overflows."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    even, odd, keys = torch.stack([x0, x2]), torch.stack([x1, x3]), torch.stack([k0, k1])
    low = torch.tensor([[m & 0xFFFF] for m in _PHILOX_MULTIPLIERS], device=x0.device)
    high = torch.tensor([[m >> 16] for m in _PHILOX_MULTIPLIERS], device=x0.device)
    weyl = torch.tensor([[w] for w in _PHILOX_WEYL], device=x0.device)
    for _ in range(10):
        by_low, by_high = even * low, even * high
        product_high = (by_high + (by_low >> 16)) >> 16
        product_low = (by_low + ((by_high & 0xFFFF) << 16)) & _MASK
        even, odd = product_high.flip(0) ^ odd ^ keys, product_low.flip(0)
        keys = (keys + weyl) & _MASK
    return [even[0], odd[0], even[1], odd[1]]


def philox_uniform(
    seed: int | torch.Tensor, offset: int | torch.Tensor, batch: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """`batch` float32 numbers in [0, 1), a pure function of seed and offset: Philox4x32-10.

    The key is the seed (64 bits), the counter (offset, stream), the number the top 24 bits of the first word. An int or
    a tensor of one element seeds the whole batch: stream is the draw's place in it. A seed tensor `[batch]` seeds each
    draw by itself: stream is 0, so a draw does not depend on the batch that it is in.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    per_draw = isinstance(seed, torch.Tensor) and seed.shape[0] != 1

    def words(value: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(value, torch.Tensor):
            value = (value + 2**63) % 2**64 - 2**63  # a Python int, as the 64 bits of an int64
            value = torch.full((1,), value, dtype=torch.int64, device=device)
        value = value.to(torch.int64).expand(batch)
        return value & _MASK, (value >> 32) & _MASK

    stream = torch.arange(batch, device=device) * (0 if per_draw else 1)
    word = _philox_4x32_10([*words(offset), stream & _MASK, torch.zeros_like(stream)], [*words(seed)])[0]
    return (word >> 8).float() * 2.0**-24


def _uniform(name: str, batch: int, device, generator, seed, offset) -> torch.Tensor:
    if seed is None:
        require(name, offset is None, "offset must come with a seed, got an offset alone; pass seed too")
        return torch.rand(batch, generator=generator, device=device)
    require(name, generator is None, "seed and generator must not both be given; pass one of them")
    offset = 0 if offset is None else offset
    for arg, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, torch.Tensor):
            fits = value.dim() == 1 and (value.shape[0] == 1 or value.shape[0] == batch)
            wanted, got = (
                f"an int or an integer tensor [1] or [batch] = [{batch}]",
                f"{value.dtype} {list(value.shape)}",
            )
            fits = fits and not value.dtype.is_floating_point
            require(name, fits, f"{arg} must be {wanted}, got {got}; reshape it")
    return philox_uniform(seed, offset, batch, device)


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
    uniform: torch.Tensor | None = None,
    return_valid: bool = False,
    ties: str = "exact",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row from logits, after temperature, top-k, min-p and top-p; no probabilities are written out.

    Args:
        logits: `[rows, vocab_size]` float32, bfloat16 or float16, last dimension contiguous.
        top_k: keep the k largest, an int or an integer tensor `[batch]`; <= 0 or >= vocab_size keeps all.
        top_p: keep the smallest set of largest tokens whose mass reaches top_p, a number or float32 `[batch]`; >= 1
            keeps all, 0 is argmax.
        indices: `[batch]` int32 or int64: draw i is from row `indices[i]`; default: batch = rows, row i.
        filter_apply_order: "top_k_first" (top-p's mass is that of what top-k left) or "joint" (that of the whole row).
        deterministic: accepted and without effect: results never depend on the batch or the thread count.
        generator: for `torch.rand`; eager only.
        check_nan: ValueError if logits have NaN (reads the values; without it such rows are id 0, valid False).
        seed, offset: ints or int64 tensors `[1]` or `[batch]`: see `philox_uniform`. A tensor `[batch]` of seeds makes
            each row's draw a function of its own logits and seed alone. Pass a new offset for new numbers.
        temperature: a number or float32 `[batch]`; logits are divided by it, 0 is argmax.
        min_p: keep `p >= min_p * max(p)`, a number or float32 `[batch]`.
        uniform: float32 `[batch]` in [0, 1), in place of generator and seed.
        return_valid: also return which rows could be sampled (bool `[batch]`).
        ties: what top-k does with tokens equal to the k-th: "exact" keeps k tokens, lowest ids first; "threshold" all.

    Returns:
        `[batch]` int32, or the dtype of indices; with `return_valid` a tuple with the bool tensor.

    Source: FlashInfer `top_k_top_p_sampling_from_logits` (which accepts all ties at the k-th).
    """
    name = "top_k_top_p_sampling_from_logits"
    require(
        name,
        filter_apply_order in ("top_k_first", "joint"),
        f"filter_apply_order must be 'top_k_first' or 'joint', got {filter_apply_order!r}; pass one of the two",
    )
    if check_nan and torch.isnan(logits).any():
        raise ValueError(
            f"fi_ops.{name}: logits have NaN; leave check_nan out to get id 0 and valid False for such rows"
        )
    if uniform is None:
        batch = logits.shape[0] if indices is None else indices.shape[0]
        uniform = _uniform(name, batch, logits.device, generator, seed, offset)
    else:
        require(
            name, generator is None and seed is None, "uniform must come alone, got a generator or a seed too; drop one"
        )

    def split(value, default):
        return (value, default) if isinstance(value, torch.Tensor) else (None, value)

    top_k_arr, top_k = split(top_k, 0)
    top_p_arr, top_p = split(top_p, 1.0)
    min_p_arr, min_p = split(min_p, 0.0)
    temperature_arr, temperature = split(temperature, 1.0)
    samples, valid = torch.ops.fi.top_k_top_p_sampling_from_logits(
        logits, uniform, top_k_arr, top_k, top_p_arr, top_p, min_p_arr, min_p, temperature_arr, temperature, indices,
        top_k_first=filter_apply_order == "top_k_first", top_k_ties=ties,
    )  # fmt: skip
    return (samples, valid) if return_valid else samples
