"""Few query rows of requests of a batch: calls drawn at random, and what the fixed split and the plan promise.

The sizes cross what the CUDA kernel is cut by: units of 64 keys, slices of 16, segments of 16 query rows, runs of a block
found 32 at a time, pairs of a segment and a KV head that several blocks share.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from batch_cases import DEVICES, indptr

from fi_ops.library import SPECS, Sample
from fi_ops.library.plan import batch_attention_plan
from fi_ops.testing import assert_op_matches_reference

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def paged_call(qo_lens, kv_lens, device, *, page_size=16, heads=4, kv_heads=2, dim=64, dim_vo=None, dtype=torch.bfloat16,
               kv_dtype=None, spare_pages=3, index=torch.int32):  # fmt: skip
    """The positional arguments of `paged_attention`: pages in random order, some unused."""
    counts = [-(-n // page_size) for n in kv_lens]
    pages = sum(counts) + spare_pages
    query = torch.randn(sum(qo_lens), heads, dim, device=device).to(dtype)
    key, value = (
        torch.randn(pages, page_size, kv_heads, d, device=device).to(kv_dtype or dtype) for d in (dim, dim_vo or dim)
    )
    kv_indices = torch.randperm(pages, device=device)[: sum(counts)].to(index)
    last = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in kv_lens], dtype=index, device=device)
    return query, key, value, indptr(qo_lens, index, device), kv_indices, indptr(counts, index, device), last


def random_call(seed: int, device: str):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    group, kv_heads = draw.choice([1, 2, 3, 4, 8, 16, 40]), draw.choice([1, 2, 3])
    most = max(1, 64 // group)
    batch = draw.choice([1, 2, 5, 40, 120])
    qo_lens = [draw.choice([1, 1, 1, draw.randrange(most + 1)]) for _ in range(batch)]
    longest = draw.choice([3, 70, 300]) if batch > 5 else draw.choice([70, 300, 2000])
    kv_lens = [draw.choice([0, draw.randrange(longest), longest, 64, 15]) for _ in range(batch)]
    with_rope = draw.random() < 0.25
    if with_rope:  # no query before the first key, where there are keys
        kv_lens = [kv_len and max(qo_len, kv_len) for qo_len, kv_len in zip(qo_lens, kv_lens, strict=True)]
    dim, dim_vo = draw.choice([(64, 64), (128, 128), (128, 128), (256, 256), (80, 96), (192, 128), (17, 9)])
    dtype = draw.choice([torch.bfloat16, torch.float16, torch.bfloat16, torch.float32])
    args = paged_call(
        qo_lens, kv_lens, device, page_size=draw.choice([1, 2, 7, 16, 64]), heads=group * kv_heads, kv_heads=kv_heads, dim=dim,
        dim_vo=dim_vo, dtype=dtype, kv_dtype=draw.choice([None, None, *FP8]), index=draw.choice([torch.int32, torch.int64]),
    )  # fmt: skip
    heads, options = args[0].shape[1], {"causal": draw.random() < 0.5}
    if with_rope:
        angles = torch.rand(max(kv_lens) + 2, min(draw.choice([1, 8, 32, 128]), dim // 2), device=device) * 6.3
        options["cos_sin_cache"] = torch.cat((angles.cos(), angles.sin()), -1)
        options["interleaved"] = draw.random() < 0.5
    if draw.random() < 0.25:
        options["window_left"] = draw.choice([0, 10, 100])
    if draw.random() < 0.2:
        options["logits_soft_cap"] = 5.0
    if draw.random() < 0.2:
        options["scale"] = draw.choice([0.3, -0.3])
    for name, size in (("sinks", heads), ("alibi_slopes", heads), ("k_scale", kv_heads), ("v_scale", 1)):
        if draw.random() < 0.2:
            options[name] = torch.rand(size, device=device) * (0.1 if name == "alibi_slopes" else 1)
    if draw.random() < 0.25:
        options["fixed_split_size"] = draw.choice([64, 128, 1024])
    if draw.random() < 0.25:
        sizes = [-(-q * kv // 8) for q, kv in zip(qo_lens, kv_lens, strict=True)]
        options["custom_mask"] = torch.randint(0, 256, (sum(sizes),), dtype=torch.uint8, device=device)
        options["mask_indptr"] = indptr(sizes, device=device)
    return args, options


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(50))
def test_random_call(seed, device):
    args, options = random_call(seed, device)
    assert_op_matches_reference(SPECS["paged_attention_with_lse"], Sample(args, options, f"seed {seed}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fixed_split_size", [0, 64])
def test_many_short_requests(fixed_split_size, device):
    """More runs a block than it finds at once, among them requests without keys and without queries."""
    qo_lens, kv_lens = [1 + i % 3 - (i % 50 == 7) for i in range(500)], [i % 140 for i in range(500)]
    args = paged_call(qo_lens, kv_lens, device, kv_heads=2, page_size=8)
    options = {"causal": True, "fixed_split_size": fixed_split_size}
    assert_op_matches_reference(SPECS["paged_attention_with_lse"], Sample(args, options, "500 requests"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_dtype", [None, FP8[0]])
@pytest.mark.parametrize("qo_len", [1, 5])
def test_fixed_split_depends_on_the_request_alone(qo_len, kv_dtype, device):
    """The same bits alone and in batches, whatever the other requests are and however long the page table is."""

    def run(args, rows):
        outputs = torch.ops.fi.paged_attention_with_lse(*args, causal=True, fixed_split_size=128)
        return [t[rows] for t in outputs]

    kv_len, page_size = 3001, 16
    own = paged_call([qo_len], [kv_len], device, kv_dtype=kv_dtype, dim=128)
    alone = run(own, slice(None))
    # So many entries that partial results of all units that could be there are too much memory.
    table = own[4]
    padded = (*own[:4], torch.cat((table, table.new_zeros(1_100_000))), *own[5:])
    assert all(torch.equal(a, b) for a, b in zip(run(padded, slice(None)), alone, strict=True))
    for before, after in (
        ([(1, 30)], []),
        ([(3, 1000), (1, 0)], [(1, 5000), (0, 9)]),
        ([(1, 200)] * 70, [(2, 129)] * 5),
    ):
        lens = [*before, (qo_len, kv_len), *after]
        args = paged_call(*zip(*lens, strict=True), device, kv_dtype=kv_dtype, dim=128)
        query, key, value, qo_indptr, kv_indices, kv_indptr, _ = args
        q_begin, begin = int(qo_indptr[len(before)]), int(kv_indptr[len(before)])
        query[q_begin : q_begin + qo_len] = own[0]
        pages = kv_indices[begin : begin + len(table)].long()
        for cache, source in ((key, own[1]), (value, own[2])):
            cache.view(torch.uint8)[pages] = source.view(torch.uint8)[table.long()]
        got = run(args, slice(q_begin, q_begin + qo_len))
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True)), lens
    assert -(-kv_len // page_size) == len(table)


def block_loads(plan, kv_lens, kv_heads: int, room: int) -> list[int]:
    """Keys of each block, by the kernel's rule (`Shares`): runs of neighbouring units, of equal size but for one."""
    header, batch = plan[:10].tolist(), len(kv_lens)
    num_segments, num_units = header[:2]
    segments = plan[10 : 10 + 5 * num_segments].view(-1, 5).tolist()
    assert len(segments) == batch and header[2] == 0
    keys = []  # of each unit
    for request, _, first_unit, unit_begin, count in segments:
        for _head in range(kv_heads):
            keys += [min(kv_lens[request] - 64 * u, 64) for u in range(unit_begin, unit_begin + count)]
        assert first_unit * kv_heads == len(keys) - count * kv_heads
    units = num_units * kv_heads
    assert units == len(keys)
    blocks = 2 * room if units // 64 >= room else room
    blocks = max(1, min(-(-units // 2), blocks))
    base, extra = divmod(units, blocks)
    ends = list(itertools.accumulate(base + (b < extra) for b in range(blocks)))
    return [sum(keys[end - base - (b < extra) : end]) for b, end in enumerate(ends)]


@pytest.mark.parametrize(
    "kv_lens", [[512] * 255 + [131072], [131072] + [512] * 255, [2000 + 37 * i for i in range(64)]]
)
def test_skewed_batches_are_shared_out_evenly(kv_lens):
    """One block of 128k keys among 255 of 512: the slowest of an H100's blocks has at most 1.1 of the mean."""
    pages = indptr([-(-n // 16) for n in kv_lens])
    last = torch.tensor([(n - 1) % 16 + 1 for n in kv_lens], dtype=torch.int32)
    plan = batch_attention_plan(indptr([1] * len(kv_lens)), pages, last, len(kv_lens), 4, 16, True)
    loads = block_loads(plan, kv_lens, kv_heads=8, room=264)
    assert sum(loads) == 8 * sum(kv_lens)
    assert max(loads) <= 1.1 * sum(loads) / len(loads)


@pytest.mark.gpu
@pytest.mark.parametrize("with_plan", [True, False])
def test_a_captured_graph_plans_anew(with_plan):
    """Lengths, tables and queries change between replays, the graph does not: right each time."""
    args = paged_call([1] * 8, [900] * 8, "cuda", dim=128)
    query, qo_indptr, kv_indices, kv_indptr, last = args[0], *args[3:]

    def step():
        plan = None
        if with_plan:
            plan = torch.ops.fi.batch_attention_plan(qo_indptr, kv_indptr, last, 8, 2, 16, True)
        return torch.ops.fi.paged_attention(*args, plan=plan, causal=True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    # A request that grows, that shrinks, that leaves; queries that come to belong to others.
    for qo_lens, kv_lens in (
        ([1] * 8, [900] * 8),
        ([1] * 8, [1, 7000, 0, 64, 16, 9, 1, 30]),
        ([3, 0, 2, 0, 1, 1, 0, 0], [50] * 8),
    ):
        counts = [-(-n // 16) for n in kv_lens]
        qo_indptr.copy_(indptr(qo_lens, device="cuda"))
        kv_indptr.copy_(indptr(counts, device="cuda"))
        last.copy_(torch.tensor([(n - 1) % 16 + 1 if n else 0 for n in kv_lens]))
        kv_indices.copy_(kv_indices[torch.randperm(len(kv_indices), device="cuda")])
        query.normal_()
        graph.replay()
        expected = SPECS["paged_attention"].reference(
            *(t.double() if t.is_floating_point() else t for t in args), causal=True
        )
        torch.testing.assert_close(output.double(), expected, rtol=0.02, atol=0.02)
