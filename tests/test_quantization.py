"""Bit packing against numpy, and FlashInfer's `quantization` functions."""

from __future__ import annotations

import pytest
import torch

from fi_ops import quantization

np = pytest.importorskip("numpy")


@pytest.mark.parametrize("bitorder", ["big", "little"])
def test_packbits_is_numpys(bitorder):
    for n in (*range(140), 4097, 200_003):
        x = torch.rand(n) < 0.5
        got = quantization.packbits(x, bitorder)
        assert np.array_equal(got.numpy(), np.packbits(x.numpy(), bitorder=bitorder)), n
    x = torch.tensor([0.0, 0.5, -2.0, 0.0])
    assert quantization.packbits(x).tolist() == [0b01100000]
    assert quantization.packbits(x.int() + 2).tolist() == [0b11010000]


def test_flashinfer_examples():
    x = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    assert quantization.packbits(x).tolist() == [0b10110011]
    x = torch.tensor([1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1], dtype=torch.bool)
    packed, indptr = quantization.segment_packbits(x, torch.tensor([0, 4, 7, 11]), bitorder="big")
    assert packed.tolist() == [0b10110000, 0b00100000, 0b11010000]
    assert indptr.tolist() == [0, 1, 2, 3] and indptr.dtype == torch.int32


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_segments_are_packed_one_by_one(bitorder, index):
    lengths = torch.randint(0, 200, (300,))
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(index)
    x = torch.rand(int(ends[-1])) < 0.3
    packed, indptr = quantization.segment_packbits(x, ends, bitorder)
    assert packed.shape == (int(indptr[-1]),)
    for i in range(300):
        mine = packed[indptr[i] : indptr[i + 1]].numpy()
        assert np.array_equal(mine, np.packbits(x[ends[i] : ends[i + 1]].numpy(), bitorder=bitorder))


def test_refusals():
    x = torch.ones(10, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"indptr must be \[num_segments \+ 1\], got \[0\]"):
        quantization.segment_packbits(x, torch.tensor([], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="input_indptr must lie in x's 10 elements, got 0 to 12"):
        quantization.segment_packbits(x, torch.tensor([0, 12]))
    with pytest.raises(RuntimeError, match="input_indptr must not decrease, got 8 before 3"):
        quantization.segment_packbits(x, torch.tensor([0, 8, 3]))
    with pytest.raises(RuntimeError, match="bitorder must be big or little, got middle"):
        quantization.packbits(x, "middle")


def test_compiles():
    x = torch.rand(100) < 0.5
    ends, out = torch.tensor([0, 30, 100]), torch.tensor([0, 4, 13])

    def call(x, ends, out):
        return quantization.packbits(x, "little"), torch.ops.fi.segment_packbits(x, ends, out, 13)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x, ends, out)
    assert all(torch.equal(a, b) for a, b in zip(compiled, call(x, ends, out), strict=True))
