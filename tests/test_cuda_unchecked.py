"""Values that nothing checks by default on CUDA: whatever they hold, no kernel reaches outside a tensor.

On a GPU, or with `--emulate-cuda` under FI_EMULATION_CHECK=0 (`test_emulation.py` does so) in the emulator.
"""

from __future__ import annotations

import os

import pytest
import torch

from fi_ops.library import SPECS
from fi_ops.testing import canaries_intact, with_canaries

EMULATED = os.environ.get("FI_EMULATION_CHECK") == "0"
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("FI_OPS_CHECK", "0") not in ("", "0"), reason="FI_OPS_CHECK is set"),
]
pytestmark = [] if EMULATED else ON_GPU
DEVICE = "cpu" if EMULATED else "cuda"
if EMULATED:
    HOPPER = os.environ.get("FI_EMULATION_CAPABILITY") == "90"
else:
    HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
FAR = [-1, -(2**31), 2**31 - 1, 100]


def _wait():
    if not EMULATED:
        torch.cuda.synchronize()


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
    _wait()


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
    _wait()


# ---------------------------------------------------------------------------------------------------- paged caches


def _place(batch_indices, positions, kv_indices, kv_indptr, num_pages, page_size):
    """(token, page, entry) of every token that the table, whatever it holds, places in the cache."""
    for n, (b, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        if not 0 <= b < len(kv_indptr) - 1 or position < 0:
            continue
        begin, end = kv_indptr[b : b + 2].tolist()
        if not 0 <= begin <= end <= len(kv_indices) or position // page_size >= end - begin:
            continue
        page = int(kv_indices[begin + position // page_size])
        if 0 <= page < num_pages:
            yield n, page, position % page_size


def _hostile_tables(index):
    """Good index tensors, then with each far-off number in each place, then all rows of one tensor the same."""
    good = [[0, 0, 1, 1, -1], [4, 5, 0, 1, -1], [3, 1, 5], [0, 2, 3], [2, 2]]
    far = [*FAR, 2, 6, *([2**63 - 1, -(2**63), 2**32, 2**62] if index == torch.int64 else [])]
    yield good
    for which, values in enumerate(good):
        for bad in far:
            for at in range(len(values)):
                yield [v if i != which else [*v[:at], bad, *v[at + 1 :]] for i, v in enumerate(good)]
            yield [v if i != which else [bad] * len(v) for i, v in enumerate(good)]


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_paged_append_leaves_out_what_the_table_places_nowhere(index, rope):
    """All tokens are the same, so that two at one place are no race."""
    token = torch.randn(2, 64, device=DEVICE, dtype=torch.bfloat16)
    new = token.expand(5, 2, 64).contiguous()
    angles = torch.rand(1, 32, device=DEVICE).expand(
        3, 32
    )  # shorter than the positions: the nearest row, here the same
    cos_sin_cache = torch.cat((angles.cos(), angles.sin()), -1)
    rotated, _ = torch.ops.fi.rope(
        token.view(1, 2, 1, 64), token.view(1, 2, 1, 64), *(t[None, :1] for t in cos_sin_cache.chunk(2, -1))
    )
    for values in _hostile_tables(index):
        tensors = [torch.tensor(v, device=DEVICE, dtype=index) for v in values]
        caches = [with_canaries(torch.zeros(6, 4, 2, 64, device=DEVICE, dtype=torch.bfloat16)) for _ in range(2)]
        expected = [torch.zeros_like(c) for c in caches]
        query = new.clone()
        for n, page, entry in _place(*tensors[:4], 6, 4):
            expected[0][page, entry] = rotated.view(2, 64) if rope else token
            expected[1][page, entry] = token
            query[n] = rotated.view(2, 64)
        if rope:
            got = torch.ops.fi.rope_append_paged_kv_cache(
                new, new, new, cos_sin_cache, *tensors[:2], *caches, *tensors[2:]
            )
            assert torch.equal(got, query), values
        else:
            torch.ops.fi.append_paged_kv_cache(new, new, *tensors[:2], *caches, *tensors[2:])
        assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True)), values
        assert all(map(canaries_intact, caches)), values


def test_rope_append_without_table_rows():
    new, zero = torch.randn(1, 2, 64, device=DEVICE), torch.zeros(1, device=DEVICE, dtype=torch.int32)
    caches = [torch.zeros(1, 4, 2, 64, device=DEVICE) for _ in range(2)]
    table = zero, torch.tensor([0, 1], device=DEVICE), zero + 1
    empty = torch.empty(0, 64, device=DEVICE)
    got = torch.ops.fi.rope_append_paged_kv_cache(new, new, new, empty, zero, zero, *caches, *table)
    assert torch.equal(got, new) and torch.equal(caches[0][0, 0], new[0])


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_page_copies_leave_out_pages_outside(index):
    caches = [with_canaries(torch.randn(7, 4, 2, 16, device=DEVICE)) for _ in range(2)]
    before = [c.clone() for c in caches]
    src = torch.tensor([*FAR, 0, 0, 0, 0, 3], device=DEVICE, dtype=index)
    dst = torch.tensor([1, 1, 1, 1, *FAR, 5], device=DEVICE, dtype=index)
    torch.ops.fi.copy_pages(*caches, src, dst)
    for cache, old in zip(caches, before, strict=True):
        old[5] = old[3]
        assert torch.equal(cache, old) and canaries_intact(cache)


@pytest.mark.parametrize("indptr", [[0, 2**60, -5], [-(2**60), 2**60, 2**61], [5, 3, 1], [9, 9, 9], [0, 2, 4]])
@pytest.mark.parametrize("lens", [[-1, -(2**62)], [2**62, 2**31], [3, 1]])
def test_tokens_of_impossible_requests(indptr, lens):
    """Each token has a request and a position, or -1 twice."""
    ends, lens = (torch.tensor(values, device=DEVICE) for values in (indptr, lens))
    batch_indices, positions = torch.ops.fi.get_batch_indices_positions(ends, lens, 7)
    assert ((batch_indices >= 0) == (positions >= 0)).all()
    assert (batch_indices >= -1).all() and (batch_indices < 2).all() and (positions >= -1).all()
    torch.ops.fi.get_seq_lens(ends, lens, 16)
    _wait()


# ---------------------------------------------------------------------------------------------- attention over a batch


def _batch_call(dtype, index=torch.int32):
    """A decode, a prompt and an append over a cache of 40 pages of 16: (arguments, keyword arguments)."""
    qo_lens, kv_lens = [1, 150, 70], [40, 150, 300]
    query = torch.randn(sum(qo_lens), 4, 64, device=DEVICE).to(dtype)
    caches = [torch.randn(40, 16, 2, 64, device=DEVICE).to(dtype) for _ in range(2)]
    pages = [-(-n // 16) for n in kv_lens]
    starts, kv_indptr = (torch.tensor([0, *n], device=DEVICE).cumsum(0).to(index) for n in (qo_lens, pages))
    last = torch.tensor([n - 16 * (count - 1) for n, count in zip(kv_lens, pages, strict=True)], device=DEVICE)
    kv_indices = torch.randperm(40)[: sum(pages)].to(DEVICE, index)
    return (query, *caches, starts, kv_indices, kv_indptr, last.to(index)), {"causal": True}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_keys_that_the_table_places_nowhere(dtype, index):
    """They don't take part, or do so as zeros (the kernel for many queries on Hopper): a query's result is one of the two."""
    args, options = _batch_call(dtype, index)
    spec = SPECS["paged_attention_with_lse"]
    starts, kv_indices, kv_indptr, last = args[3:]
    far = [v for v in (*FAR, 2**32, 2**32 + 3, -(2**62)) if index == torch.int64 or abs(v) <= 2**31]
    bad, bits = kv_indices.clone(), []
    for b, (begin, end) in enumerate(zip(kv_indptr[:-1].tolist(), kv_indptr[1:].tolist(), strict=True)):
        kept = torch.ones(end - begin, 16, dtype=torch.bool)
        for n, value in enumerate(far):
            if (page := begin + 2 * n + 1) < end:
                bad[page] = value if value >= -(2**31) or index == torch.int64 else -1
                kept[page - begin] = False
        rows = int(starts[b + 1] - starts[b])
        row = kept.flatten()[: 16 * (end - begin - 1) + int(last[b])]
        bits.append(row.expand(rows, -1).flatten())
    ends, byte_ends = (
        torch.tensor([0, *sizes], device=DEVICE).cumsum(0)
        for sizes in ([len(x) for x in bits], [-(-len(x) // 8) for x in bits])
    )
    masked = torch.ops.fi.segment_packbits(torch.cat(bits).to(DEVICE), ends, byte_ends, int(byte_ends[-1]), "little")
    left_out = spec.reference(*args, masked, byte_ends, **options)
    in_cache = bad.long().clamp(-1, 40)
    zeros = [torch.cat((cache, cache.new_zeros(1, *cache.shape[1:]))) for cache in args[1:3]]
    as_zeros = spec.reference(args[0], *zeros, starts, in_cache.where(in_cache >= 0, 40), kv_indptr, last, **options)
    output, _ = torch.ops.fi.paged_attention_with_lse(*args[:4], bad, *args[5:], **options)
    error = torch.stack([(output.float() - expected[0].float()).abs().amax(-1) for expected in (left_out, as_zeros)])
    assert bool((error.amin(0) < (0.03 if dtype == torch.bfloat16 else 1e-4)).all()), error.amin(0).max()
    if dtype == torch.float32:
        assert bool((error[0] < 1e-4).all())


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_batches_of_impossible_requests(index):
    """Index tensors, masks' places and plans of any content: nothing outside is read or written."""
    args, options = _batch_call(torch.bfloat16, index)
    far = [*FAR, 3, *([2**63 - 1, -(2**63), 2**40] if index == torch.int64 else [])]
    mask, mask_indptr = (
        torch.full((5,), 255, dtype=torch.uint8, device=DEVICE),
        torch.tensor([0, 2, 2**40, -9], device=DEVICE),
    )
    plan = torch.ops.fi.batch_attention_plan(args[3], args[5], args[6], len(args[0]), 2, 16, causal=True)
    for which in range(3, 7):
        for value in far:
            for at in (1, -1, slice(None)):
                wrong = args[which].clone()
                wrong[at] = value
                given = (*args[:which], wrong, *args[which + 1 :])
                torch.ops.fi.paged_attention_with_lse(*given, **options)
                torch.ops.fi.paged_attention_with_lse(*given, mask, mask_indptr, plan=plan, **options)
    for value in (*FAR, 3):
        wrong = torch.where(torch.rand(len(plan), device=DEVICE) < 0.3, value, plan).to(torch.int32)
        for hostile in (wrong, torch.full_like(plan, value)):
            torch.ops.fi.paged_attention_with_lse(*args, plan=hostile, **options)
    _wait()
