"""Attention over a batch whose requests have many query rows each: random batches of the sizes that Hopper's kernel is cut by.

Query tiles of 128, KV tiles of 64 to 128, pages that hold several tiles, parts of one or a single key. What no request owns (free
pages, the rest of a last page, rows behind the last request) holds NaN. On the CPU a few of the same calls.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from head_dims import COMPILED_DIMS, OTHER_DIMS

from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference

PAGE_SIZES = [1, 3, 8, 16, 24, 32, 40, 48, 64, 80, 100, 112, 128, 256]


def _indptr(counts, device, index):
    return torch.tensor([0, *itertools.accumulate(counts)], device=device, dtype=index)


def _rows(draw, num_rows, heads, dim, device, dtype):
    """`[num_rows, heads, dim]`, contiguous or a part of wider rows."""
    wide = torch.randn(num_rows, heads + draw.choice([0, 0, 3]), dim, device=device).to(dtype)
    return wide[:, :heads]


def _caches(draw, num_pages, page_size, kv_heads, dims, device, dtype):
    """Two caches `[num_pages, page_size, kv_heads, dim]`, all NaN: NHD, HND, or the halves of one tensor."""
    layout, widest = draw.choice(["NHD", "HND", "one tensor"]), max(dims)
    shape = (num_pages, kv_heads, page_size, widest) if layout == "HND" else (num_pages, page_size, kv_heads, widest)
    both = torch.full((2, *shape) if layout != "one tensor" else (num_pages, 2, *shape[1:]), torch.nan, device=device)
    both = both.to(dtype)
    k, v = (x[..., :dim] for x, dim in zip(both.unbind(0 if layout != "one tensor" else 1), dims, strict=True))
    return (k.transpose(1, 2), v.transpose(1, 2)) if layout == "HND" else (k, v)


def _paged(draw, kv_lens, page_size, kv_heads, dims, device, dtype, index):
    counts = [-(-n // page_size) for n in kv_lens]
    num_pages = sum(counts) + draw.choice([1, 7])
    caches = _caches(draw, num_pages, page_size, kv_heads, dims, device, dtype)
    order = torch.randperm(num_pages)[: sum(counts)]
    pages = iter(order.tolist())
    for n in kv_lens:
        for first in range(0, n, page_size):
            page, used = next(pages), min(page_size, n - first)
            for cache in caches:
                cache[page, :used] = torch.randn(used, kv_heads, cache.shape[-1], device=device).to(dtype)
    last = [n - max(c - 1, 0) * page_size for n, c in zip(kv_lens, counts, strict=True)]
    table = order.to(device, index), _indptr(counts, device, index), torch.tensor(last, device=device, dtype=index)
    return caches, table


def batch_call(
    seed,
    device,
    page_size=None,
    heads=(1, 2, 4, 7),
    lengths=(0, 1, 20, 65, 100, 128, 129, 200, 300),
    head_dims=COMPILED_DIMS,
):
    """(op, arguments, keyword arguments): what Hopper's kernel takes, beside requests with few rows or none."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, index = draw.choice([torch.bfloat16, torch.float16]), draw.choice([torch.int32, torch.int64])
    dims, kv_heads = draw.choice(head_dims), draw.choice([1, 2])
    num_heads = kv_heads * draw.choice(heads)
    qo_lens = [draw.choice(lengths) for _ in range(draw.choice([1, 2, 5]))]
    kv_lens = [draw.choice([n, n, n + 1, n + 63, n + 200, n + 511, n // 2, 0]) for n in qo_lens]
    query = _rows(draw, sum(qo_lens) + draw.choice([0, 0, 5]), num_heads, dims[0], device, dtype)
    qo_indptr = _indptr(qo_lens, device, index)

    options: dict = {}
    if draw.random() < 0.6:
        options["causal"] = True
    if draw.random() < 0.3:
        options["window_left"] = draw.choice([0, 50, 150])
    if draw.random() < 0.3:
        options["logits_soft_cap"] = draw.choice([2.0, 50.0])
    if draw.random() < 0.3:
        options["sinks"] = torch.randn(num_heads, device=device) * draw.choice([1.0, 10.0])
    if draw.random() < 0.2:
        options["scale"] = 0.2
    if draw.random() < 0.2:
        options["k_scale"] = (torch.rand(draw.choice([1, kv_heads]), device=device) + 0.5) * draw.choice([1, 1, -1])
    if draw.random() < 0.2:
        options["v_scale"] = torch.rand(draw.choice([1, kv_heads]), device=device) + 0.5
    if page_size is None:
        key, value = (_rows(draw, sum(kv_lens) + 9, kv_heads, dim, device, dtype) for dim in dims)
        key[sum(kv_lens) :] = value[sum(kv_lens) :] = torch.nan
        return "ragged_attention_with_lse", (query, key, value, qo_indptr, _indptr(kv_lens, device, index)), options
    caches, table = _paged(draw, kv_lens, page_size, kv_heads, dims, device, dtype, index)
    return "paged_attention_with_lse", (query, *caches, qo_indptr, *table), options


CALLS = [("cpu", page_size, seed) for page_size in (None, 3, 64) for seed in range(2)] + [
    pytest.param("cuda", page_size, seed, marks=pytest.mark.gpu)
    for page_size in [None, None, *PAGE_SIZES]
    for seed in range(8)
]


@pytest.mark.parametrize(("device", "page_size", "seed"), CALLS)
def test_random_batch(device, page_size, seed):
    op, args, kwargs = batch_call(1000 * (page_size or 0) + seed, device, page_size)
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"page_size {page_size}, seed {seed}"))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 1, 16, 128])
@pytest.mark.parametrize("seed", range(3))
def test_more_tiles_than_a_gpu_has_multiprocessors(page_size, seed):
    op, args, kwargs = batch_call(5000 + seed, "cuda", page_size, (8, 24), (130, 500, 1100))
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"page_size {page_size}, seed {seed}"))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 1, 16, 128])
@pytest.mark.parametrize("seed", [7000, 7004, 7010, 7028, 7032, 7037, 7046, 7053, 7068, 7069])
def test_long_requests(page_size, seed):
    """All but the second are computed in query tiles of 192 rows by a GPU of 132 multiprocessors."""
    op, args, kwargs = batch_call(seed, "cuda", page_size, (8, 16), (1100, 1500, 2100))
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"page_size {page_size}, seed {seed}"))


OTHER_CALLS = [("cpu", page_size, seed) for page_size in (None, 3) for seed in range(2)] + [
    pytest.param("cuda", page_size, seed, marks=pytest.mark.gpu)
    for page_size in (None, 1, 3, 16, 48, 64, 128)
    for seed in range(12)
]


@pytest.mark.parametrize(("device", "page_size", "seed"), OTHER_CALLS)
def test_other_head_dims(device, page_size, seed):
    op, args, kwargs = batch_call(1000 * (page_size or 0) + seed, device, page_size, head_dims=OTHER_DIMS)
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"page_size {page_size}, seed {seed}"))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 1, 16, 128])
@pytest.mark.parametrize("seed", range(7000, 7008))
def test_long_requests_of_other_head_dims(page_size, seed):
    op, args, kwargs = batch_call(seed, "cuda", page_size, (8, 16), (1100, 1500), OTHER_DIMS[:5])
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"page_size {page_size}, seed {seed}"))


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "section"), [([1100, 700, 130], 61), ([3000], 33)])
def test_more_heads_than_fit_into_the_cache_together(lengths, section):
    """They are computed section by section: the same as a call for each half of them, whose heads are one section."""
    torch.manual_seed(0)
    heads, indptr = 2 * (section - 3), _indptr(lengths, "cuda", torch.int32)
    q, k, v = (torch.randn(sum(lengths), heads, dim, device="cuda").bfloat16() for dim in (192, 192, 128))
    whole = torch.ops.fi.ragged_attention(q, k, v, indptr, indptr, causal=True)
    halves = [
        torch.ops.fi.ragged_attention(*(x[:, part] for x in (q, k, v)), indptr, indptr, causal=True)
        for part in (slice(heads // 2), slice(heads // 2, heads))
    ]
    expected = torch.cat(halves, 1).double()
    assert (whole.double() - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_pages_that_are_not_there(page_size):
    """Nothing is read for them, and requests beside them don't notice."""
    draw = random.Random(page_size)
    torch.manual_seed(0)
    caches, (pages, kv_indptr, last) = _paged(
        draw, [300, 300], page_size, 2, (128, 128), "cuda", torch.bfloat16, torch.int64
    )
    query = torch.randn(400, 4, 128, device="cuda").bfloat16()
    qo_indptr = torch.tensor([0, 200, 400], device="cuda")
    hostile = pages.clone()
    hostile[: int(kv_indptr[1])][::2] = 2**30
    hostile[: int(kv_indptr[1])][1::2] = -1
    outputs = [
        torch.ops.fi.paged_attention(query, *caches, qo_indptr, table, kv_indptr, last, causal=True)
        for table in (pages, hostile)
    ]
    assert torch.equal(outputs[0][200:], outputs[1][200:])
    assert outputs[1].isfinite().all()


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths():
    """Lengths and pages change between replays; the graph's plan with them."""
    torch.manual_seed(0)
    query = torch.randn(500, 8, 128, device="cuda").bfloat16()
    k_cache, v_cache = (torch.randn(64, 16, 2, 128, device="cuda").bfloat16() for _ in range(2))
    qo_indptr, kv_indptr, last = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (4, 4, 3))
    kv_indices = torch.zeros(64, dtype=torch.int32, device="cuda")

    def call():
        return torch.ops.fi.paged_attention(
            query, k_cache, v_cache, qo_indptr, kv_indices, kv_indptr, last, causal=True
        )

    def fill(qo_lens, pages):
        qo_indptr.copy_(_indptr(qo_lens, "cuda", torch.int32))
        kv_indptr.copy_(_indptr(pages, "cuda", torch.int32))
        last.copy_(torch.tensor([7 if n else 0 for n in pages]))
        kv_indices.copy_(torch.randperm(64, device="cuda"))

    fill([1, 1, 1], [1, 1, 1])
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for qo_lens, pages in (([300, 1, 150], [20, 30, 10]), ([0, 480, 0], [0, 40, 3]), ([2, 3, 1], [20, 30, 10])):
        fill(qo_lens, pages)
        graph.replay()
        assert torch.equal(captured, call())
