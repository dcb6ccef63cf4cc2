"""Attention over a batch whose requests have many query rows: random batches of every feature, for the kernels over a plan's tiles.

The sizes cross what those are cut by: tiles of 128 queries, blocks of 64 and 128 rows, 32 and 64 keys, pages, the padded head
dims, several tiles a thread block. What no request has in the cache is NaN.
"""

from __future__ import annotations

import random

import pytest
import torch
from test_few_query_rows import DEVICES

from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def indptr(device, lens, dtype=torch.int32):
    return torch.tensor([0, *lens]).cumsum(0).to(device, dtype)


def paged(draw, device, dtype, kv_lens, shape, page_size):
    """A cache of `shape` a token and dtype that is NaN wherever no request has a token: (cache, the token's slots) by page."""
    pages = [-(-n // page_size) for n in kv_lens]
    num_pages = sum(pages) + 3
    order = torch.tensor(draw.sample(range(num_pages), sum(pages)), dtype=torch.int64)
    live = torch.zeros(num_pages * page_size, dtype=torch.bool)
    at = 0
    for n, count in zip(kv_lens, pages, strict=True):
        slots = (order[at : at + count, None] * page_size + torch.arange(page_size)).flatten()[:n]
        live[slots] = True
        at += count
    last = [n - (count - 1) * page_size if count else 0 for n, count in zip(kv_lens, pages, strict=True)]

    def cache(dim):
        values = torch.randn(num_pages * page_size, shape, dim)
        values[~live] = float("nan")
        return values.to(dtype).view(num_pages, page_size, shape, dim).to(device)

    return cache, (
        order.to(device, torch.int32),
        indptr(device, pages),
        torch.tensor(last, dtype=torch.int32).to(device),
    )


def packed_mask(draw, device, qo_lens, kv_lens):
    """Bits for each request: random ones, rows without any, and a stretch of keys that no row sees."""
    rows, counts = [], []
    for q, kv in zip(qo_lens, kv_lens, strict=True):
        bits = torch.rand(q, kv) < draw.choice([0.03, 0.5, 1.0])
        hole = draw.randrange(kv + 1)
        bits[:, hole : hole + draw.choice([0, 70, 150])] = False
        if q:
            bits[draw.randrange(q)] = False
        flat = torch.nn.functional.pad(bits.flatten().to(torch.uint8), (0, -(q * kv) % 8)).view(-1, 8)
        rows.append((flat << torch.arange(8)).sum(-1).to(torch.uint8))
        counts.append(len(flat))
    return torch.cat(rows).to(device), indptr(device, counts)


def random_call(seed, device):
    """(op, arguments, keyword arguments) of a random batch, at least one request of it with more than 64 rows."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.bfloat16, torch.float16])
    kv_dtype = draw.choice([dtype, dtype, *FP8])
    dims = draw.choice([(64, 64), (128, 128), (128, 128), (192, 128), (256, 256), (40, 72), (96, 96), (168, 104)])
    kv_heads, group = draw.choice([1, 2]), draw.choice([1, 1, 2, 3, 5])
    lens = [(draw.choice([66, 100, 128, 129, 200]), draw.choice([0, 0, 1, 63, 200]))]
    lens += [(draw.choice([0, 1, 30, 70, 140]), draw.choice([0, 0, 5, 100, 300])) for _ in range(draw.randrange(4))]
    draw.shuffle(lens)
    qo_lens, kv_lens = [q for q, _ in lens], [q + more for q, more in lens]
    options: dict = {}
    if draw.random() < 0.6:
        options["causal"] = True
    if draw.random() < 0.3:
        options["window_left"] = draw.choice([0, 50, 150])
    rope = draw.random() < 0.25
    if not rope and draw.random() < 0.3:  # queries before the first key
        kv_lens = [max(0, n - draw.choice([0, 20])) for n in kv_lens]
    heads = kv_heads * group
    query = torch.randn(sum(qo_lens) + draw.choice([0, 0, 3]), heads, dims[0], device=device).to(dtype)
    if draw.random() < 0.7:
        op = "paged_attention_with_lse"
        page_size = draw.choice([1, 3, 16, 32, 64, 128])
        cache, table = paged(draw, device, kv_dtype, kv_lens, kv_heads, page_size)
        key, value = cache(dims[0]), cache(dims[1])
        if draw.random() < 0.3:
            key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
        index = draw.choice([torch.int32, torch.int64])
        args = (query, key, value, indptr(device, qo_lens), *(t.to(index) for t in table))
    else:
        op = "ragged_attention_with_lse"
        key, value = (torch.randn(sum(kv_lens) + 2, kv_heads, dim, device=device).to(kv_dtype) for dim in dims)
        args = (query, key, value, indptr(device, qo_lens), indptr(device, kv_lens))
    if draw.random() < 0.3:
        args = (*args, *packed_mask(draw, device, qo_lens, kv_lens))
    if draw.random() < 0.2:
        options["logits_soft_cap"] = draw.choice([2.0, 50.0])
    if draw.random() < 0.2:
        options["alibi_slopes"] = torch.rand(heads, device=device) * 0.3
    if draw.random() < 0.3:
        options["sinks"] = torch.randn(heads, device=device) * draw.choice([1.0, 10.0])
    for name in ("k_scale", "v_scale"):
        if draw.random() < 0.3:
            options[name] = (torch.rand(draw.choice([1, kv_heads]), device=device) + 0.3) * draw.choice([1.0, -1.0])
    if draw.random() < 0.2:
        options["scale"] = draw.choice([0.3, 0.0, -0.2])
    if rope:
        rotary_dim = draw.choice([dims[0], dims[0] // 2, 6, 32])
        angles = torch.rand(max(kv_lens) + draw.choice([0, 10]), rotary_dim // 2, device=device) * 6.3
        options["cos_sin_cache"] = torch.cat((angles.cos(), angles.sin()), -1)
        options["interleaved"] = draw.random() < 0.5
    if draw.random() < 0.2:
        options["fixed_split_size"] = draw.choice([64, 128])
    return op, args, options


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(60))
def test_random_batch(seed, device):
    op, args, options = random_call(seed, device)
    assert_op_matches_reference(SPECS[op], Sample(args, options, f"seed {seed}"))


def long_call(seed, device):
    """Few tiles over long keys, which several blocks share: (arguments, keyword arguments)."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype, page_size = draw.choice([torch.bfloat16, torch.float16]), draw.choice([1, 16, 64])
    dim, group = draw.choice([64, 128, 256]), draw.choice([1, 2])
    lens = [(draw.choice([66, 100, 129]), draw.choice([1100, 2300, 3000]))]
    if draw.random() < 0.5:
        lens.insert(draw.randrange(2), (draw.choice([1, 65, 130]), draw.choice([0, 130, 700])))
    qo_lens, kv_lens = zip(*lens, strict=True)
    query = torch.randn(sum(qo_lens), group, dim, device=device).to(dtype)
    cache, table = paged(draw, device, draw.choice([dtype, *FP8]), kv_lens, 1, page_size)
    args = (query, cache(dim), cache(dim), indptr(device, qo_lens), *table)
    options: dict = {"causal": draw.random() < 0.7, "v_scale": torch.tensor([1.5], device=device)}
    if draw.random() < 0.3:
        options["window_left"] = draw.choice([300, 1500])
    if draw.random() < 0.3:
        options["sinks"] = torch.randn(group, device=device) * 5
    if draw.random() < 0.3:
        args = (*args, *packed_mask(draw, device, qo_lens, kv_lens))
    return args, options


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(12))
def test_few_tiles_over_long_keys(seed, device):
    args, options = long_call(seed, device)
    sample = Sample(args, options, f"long keys {seed}")
    assert_op_matches_reference(SPECS["paged_attention_with_lse"], sample)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", [False, True], ids=["plan made", "plan given"])
def test_a_fixed_split_does_not_see_the_batch(given, device):
    """Bit for bit the same, alone and among others; long enough that one request alone would be split."""
    draw = random.Random(0)
    qo_lens, kv_lens, page_size = [100, 70, 300, 65], [1500, 80, 300, 2000], 16
    query = torch.randn(sum(qo_lens), 4, 64, device=device).bfloat16()
    cache, (kv_indices, kv_indptr, last) = paged(draw, device, torch.bfloat16, kv_lens, 2, page_size)
    key, value = cache(64), cache(64)
    options = {"causal": True, "fixed_split_size": 256}

    def attend(query, qo_lens, kv_indices, kv_indptr, last):
        starts = indptr(device, qo_lens)
        plan = torch.ops.fi.batch_attention_plan(starts, kv_indptr, last, len(query), 2, page_size, **options)
        return torch.ops.fi.paged_attention_with_lse(
            query, key, value, starts, kv_indices, kv_indptr, last, plan=plan if given else None, **options
        )

    together = attend(query, qo_lens, kv_indices, kv_indptr, last)
    starts, pages = indptr("cpu", qo_lens).tolist(), kv_indptr.tolist()
    for b, n in enumerate(qo_lens):
        rows, own = slice(starts[b], starts[b + 1]), kv_indices[pages[b] : pages[b + 1]]
        alone = attend(query[rows], [n], own, indptr(device, [len(own)]), last[b : b + 1])
        assert all(torch.equal(a[rows], x) for a, x in zip(together, alone, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_offsets_past_two_to_the_31(kv_dtype, device):
    """The same as from a small cache of the same pages. (Memory that nobody writes costs nothing on a CPU.)"""
    near = torch.randn(5, 16, 2, 64, device=device).to(kv_dtype)
    far = torch.empty(2**20 + 9, 16, 2, 64, device=device, dtype=kv_dtype)
    pages = torch.tensor([2**20 + 5, 7, 2**20 + 8, 2**20, 3], device=device)
    far.view(torch.uint8)[pages] = near.view(torch.uint8)
    starts = torch.tensor([0, 70], device=device)
    table = torch.tensor([0, 5], device=device), torch.tensor([13], device=device)
    query = torch.randn(70, 4, 64, device=device).bfloat16()
    attend = torch.ops.fi.paged_attention
    expected = attend(query, near, near, starts, torch.arange(5, device=device), *table, causal=True)
    assert torch.equal(attend(query, far, far, starts, pages, *table, causal=True), expected)
