"""Bit packing with FlashInfer's names, arguments and defaults (`flashinfer.quantization`), over `torch.ops.fi`."""

from __future__ import annotations

import torch

from ._arguments import require

__all__ = ["packbits", "segment_packbits"]


def packbits(x: torch.Tensor, bitorder: str = "big") -> torch.Tensor:
    """Pack booleans into bits, as numpy.packbits does.

    Args:
        x: `[num_elements]`, any dtype; not 0 is 1.
        bitorder: "big" (element 0 is the highest bit of byte 0) or "little" (the lowest).

    Returns:
        uint8 `[ceil(num_elements / 8)]`; the last byte is padded with 0.

    Raises:
        RuntimeError: x is not one-dimensional and contiguous, or bitorder is neither.

    Source: FlashInfer `packbits`.
    """
    return torch.ops.fi.packbits(x.to(torch.bool), bitorder)


def segment_packbits(x: torch.Tensor, indptr: torch.Tensor, bitorder: str = "big") -> tuple[torch.Tensor, torch.Tensor]:
    """Pack each segment of booleans by itself, so that every segment starts on a byte.

    The output's size depends on indptr's values, so this reads one number back from the device; under
    `torch.compile(fullgraph=True)` call `torch.ops.fi.segment_packbits` with an output length of your own.

    Args:
        x: `[num_elements]`, any dtype; not 0 is 1.
        indptr: int32 or int64 `[num_segments + 1]`; segment i is `x[indptr[i]:indptr[i + 1]]`.
        bitorder: "big" or "little", as in `packbits`.

    Returns:
        y uint8 `[new_indptr[-1]]` and new_indptr int32 `[num_segments + 1]`: segment i is packed into
        `y[new_indptr[i]:new_indptr[i + 1]]`, `ceil(length / 8)` bytes.

    Raises:
        RuntimeError: shapes or dtypes don't fit, indptr decreases or leaves x.

    Source: FlashInfer `segment_packbits`.
    """
    require(
        "segment_packbits",
        indptr.dim() == 1 and indptr.shape[0] >= 1,
        f"indptr must be [num_segments + 1], got {list(indptr.shape)}; start it with 0",
    )
    packed = torch.div(indptr.diff() + 7, 8, rounding_mode="floor").cumsum(0)
    new_indptr = torch.nn.functional.pad(packed, (1, 0)).to(torch.int32)
    output_len = int(new_indptr[-1].item())
    return torch.ops.fi.segment_packbits(x.to(torch.bool), indptr, new_indptr, output_len, bitorder), new_indptr
