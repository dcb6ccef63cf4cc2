"""Uniform random numbers for samplers, made by ordinary torch ops: what compiles and captures graphs sees nothing special.

- `seed=` (and `offset=`): a pure function of them, Philox4x32-10 (below); works under `torch.compile(fullgraph=True)`.
- else `torch.rand` from `generator` or the default generator (a generator argument is for eager: it breaks graphs).
"""

from __future__ import annotations

import torch

from ._arguments import require

_MASK = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def _philox_4x32_10(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Ten rounds on four counter words and two key words of 32 bits, each an int64 tensor; no product overflows."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    even, odd, keys = torch.stack([x0, x2]), torch.stack([x1, x3]), torch.stack([k0, k1])

    def column(*values: int) -> torch.Tensor:
        # (torch.tensor would copy them from the host: a wait for the device, which no CUDA graph can capture.)
        return torch.stack([torch.full((1,), value, dtype=torch.int64, device=x0.device) for value in values])

    low = column(*(m & 0xFFFF for m in _PHILOX_MULTIPLIERS))
    high = column(*(m >> 16 for m in _PHILOX_MULTIPLIERS))
    weyl = column(*_PHILOX_WEYL)
    for _ in range(10):
        by_low, by_high = even * low, even * high
        product_high = (by_high + (by_low >> 16)) >> 16
        product_low = (by_low + ((by_high & 0xFFFF) << 16)) & _MASK
        even, odd = product_high.flip(0) ^ odd ^ keys, product_low.flip(0)
        keys = (keys + weyl) & _MASK
    return [even[0], odd[0], even[1], odd[1]]


def _philox_numbers(seed, offset, rows: int, columns: int, device) -> torch.Tensor:
    """`philox_uniform`'s numbers, `[rows, columns]`: the stream is the place in it, in its row where each has a seed."""
    per_row = isinstance(seed, torch.Tensor) and seed.shape[0] != 1

    def words(value: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(value, torch.Tensor):
            value = (value + 2**63) % 2**64 - 2**63  # a Python int, as the 64 bits of an int64
            value = torch.full((1,), value, dtype=torch.int64, device=device)
        value = value.to(torch.int64)[:, None].expand(rows, columns).reshape(-1)
        return value & _MASK, (value >> 32) & _MASK

    stream = torch.arange(columns, device=device).expand(rows, columns)
    if not per_row:
        stream = stream + columns * torch.arange(rows, device=device)[:, None]
    stream = stream.reshape(-1)
    word = _philox_4x32_10([*words(offset), stream & _MASK, torch.zeros_like(stream)], [*words(seed)])[0]
    return ((word >> 8).float() * 2.0**-24).view(rows, columns)


def philox_uniform(
    seed: int | torch.Tensor, offset: int | torch.Tensor, batch: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """`batch` float32 numbers in [0, 1), a pure function of seed and offset: Philox4x32-10.

    The key is the seed (64 bits), the counter (offset, stream), the number the top 24 bits of the first word. An int or
    a tensor of one element seeds the whole batch: stream is the draw's place in it. A seed tensor `[batch]` seeds each
    draw by itself: stream is 0, so a draw does not depend on the batch that it is in.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    return _philox_numbers(seed, offset, batch, 1, device)[:, 0]


def uniform_numbers(
    name: str, rows: int, columns: int, device, generator, seed, offset, uniform: torch.Tensor | None
) -> torch.Tensor:
    """What a function `name` draws with, `[rows, columns]`: its `uniform` as it is, else made from the other arguments."""
    if uniform is not None:
        alone = generator is None and seed is None and offset is None
        require(name, alone, "uniform must come alone, got a generator or a seed too; drop one")
        return uniform
    if seed is None:
        require(name, offset is None, "offset must come with a seed, got an offset alone; pass seed too")
        return torch.rand(rows, columns, generator=generator, device=device)
    require(name, generator is None, "seed and generator must not both be given; pass one of them")
    offset = 0 if offset is None else offset
    for arg, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, torch.Tensor):
            fits = value.dim() == 1 and (value.shape[0] == 1 or value.shape[0] == rows)
            wanted = f"an int or an integer tensor [1] or [batch] = [{rows}]"
            fits = fits and not value.dtype.is_floating_point
            require(name, fits, f"{arg} must be {wanted}, got {value.dtype} {list(value.shape)}; reshape it")
    return _philox_numbers(seed, offset, rows, columns, device)
