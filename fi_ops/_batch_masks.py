"""Custom masks of a batch as the ops take them: bits, each request's from a byte of its own on, packed without a sync."""

from __future__ import annotations

import torch

from ._arguments import refuse

__all__ = ["check_mask_length", "indptr_of", "pack_masks", "packed_indptr"]


def indptr_of(lengths: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The running sum of lengths, from 0 on: `[batch] -> [batch + 1]`."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=dtype), (1, 0))


def packed_indptr(num_bits: torch.Tensor) -> torch.Tensor:
    """Where each request's bytes begin, int64 `[batch + 1]`, for its number of bits (int64 `[batch]`)."""
    return indptr_of((num_bits + 7) // 8)


def pack_masks(mask: torch.Tensor, num_bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack flattened masks: bool `[sum(num_bits)]` (or longer: what lies behind is left out) and int64 `[batch]`, on one device.

    Returns (custom_mask, mask_indptr) as `paged_attention` takes them. The number of bytes depends on num_bits' values, so
    room is made for the most that there can be, and one more segment of zeros, behind the last request's, fills it.
    """
    batch, num_elements = num_bits.shape[0], mask.shape[0]
    size = (num_elements + 7 * batch) // 8
    room = torch.nn.functional.pad(mask.to(torch.bool), (0, 7 * batch))
    mask_indptr = packed_indptr(num_bits)
    filler = 8 * (size - mask_indptr[-1:])
    segments = indptr_of(torch.cat((num_bits, filler)))
    packed_segments = torch.cat((mask_indptr, torch.full_like(filler, size)))
    return torch.ops.fi.segment_packbits(room, segments, packed_segments, size, "little"), mask_indptr


def check_mask_length(function: str, mask: torch.Tensor, num_bits: torch.Tensor) -> None:
    """Where the lengths are on the host: the mask must have exactly their bits."""
    if num_bits.device.type == "cpu" and not torch.compiler.is_compiling():
        want = int(num_bits.sum())
        if mask.shape[0] != want:
            refuse(
                function,
                f"custom_mask must have sum(qo_len * kv_len) = {want} elements, got {mask.shape[0]}; flatten and concatenate "
                f"the masks [qo_len, kv_len] of all requests",
            )
