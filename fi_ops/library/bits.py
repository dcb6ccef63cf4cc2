"""Packing of booleans into bits (attention masks): x `[num_elements]`, bool or uint8 (not 0 is 1), into uint8.

bitorder "big": element 0 is the highest bit of byte 0 (numpy.packbits' default); "little": the lowest. The last byte is padded
with 0. The functions of FlashInfer's `quantization` module.
"""

from __future__ import annotations

import itertools

import torch

from ._checks import check, check_dtype, check_last_dim_contiguous, check_ndim, check_same_device, check_shape
from ._spec import INDEX_TYPES, Cost, ErrorSample, Sample, op


def _check_bits(name: str, x, bitorder: str) -> None:
    check_dtype(name, "x", x, (torch.bool, torch.uint8))
    check_ndim(name, "x", x, 1, "[num_elements]")
    check_last_dim_contiguous(name, "x", x)
    check(
        name, bitorder in ("big", "little"), lambda: f"bitorder must be big or little, got {bitorder}; pass one of them"
    )


def _packbits_fake(x, bitorder="big"):
    _check_bits("packbits", x, bitorder)
    return torch.empty(((x.shape[0] + 7) // 8,), dtype=torch.uint8, device=x.device)


def _segment_fake(x, input_indptr, output_indptr, output_len, bitorder="big"):
    name = "segment_packbits"
    _check_bits(name, x, bitorder)
    check_same_device(name, "input_indptr", input_indptr, "x", x)
    check_dtype(name, "input_indptr", input_indptr, INDEX_TYPES)
    check_ndim(name, "input_indptr", input_indptr, 1, "[num_segments + 1]")
    check(name, input_indptr.shape[0] >= 1, lambda: "input_indptr must be [num_segments + 1], got [0]; start it with 0")
    check_same_device(name, "output_indptr", output_indptr, "x", x)
    check_dtype(name, "output_indptr", output_indptr, INDEX_TYPES)
    check_shape(name, "output_indptr", output_indptr, input_indptr.shape, "input_indptr's shape")
    check(
        name,
        output_len >= 0,
        lambda: f"output_len must be 0 or more, got {output_len}; pass output_indptr's last value",
    )
    return torch.empty((output_len,), dtype=torch.uint8, device=x.device)


def _bits(device, dtype, n: int):
    return (torch.randint(0, 3, (n,), device=device) * torch.randint(0, 86, (n,), device=device)).to(dtype)


def _packbits_samples(device, dtype):
    for n in (0, 1, 7, 8, 9, 64, 1000, 300_001):
        for bitorder in ("big", "little"):
            yield Sample((_bits(device, dtype, n), bitorder), name=f"{n} elements, {bitorder}")
    yield Sample((_bits(device, dtype, 200)[3:90],), name="unaligned slice, default order")


def _indptr(device, lengths, index) -> tuple[torch.Tensor, torch.Tensor]:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed = torch.tensor([0, *((n + 7) // 8 for n in lengths)]).cumsum(0)
    return ends.to(device, index), packed.to(device, index)


def _segment_samples(device, dtype):
    for lengths in ([4, 3, 4], [0, 9, 0, 64, 1, 0], [130], [], [100] * 3000):
        for index in (torch.int32, torch.int64):
            ends, packed = _indptr(device, lengths, index)
            args = (_bits(device, dtype, int(ends[-1])), ends, packed, int(packed[-1]))
            yield Sample((*args, "little"), name=f"{len(lengths)} segments, {index}, little")
            yield Sample(args, name=f"{len(lengths)} segments, {index}, big")
    ends, packed = _indptr(device, [5, 17], torch.int64)
    strided = ends.repeat_interleave(2)[::2] + 3
    yield Sample((_bits(device, dtype, 40), strided, packed.int(), int(packed[-1])), name="a part of x, strided indptr")


def _packbits_errors(device):
    x = torch.ones(16, dtype=torch.bool, device=device)
    yield ErrorSample((x.float(),), r"x must be bool or uint8, got float32; convert")
    yield ErrorSample((x.view(2, 8),), r"x must be \[num_elements\], got \[2, 8\]; reshape")
    yield ErrorSample((x[::2],), r"x must have a contiguous last dimension, got strides \[2\]; call")
    yield ErrorSample((x, "middle"), r"bitorder must be big or little, got middle; pass")


def _segment_errors(device):
    x = torch.ones(16, dtype=torch.bool, device=device)
    ends, packed = _indptr(device, [5, 9], torch.int64)
    yield ErrorSample((x.int(), ends, packed, 3), r"x must be bool or uint8, got int32; convert")
    yield ErrorSample((x, ends, packed, 3, "BIG"), r"bitorder must be big or little, got BIG; pass")
    yield ErrorSample((x, ends.float(), packed, 3), r"input_indptr must be int32 or int64, got float32; convert")
    yield ErrorSample((x, ends[None], packed, 3), r"input_indptr must be \[num_segments \+ 1\], got \[1, 3\]; reshape")
    yield ErrorSample(
        (x, ends[:0], packed[:0], 0), r"input_indptr must be \[num_segments \+ 1\], got \[0\]; start it with 0"
    )
    yield ErrorSample((x, ends, packed.byte(), 3), r"output_indptr must be int32 or int64, got uint8; convert")
    yield ErrorSample((x, ends, packed[:2], 3), r"output_indptr must be input_indptr's shape = \[3\], got \[2\]; check")
    yield ErrorSample((x, ends, packed, -1), r"output_len must be 0 or more, got -1; pass output_indptr's last value")
    yield ErrorSample(
        (x[:10], ends, packed, 3), r"input_indptr must lie in x's 10 elements, got 0 to 14; pass", needs_values=True
    )
    yield ErrorSample(
        (x, ends, packed, 4), r"output_indptr must go from 0 to output_len 4, got 0 to 3; pass", needs_values=True
    )
    falling = ends.new_tensor([0, 12, 10])
    yield ErrorSample(
        (x, falling, ends.new_tensor([0, 2, 3]), 3),
        r"input_indptr must not decrease, got 12 before 10",
        needs_values=True,
    )
    off = packed.new_tensor([0, 2, 3])
    yield ErrorSample(
        (x, ends, off, 3), r"output_indptr must give segment 0 its 1 bytes, got 2; make it", needs_values=True
    )


def _packbits_cost(x, bitorder="big"):
    return Cost(bytes=x.numel() + x.numel() // 8)


def _segment_cost(x, input_indptr, output_indptr, output_len, bitorder="big"):
    return Cost(bytes=x.numel() + output_len + input_indptr.nbytes + output_indptr.nbytes)


def _pack(x: torch.Tensor, bitorder: str) -> torch.Tensor:
    bits = torch.nn.functional.pad((x != 0).int(), (0, -x.shape[0] % 8)).view(-1, 8)
    exponents = torch.arange(8, device=x.device)
    return (bits << (exponents if bitorder == "little" else 7 - exponents)).sum(1).to(torch.uint8)


_SPEC = {"dtypes": (torch.bool, torch.uint8), "exact": True}


@op(
    '(Tensor x, str bitorder="big") -> Tensor',
    fake=_packbits_fake,
    samples=_packbits_samples,
    errors=_packbits_errors,
    cost=_packbits_cost,
    **_SPEC,
)
def packbits(x, bitorder="big"):
    """x packed into bits, `[ceil(num_elements / 8)]`."""
    return _pack(x, bitorder)


@op(
    '(Tensor x, Tensor input_indptr, Tensor output_indptr, SymInt output_len, str bitorder="big") -> Tensor',
    fake=_segment_fake,
    samples=_segment_samples,
    errors=_segment_errors,
    cost=_segment_cost,
    **_SPEC,
)
def segment_packbits(x, input_indptr, output_indptr, output_len, bitorder="big"):
    """Segment `x[input_indptr[i] : input_indptr[i + 1]]` packed by itself into bytes `output_indptr[i] : output_indptr[i + 1]`.

    indptr: int32 or int64 `[num_segments + 1]`. A segment takes `ceil(length / 8)` bytes, so `output_indptr` is the running sum
    of these and `output_len` its last value (an argument, so that the output's size is known without reading tensor data).
    """
    ends = input_indptr.tolist()
    parts = [_pack(x[a:b], bitorder) for a, b in itertools.pairwise(ends)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=x.device)
