"""Latent attention over a paged cache on a GPU: random batches of the sizes that Hopper's kernel is cut by.

Row tiles of 64 (query, head) pairs, key tiles of 64, pages that hold one tile, several, or parts of one; row tiles of one block and
of several. What no request owns (free pages, the rest of a last page) holds NaN.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference

pytestmark = pytest.mark.gpu

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
PAGE_SIZES = [1, 3, 8, 16, 32, 48, 64, 128]


def _indptr(counts, index):
    return torch.tensor([0, *itertools.accumulate(counts)], device="cuda", dtype=index)


def _caches(draw, kv_lens, page_size, dtype, index):
    """ckv, kpe (views of one tensor, or one each) and the table of their pages, in random order."""
    counts = [-(-n // page_size) for n in kv_lens]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages)[: sum(counts)]
    both = torch.full((num_pages, page_size, 576), torch.nan, device="cuda")
    pages = iter(order.tolist())
    for n in kv_lens:
        for first in range(0, n, page_size):
            used = min(page_size, n - first)
            both[next(pages), :used] = torch.randn(used, 576, device="cuda")
    both = both.to(dtype)
    caches = both[..., :512], both[..., 512:]
    if draw.random() < 0.5:
        caches = tuple(t.contiguous() for t in caches)
    last = [n - max(c - 1, 0) * page_size for n, c in zip(kv_lens, counts, strict=True)]
    return caches, (order.to("cuda", index), _indptr(counts, index), torch.tensor(last, device="cuda", dtype=index))


def _call(seed, page_size, heads, qo_lens, kv_lens, kv_dtype=None):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, index = draw.choice([torch.bfloat16, torch.float16]), draw.choice([torch.int32, torch.int64])
    nnz = sum(qo_lens) + draw.choice([0, 2])
    q_nope = torch.randn(nnz, heads, 512, device="cuda").to(dtype) / 2
    if draw.random() < 0.5:  # as a product with W_UK leaves it
        q_nope = q_nope.transpose(0, 1).contiguous().transpose(0, 1)
    q_pe = torch.randn(nnz, heads, 192, device="cuda").to(dtype)[..., 128:] / 2
    caches, table = _caches(draw, kv_lens, page_size, kv_dtype or dtype, index)
    kv_scale = torch.tensor([draw.choice([0.5, 1.5, -0.7])], device="cuda") if draw.random() < 0.5 else None
    args = q_nope, q_pe, *caches, _indptr(qo_lens, index), *table, 192**-0.5, kv_scale
    return Sample(args, {"causal": draw.random() < 0.7}, f"seed {seed}, {dtype}, page_size {page_size}, {heads} heads")


def _lengths(seed, requests, qo_choices, kv_choices):
    draw = random.Random(seed)
    kv_lens = [draw.choice(kv_choices) for _ in range(requests)]
    return [min(draw.choice(qo_choices), n) if n else draw.choice([0, 1]) for n in kv_lens], kv_lens


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("seed", range(8))
def test_random_batch(page_size, seed):
    heads = random.Random(seed).choice([1, 16, 20, 64, 128])
    lengths = _lengths(seed, 9, [0, 1, 1, 2, 3, 4, 9], [0, 1, 17, 63, 64, 65, 128, 200, 1000])
    sample = _call(100 * page_size + seed, page_size, heads, *lengths)
    assert_op_matches_reference(SPECS["mla_paged_attention_with_lse"], sample)


@pytest.mark.parametrize("kv_dtype", FP8, ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("heads", [16, 128])
def test_fp8_cache(kv_dtype, page_size, heads):
    lengths = _lengths(heads, 7, [1, 2, 4], [1, 64, 65, 300, 1000])
    sample = _call(heads + page_size, page_size, heads, *lengths, kv_dtype)
    assert_op_matches_reference(SPECS["mla_paged_attention_with_lse"], sample)


@pytest.mark.parametrize(
    ("heads", "qo_lens", "kv_lens"),
    [
        (16, [1], [9000]),  # a request that all blocks share
        (128, [1, 2], [9000, 700]),
        (16, [1] * 300, [(37 * i) % 700 for i in range(300)]),  # several requests a block
        (128, [2] * 140, [2 + (37 * i) % 500 for i in range(140)]),
        (64, [1, 200, 3], [500, 300, 2000]),  # a prompt among them
    ],
    ids=["one long", "long and short", "many", "many of two tiles", "prompt"],
)
def test_shares(heads, qo_lens, kv_lens):
    sample = _call(len(qo_lens), 16, heads, qo_lens, kv_lens)
    assert_op_matches_reference(SPECS["mla_paged_attention_with_lse"], sample)


@pytest.mark.parametrize("page_size", [1, 64])
def test_pages_that_are_not_there(page_size):
    """Nothing is read for them, and requests beside them don't notice."""
    sample = _call(0, page_size, 16, [1, 1], [300, 300])
    *head, pages, kv_indptr, last, scale, kv_scale = sample.args
    hostile = pages.clone()
    hostile[: int(kv_indptr[1])][::2] = 2**30
    hostile[: int(kv_indptr[1])][1::2] = -1
    outputs = [
        torch.ops.fi.mla_paged_attention(*head, table, kv_indptr, last, scale, kv_scale) for table in (pages, hostile)
    ]
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert outputs[1].isfinite().all()


@pytest.mark.parametrize("heads", [16, 128])
def test_the_same_call_gives_the_same_bits(heads):
    sample = _call(1, 16, heads, [1] * 40, [100 * i for i in range(40)])
    first, *others = (torch.ops.fi.mla_paged_attention(*sample.args, causal=True) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


def test_a_captured_graph_follows_the_lengths():
    """Lengths and pages change between replays; who has which keys is found out in each."""
    torch.manual_seed(0)
    queries = [torch.randn(4, 128, width, device="cuda").bfloat16() for width in (512, 64)]
    caches = [torch.randn(64, 64, width, device="cuda").bfloat16() for width in (512, 64)]
    qo_indptr, kv_indptr, last = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (5, 5, 4))
    kv_indices = torch.zeros(64, dtype=torch.int32, device="cuda")
    args = *queries, *caches, qo_indptr, kv_indices, kv_indptr, last, 192**-0.5
    torch.ops.fi.mla_paged_attention_with_lse(*args, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = torch.ops.fi.mla_paged_attention_with_lse(*args, causal=True)
    for counts in ([40, 3, 1, 2], [1, 1, 0, 1], [0, 0, 64, 0]):
        qo_indptr.copy_(torch.arange(5))
        kv_indptr.copy_(_indptr(counts, torch.int32))
        kv_indices.copy_(torch.randperm(64))
        last.copy_(torch.tensor([5 if c else 0 for c in counts]))
        graph.replay()
        expected = torch.ops.fi.mla_paged_attention_with_lse(*args, causal=True)
        assert all(torch.equal(got, want) for got, want in zip(outputs, expected, strict=True))
