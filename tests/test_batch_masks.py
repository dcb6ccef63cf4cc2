"""Custom masks of requests with many query rows, as Hopper's kernel tells them apart: by tiles of 128 queries and 64 to 128 keys.

On the CPU a few of the same calls.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from head_dims import COMPILED_DIMS, OTHER_DIMS
from test_batch_prefill_cuda import batch_call

from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference

DIMS = [*COMPILED_DIMS, *OTHER_DIMS[:2]]
KINDS = ["random", "nearly all", "few", "blocks", "triangle", "stripes", "all", "none"]


def _lengths(args, page_size):
    """qo_lens and kv_lens of a call."""
    qo_lens = args[3].diff().tolist()
    if page_size is None:
        return qo_lens, args[4].diff().tolist()
    pages, last = args[5].diff().tolist(), args[6].tolist()
    return qo_lens, [(n - 1) * page_size + end if n else 0 for n, end in zip(pages, last, strict=True)]


def _mask(kind, q, kv):
    """bool `[q, kv]`."""
    i, j = torch.arange(q)[:, None], torch.arange(kv)
    share = {"random": 0.6, "nearly all": 0.999, "few": 0.01, "all": 1.0}.get(kind, 0.0)
    if kind == "blocks":  # dead, whole and cut tiles of any size
        side = 1 << random.Random(q * kv).randrange(4, 8)
        return (torch.rand(q // side + 1, kv // side + 1) < 0.4)[i // side, j // side]
    if kind == "triangle":
        return j <= i + kv - q
    if kind == "stripes":
        return (i // 3 + j) % 200 < 90
    return torch.rand(q, kv) < share


def _packed(masks, device, index):
    """Bits of each, from a byte of its own on: (custom_mask, mask_indptr)."""
    rows = [torch.nn.functional.pad(m.flatten().byte(), (0, -m.numel() % 8)).view(-1, 8) for m in masks]
    weights = (1 << torch.arange(8)).byte()
    bits = torch.cat([(row * weights).sum(-1).byte() for row in rows])
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    # The bits begin anywhere, as part of a tensor that is longer.
    before = random.Random(len(bits)).randrange(8)
    wide = torch.full((before + len(bits) + 5,), 255, dtype=torch.uint8, device=device)
    part = wide[before : before + len(bits)]
    part.copy_(bits)
    return part, ends.to(device, index)


def _on_hopper() -> bool:
    emulated = os.environ.get("FI_EMULATION_CAPABILITY")
    return emulated == "90" if emulated else torch.cuda.get_device_capability() == (9, 0)


def masked_call(seed, device, page_size):
    """(op, arguments, keyword arguments, the masks)."""
    draw = random.Random(seed)
    op, args, options = batch_call(seed, device, page_size, head_dims=[DIMS[seed % len(DIMS)]])
    masks = [_mask(draw.choice(KINDS), q, kv) for q, kv in zip(*_lengths(args, page_size), strict=True)]
    for mask in masks:
        if draw.random() < 0.3 and mask.numel():
            mask[draw.randrange(len(mask))] = False  # a row that sees nothing
            mask[:, draw.randrange(mask.shape[1]) :][:, : draw.choice([1, 40, 300])] = False
    options["custom_mask"], options["mask_indptr"] = _packed(masks, device, args[3].dtype)
    return op, args, options, masks


GPU_CALLS = [
    pytest.param("cuda", page_size, seed, marks=pytest.mark.gpu)
    for page_size in (None, 1, 16, 24, 64, 128)
    for seed in range(20)
]
CPU_CALLS = [("cpu", page_size, seed) for page_size in (None, 16) for seed in range(10)]


@pytest.mark.parametrize(("device", "page_size", "seed"), CPU_CALLS + GPU_CALLS)
def test_random_masks(device, page_size, seed):
    freed = [
        torch.full((1 << size,), torch.nan) for size in range(8, 22)
    ]  # what memory the kernel gets is NaN, if it can be had
    del freed
    op, args, options, _ = masked_call(1000 * (page_size or 0) + seed, device, page_size)
    assert_op_matches_reference(SPECS[op], Sample(args, options, f"page_size {page_size}, seed {seed}"))


@pytest.mark.parametrize(("device", "page_size", "seed"), GPU_CALLS)
def test_what_no_row_sees_may_be_anything(device, page_size, seed):
    if not _on_hopper():
        pytest.skip("mma.sync multiplies a weight of 0 with whatever lies in a tile that some row sees")
    op, args, options, masks = masked_call(50_000 + 1000 * (page_size or 0) + seed, device, page_size)
    if args[0].shape[-1] > 128:
        options.pop("k_scale", None)  # not for Hopper's kernel
    expected = getattr(torch.ops.fi, op)(*args, **options)
    for b, mask in enumerate(masks):
        unseen = (~mask.any(0)).nonzero().flatten().to(device) if len(mask) else torch.arange(0, device=device)
        for cache in args[1:3]:
            if page_size is None:
                cache[args[4][b] + unseen] = torch.nan
            else:
                pages = args[4][args[5][b] + unseen // page_size]
                cache[pages.long(), unseen % page_size] = torch.nan
    for got, want in zip(getattr(torch.ops.fi, op)(*args, **options), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_requests_may_share_bits(device):
    """Everyone's mask from byte 0 on, though lengths differ: as many copies of it."""
    torch.manual_seed(0)
    qo_lens, kv_lens = [150, 70, 200], [300, 170, 129]
    q, k, v = (torch.randn(n, 4, 64, device=device).bfloat16() for n in (sum(qo_lens), sum(kv_lens), sum(kv_lens)))
    qo_indptr, kv_indptr = (torch.tensor([0, *n], device=device).cumsum(0) for n in (qo_lens, kv_lens))
    bits = torch.randint(0, 256, (150 * 300 // 8 + 1,), dtype=torch.uint8, device=device)
    each = torch.arange(4, device=device) * len(bits)
    shared = torch.ops.fi.ragged_attention(q, k, v, qo_indptr, kv_indptr, bits, torch.zeros_like(each))
    assert torch.equal(shared, torch.ops.fi.ragged_attention(q, k, v, qo_indptr, kv_indptr, bits.repeat(3), each))


@pytest.mark.gpu
def test_a_captured_graph_follows_masks_and_lengths():
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, heads, 128, device="cuda").bfloat16() for n, heads in ((500, 8), (1000, 2), (1000, 2)))
    qo_indptr, kv_indptr, mask_indptr = (torch.zeros(3, dtype=torch.int32, device="cuda") for _ in range(3))
    bits = torch.zeros(60_000, dtype=torch.uint8, device="cuda")

    def call():
        return torch.ops.fi.ragged_attention(q, k, v, qo_indptr, kv_indptr, bits, mask_indptr)

    def fill(qo_lens, kv_lens):
        sizes = [-(-rows * keys // 8) for rows, keys in zip(qo_lens, kv_lens, strict=True)]
        for t, counts in ((qo_indptr, qo_lens), (kv_indptr, kv_lens), (mask_indptr, sizes)):
            t[1:] = torch.tensor(counts).cumsum(0)
        bits.random_(0, 256)

    fill([1, 1], [1, 1])
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for qo_lens, kv_lens in (([300, 150], [310, 600]), ([0, 480], [100, 800]), ([2, 3], [20, 30])):
        fill(qo_lens, kv_lens)
        graph.replay()
        assert torch.equal(captured, call())
