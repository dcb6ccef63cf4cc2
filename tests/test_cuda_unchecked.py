"""Values that nothing checks by default on CUDA: whatever they hold, no kernel reaches outside a tensor."""

from __future__ import annotations

import os

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("FI_OPS_CHECK", "0") not in ("", "0"), reason="FI_OPS_CHECK is set"),
]
DEVICE = "cuda"
FAR = [-1, -(2**31), 2**31 - 1, 100]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_append_leaves_out_slots_outside_the_cache(index):
    key, value = (torch.randn(2, 3, 5, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    caches = [torch.zeros(2, 3, 100, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    torch.ops.fi.append_kv(*caches, key, value, torch.tensor([*FAR, 7], device=DEVICE, dtype=index))
    for cache, new in zip(caches, (key, value), strict=True):
        assert torch.equal(cache[:, :, 7], new[:, :, 4])
        assert cache.count_nonzero() == new[:, :, 4].count_nonzero()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rope_takes_the_nearest_row(index):
    q, k = (torch.randn(1, h, len(FAR), 32, device=DEVICE) for h in (4, 2))
    cos, sin = (torch.rand(1, 100, 16, device=DEVICE) for _ in range(2))
    got = torch.ops.fi.rope(q, k, cos, sin, torch.tensor(FAR, device=DEVICE, dtype=index))
    near = torch.ops.fi.rope(q, k, cos, sin, torch.tensor(FAR, device=DEVICE).clamp(0, 99))
    assert all(torch.equal(a, b) for a, b in zip(got, near, strict=True))


def test_rope_without_table_rows():
    q, k = (torch.randn(1, 2, 3, 32, device=DEVICE) for _ in range(2))
    empty = torch.empty(1, 0, 16, device=DEVICE)
    torch.ops.fi.rope(q, k, empty, empty, torch.zeros(3, device=DEVICE, dtype=torch.int64))
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("input_indptr", "output_indptr", "output_len"),
    [
        ([0, 2**60, -5], [0, 2, 4], 4),
        ([-(2**60), 2**60], [-(2**40), 2**40], 9),
        ([5, 3, 1], [9, 4, 2], 6),
        ([0, 8], [0, 1], 1000),
        ([0], [0], 5),
    ],
)
def test_packing_by_impossible_segments(input_indptr, output_indptr, output_len):
    """Bytes that no segment covers are 0 or packed from x; all are written."""
    x = torch.ones(64, dtype=torch.bool, device=DEVICE)
    indptrs = [torch.tensor(values, device=DEVICE) for values in (input_indptr, output_indptr)]
    first = torch.ops.fi.segment_packbits(x, *indptrs, output_len)
    assert first.shape == (output_len,)
    assert torch.equal(torch.ops.fi.segment_packbits(x, *indptrs, output_len), first)


def test_sampling_by_impossible_values():
    probs = torch.rand(3, 2, 5000, device=DEVICE)
    target = torch.rand(3, 3, 5000, device=DEVICE)
    uniform = torch.tensor([[-1.0, 2.0, float("nan")]] * 3, device=DEVICE)
    for bad in (-1, 5000, 2**40):
        ids = torch.full((3, 2), bad, device=DEVICE)
        tokens, accepted, emitted = torch.ops.fi.chain_speculative_sampling(probs, ids, uniform, target)
        assert ((tokens >= -1) & (tokens < 5000)).all() and (accepted == 0).all() and (emitted == 0).all()
        torch.ops.fi.gather_logprobs(target[:, 0], ids[:, 0], 3)
    for bad in (float("nan"), -1.0, float("inf")):
        numbers = torch.full((3,), bad, device=DEVICE)
        tokens, _ = torch.ops.fi.top_p_sampling_from_probs(probs[:, 0], numbers, numbers)
        assert ((tokens >= 0) & (tokens < 5000)).all()
        torch.ops.fi.top_p_renorm_probs(probs[:, 0], numbers)
        torch.ops.fi.softmax(probs[:, 0], numbers)
    torch.cuda.synchronize()
