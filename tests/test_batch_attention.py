"""Attention over a batch: random batches against the reference, one answer for every layout, batch invariance, hostile tables."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fi_ops
from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference, assert_within_budget, clone_sample, comparable

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def indptr(counts, index=torch.int32):
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=index)


def tables(lengths, page_size, num_pages, pick=None, index=torch.int32):
    """(kv_indices, kv_indptr, kv_last_page_len); `pick(count)` chooses the pages, all different by default."""
    counts = [-(-n // page_size) for n in lengths]
    pages = torch.randperm(num_pages)[: sum(counts)] if pick is None else pick(sum(counts))
    last = [n - max(c - 1, 0) * page_size for n, c in zip(lengths, counts, strict=True)]
    return pages.to(index), indptr(counts, index), torch.tensor(last, dtype=index)


def lay_out(cache, layout: str):
    """The NHD `cache` in other memory: what the op is given has the same shape and values."""
    if layout == "NHD":
        return cache
    if layout == "HND":
        return cache.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":  # every second page, gaps between tokens and heads, rows that are not aligned
        pages, size, heads, dim = cache.shape
        wide = torch.zeros(2 * pages, size + 1, heads + 1, dim + 3, dtype=cache.dtype)
        view = wide[::2, :-1, 1:, 2 : dim + 2]
        view.copy_(cache)
        return view
    both = torch.stack((cache, cache), 1)
    return both[:, 1]


@st.composite
def batches(draw):
    """A call of paged_attention with anything that it takes."""
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    dtype, index = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([torch.int32, torch.int64]))
    page_size = draw(st.sampled_from([1, 2, 3, 5, 8, 16, 33, 64]))
    kv_heads, group = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2, 4, 5, 8]))
    dim, dim_vo = draw(st.sampled_from([(64, 64), (128, 128), (16, 16), (80, 80), (192, 128), (40, 72), (6, 5)]))
    qo_lens = draw(st.lists(st.sampled_from([0, 1, 1, 1, 2, 5, 17, 70]), min_size=0, max_size=6))
    rope = draw(st.booleans()) and dim % 2 == 0
    kv_lens = [draw(st.sampled_from([0, 1, 7, 64, 100, 333])) for _ in qo_lens]
    if rope:  # a query has a row of the table
        kv_lens = [max(q, kv) for q, kv in zip(qo_lens, kv_lens, strict=True)]
    count = sum(-(-n // page_size) for n in kv_lens)
    num_pages = count + 2
    # All pages different, or drawn with repetition: shared by requests, and repeated within one.
    pick = None if draw(st.booleans()) else lambda n: torch.randint(0, num_pages, (n,))
    kv_indices, kv_indptr, last = tables(kv_lens, page_size, num_pages, pick, index)
    kv_dtype = draw(st.sampled_from([dtype, dtype, *FP8]))
    layouts = draw(
        st.sampled_from([("NHD", "NHD"), ("HND", "HND"), ("fused", "fused"), ("padded", "HND"), ("NHD", "padded")])
    )
    caches = [
        lay_out(torch.randn(num_pages, page_size, kv_heads, d).to(kv_dtype), layout)
        for d, layout in zip((dim, dim_vo), layouts, strict=True)
    ]
    query = torch.randn(sum(qo_lens) + draw(st.sampled_from([0, 0, 2])), kv_heads * group, dim).to(dtype)
    options = {
        "causal": draw(st.booleans()),
        "window_left": draw(st.sampled_from([-1, -1, 0, 20])),
        "logits_soft_cap": draw(st.sampled_from([0.0, 0.0, 7.0])),
        "fixed_split_size": draw(st.sampled_from([0, 0, 64, 192])),
    }
    if rope:
        angles = torch.rand(400, draw(st.sampled_from([2, dim])) // 2) * 6.3
        options["cos_sin_cache"] = torch.cat((angles.cos(), angles.sin()), -1)
        options["interleaved"] = draw(st.booleans())
    for name, size in (
        ("alibi_slopes", kv_heads * group),
        ("sinks", kv_heads * group),
        ("k_scale", 1),
        ("v_scale", kv_heads),
    ):
        if draw(st.sampled_from([True, False, False])):
            options[name] = torch.rand(size) + 0.3
    if draw(st.sampled_from([True, False, False])):
        counts = [-(-q * kv // 8) for q, kv in zip(qo_lens, kv_lens, strict=True)]
        share = draw(st.sampled_from([0.02, 0.5, 0.97]))
        bits = (torch.rand(sum(counts), 8) < share).to(torch.uint8) << torch.arange(8)
        options["custom_mask"], options["mask_indptr"] = bits.sum(-1).to(torch.uint8), indptr(counts)
    return Sample((query, *caches, indptr(qo_lens, index), kv_indices, kv_indptr, last), options)


@pytest.mark.parametrize("device", DEVICES)
@RELAXED
@given(batches())
def test_random_batches(device, sample):
    assert_op_matches_reference(SPECS["paged_attention_with_lse"], clone_sample(sample, torch.device(device)))


def paged_from_ragged(key, value, lengths, page_size):
    """Caches with the tokens of ragged `key` and `value` in scattered pages, and their tables; what no token has is NaN."""
    num_pages = sum(-(-n // page_size) for n in lengths) + 3
    kv_indices, kv_indptr, last = tables(lengths, page_size, num_pages)
    caches, starts = [], indptr(lengths).tolist()
    for rows in (key, value):
        cache = torch.full((num_pages, page_size, *rows.shape[1:]), float("nan"), dtype=rows.dtype)
        for b, length in enumerate(lengths):
            pages = kv_indices[kv_indptr[b] : kv_indptr[b + 1]]
            for n, page in enumerate(pages.tolist()):
                piece = rows[starts[b] + n * page_size : starts[b] + min((n + 1) * page_size, length)]
                cache[page, : len(piece)] = piece
        caches.append(cache)
    return (*caches, kv_indices, kv_indptr, last)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qo_lens, kv_lens", [([1, 1, 3], [700, 65, 900]), ([200, 1, 40], [200, 350, 300])])
def test_pages_change_no_bit(dtype, qo_lens, kv_lens):
    """Where a key lies does not matter: not one bit, whatever the page size."""
    query = torch.randn(sum(qo_lens), 8, 64).to(dtype)
    key, value = (torch.randn(sum(kv_lens), 2, 64).to(dtype) for _ in range(2))
    ragged = torch.ops.fi.ragged_attention_with_lse(query, key, value, indptr(qo_lens), indptr(kv_lens), causal=True)
    for page_size in (1, 2, 5, 16, 64):
        k_cache, v_cache, *table = paged_from_ragged(key, value, kv_lens, page_size)
        paged = torch.ops.fi.paged_attention_with_lse(query, k_cache, v_cache, indptr(qo_lens), *table, causal=True)
        for mine, other in zip(paged, ragged, strict=True):
            assert torch.equal(mine, other), page_size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qo_len, kv_len", [(1, 3000), (4, 513), (300, 300), (130, 1000)])
def test_one_request_is_the_dense_op(dtype, qo_len, kv_len):
    """A batch of one and `attention` on the same memory do the same work in the same order."""
    query, key, value = (torch.randn(n, h, 64).to(dtype) for n, h in ((qo_len, 8), (kv_len, 2), (kv_len, 2)))
    batch = torch.ops.fi.ragged_attention(query, key, value, indptr([qo_len]), indptr([kv_len]), causal=True)
    dense = torch.ops.fi.attention(
        *(t.transpose(0, 1)[None] for t in (query, key, value)), causal=True, q_offset=kv_len - qo_len
    )
    assert torch.equal(batch, dense[0].transpose(0, 1))


# ---- batch invariance ----

REQUESTS = [(1, 1500), (1, 63), (3, 700), (40, 129), (200, 200), (150, 1100), (1, 0), (0, 90), (70, 2)]
"""(queries, keys)"""


def request_parts(n, options):
    """Tensors of request n alone, always the same ones: query, key, value, mask bits."""
    qo_len, kv_len = REQUESTS[n]
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(qo_len, 8, 64, generator=generator)
    key, value = (torch.randn(kv_len, 2, 64, generator=generator) for _ in range(2))
    bits = torch.randint(0, 256, (-(-qo_len * kv_len // 8),), generator=generator, dtype=torch.uint8)
    return query, key, value, bits


def run_batch(members, page_size, dtype, device, options, masked):
    """Outputs of each of `members` (numbers of REQUESTS) out of one call."""
    parts = [request_parts(n, options) for n in members]
    query, key, value = (torch.cat([p[i] for p in parts]).to(dtype) for i in range(3))
    qo_lens, kv_lens = ([REQUESTS[n][i] for n in members] for i in (0, 1))
    k_cache, v_cache, *table = paged_from_ragged(key, value, kv_lens, page_size)
    if masked:
        bits = [p[3] for p in parts]
        options = options | {"custom_mask": torch.cat(bits), "mask_indptr": indptr([len(b) for b in bits])}
    args = [t.to(device) for t in (query, k_cache, v_cache, indptr(qo_lens), *table)]
    options = {k: o.to(device) if isinstance(o, torch.Tensor) else o for k, o in options.items()}
    outputs = torch.ops.fi.paged_attention_with_lse(*args, **options)
    return list(zip(*(t.split(qo_lens) for t in outputs), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options, masked",
    [
        ({"causal": True, "fixed_split_size": 128}, False),
        ({"causal": True, "window_left": 100, "fixed_split_size": 64}, False),
        ({"fixed_split_size": 320}, True),
    ],
    ids=["causal", "window", "custom mask"],
)
def test_a_fixed_split_is_batch_invariant(device, dtype, options, masked):
    """A request's bits are the same alone, in any company and place, in any pages, and with any number of threads."""
    threads, order = torch.get_num_threads(), random.Random(3)
    alone = {n: run_batch([n], 16, dtype, device, options, masked)[0] for n in range(len(REQUESTS))}
    try:
        for trial in range(5):
            torch.set_num_threads(trial + 1)
            members = order.choices(range(len(REQUESTS)), k=[2, 5, 9, 20, 64][trial])
            got = run_batch(members, [16, 1, 64, 5, 16][trial], dtype, device, options, masked)
            for n, outputs in zip(members, got, strict=True):
                for mine, other in zip(outputs, alone[n], strict=True):
                    assert torch.equal(comparable(mine), comparable(other)), f"request {n} in batch {trial}"
    finally:
        torch.set_num_threads(threads)


# ---- large batches ----


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_1024_with_one_of_a_million_keys(device):
    """The long request sees 256 pages again and again: its output is theirs, its LSE higher by log2 of how often."""
    torch.manual_seed(5)
    page_size, heads, dim, distinct, repeats, long = 64, 2, 16, 256, 64, 700
    lengths = [int(n) for n in torch.randint(0, 120, (1024,))]
    lengths[long] = distinct * repeats * page_size
    num_pages = 300
    k_cache, v_cache = (torch.randn(num_pages, page_size, 1, dim).bfloat16() for _ in range(2))
    kv_indices, kv_indptr, last = tables(lengths, page_size, num_pages, lambda n: torch.randint(0, num_pages, (n,)))
    begin = int(kv_indptr[long])
    kv_indices[begin : begin + distinct * repeats] = torch.arange(distinct).repeat(repeats).int()
    query = torch.randn(1024, heads, dim).bfloat16()
    args = [t.to(device) for t in (query, k_cache, v_cache, indptr([1] * 1024), kv_indices, kv_indptr, last)]
    output, lse = (t.cpu() for t in torch.ops.fi.paged_attention_with_lse(*args))

    def reference(b, pages, length, double):
        kind = torch.float64 if double else torch.float32
        k, v = (c[pages.long()].flatten(0, 1)[:length, 0].to(kind) for c in (k_cache, v_cache))
        logits = query[b].to(kind) @ k.T * dim**-0.5
        return (logits.softmax(-1) @ v).to(kind if double else query.dtype), logits.logsumexp(-1) * math.log2(math.e)

    for b in (*range(0, 1024, 13), long):
        pages, length = kv_indices[kv_indptr[b] : kv_indptr[b + 1]], lengths[b]
        if b == long:
            pages, length = pages[:distinct], distinct * page_size
        if length == 0:
            assert torch.equal(output[b], torch.zeros(heads, dim).bfloat16()) and torch.all(lse[b] == -math.inf)
            continue
        exact, same = reference(b, pages, length, True), reference(b, pages, length, False)
        assert_within_budget(output[b], exact[0], same[0], f"request {b}")
        extra = math.log2(repeats) if b == long else 0.0
        assert_within_budget(lse[b], exact[1] + extra, same[1] + extra, f"LSE of request {b}")


# ---- what is read ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qo_len", [1, 3, 100])
def test_masked_tiles_and_the_rest_of_a_page_are_not_read(dtype, qo_len):
    """NaN where no query looks, tiles away from what any sees, and behind the last token: no output has one."""
    kv_len, tile, hidden = 6000, 1024, range(1200, 4800)
    mask = torch.rand(qo_len, kv_len) < 0.5
    mask[:, 0], mask[:, hidden.start - tile : hidden.stop + tile] = True, False
    key, value = (torch.randn(kv_len, 2, 64).to(dtype) for _ in range(2))
    key[hidden.start : hidden.stop], value[hidden.start : hidden.stop] = float("nan"), float("nan")
    query = torch.randn(qo_len, 8, 64).to(dtype)
    packed, mask_indptr = fi_ops.segment_packbits(mask.flatten(), indptr([qo_len * kv_len]), bitorder="little")
    k_cache, v_cache, *table = paged_from_ragged(key, value, [kv_len], 16)
    output = torch.ops.fi.paged_attention(query, k_cache, v_cache, indptr([qo_len]), *table, packed, mask_indptr)
    seen = torch.cat((mask[:, : hidden.start], mask[:, hidden.stop :]), 1)
    k, v = (torch.cat((t[: hidden.start], t[hidden.stop :])) for t in (key, value))
    dense = [t.transpose(0, 1)[None] for t in (query, k, v)]
    same, exact = (
        SPECS["attention"].reference(*tensors, seen[None, None])[0].transpose(0, 1)
        for tensors in (dense, [t.double() for t in dense])
    )
    assert_within_budget(output, exact, same)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("qo_len", [1, 100])
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", FP8)
def test_every_8_bit_float_is_exact(device, qo_len, flush, dtype, kv_dtype):
    """One key with weight 1: the output is its value. Denormals too, whatever the processor does with them."""
    codes = torch.arange(256, dtype=torch.uint8).view(kv_dtype)
    expected = codes.to(dtype)
    cache = codes.view(1, 1, 1, 256).expand(1, 1, 2, 256).contiguous()
    table = (torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([1]))
    query = torch.zeros(qo_len, 2, 256, dtype=dtype)
    key = torch.zeros(1, 1, 2, 256).to(kv_dtype)
    args = [t.to(device) for t in (query, key, cache, indptr([qo_len]), *table)]
    try:
        torch.set_flush_denormal(flush)
        output = torch.ops.fi.paged_attention(*args).cpu()
    finally:
        torch.set_flush_denormal(False)
    finite = expected.isfinite()
    assert torch.equal(output[..., finite], expected[finite].expand_as(output[..., finite]))
    assert torch.equal(output.isnan(), expected.isnan().expand_as(output))


# ---- hostile tables ----


def table_is_valid(nnz_qo, num_pages, page_size, qo_indptr, kv_indices, kv_indptr, last):
    """What the op promises to take, from its documentation."""
    qo, kv = qo_indptr.tolist(), kv_indptr.tolist()
    for ends in (qo, kv):
        if ends[0] < 0 or any(a > b for a, b in itertools.pairwise(ends)):
            return False
    if qo[-1] > nnz_qo or kv[-1] > len(kv_indices):
        return False
    if any(not 0 <= page < num_pages for page in kv_indices[kv[0] : kv[-1]].tolist()):
        return False
    return all(
        n == 0 if begin == end else 1 <= n <= page_size
        for n, (begin, end) in zip(last.tolist(), itertools.pairwise(kv), strict=True)
    )


@RELAXED
@given(st.data())
def test_hostile_tables_are_refused(data):
    """Any value anywhere in the index tensors: refused by name, or a table that is right as well, with its right answer."""
    torch.manual_seed(data.draw(st.integers(0, 999)))
    page_size, num_pages, qo_lens, kv_lens = 4, 12, [1, 3, 0, 20], [9, 3, 4, 20]
    kv_indices, kv_indptr, last = tables(kv_lens, page_size, num_pages)
    index_tensors = {
        "qo_indptr": indptr(qo_lens), "kv_indices": kv_indices, "kv_indptr": kv_indptr, "kv_last_page_len": last
    }  # fmt: skip
    for _ in range(data.draw(st.integers(1, 3))):
        target = index_tensors[data.draw(st.sampled_from(sorted(index_tensors)))]
        value = data.draw(st.sampled_from([-(2**31), -1, 0, 1, 3, 5, 11, 12, 24, 25, 1000, 2**31 - 1]))
        target[data.draw(st.integers(0, len(target) - 1))] = value
    query = torch.randn(24, 4, 16)
    k_cache, v_cache = (torch.randn(num_pages, page_size, 2, 16) for _ in range(2))
    sample = Sample((query, k_cache, v_cache, *index_tensors.values()), {"causal": True})
    if table_is_valid(len(query), num_pages, page_size, *index_tensors.values()):
        assert_op_matches_reference(SPECS["paged_attention_with_lse"], sample)
        return
    with pytest.raises(RuntimeError, match=r"fi::paged_attention: .*(qo_indptr|kv_ind|kv_last_page_len|query).*;"):
        torch.ops.fi.paged_attention(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("kv_dtype", FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_each_8_bit_value_comes_out_as_it_is(dim, dtype, kv_dtype):
    """Of one key the output is its value, keys and values being widened exactly: denormals, infinities and NaN too."""
    every = torch.arange(256, dtype=torch.uint8).repeat(dim // 64 + 1)
    rows = every[: 4 * dim].view(kv_dtype).view(4, 1, 1, dim)
    finite = torch.where(rows.float().isfinite(), rows.float(), 0.0).to(kv_dtype)
    one, four = torch.ones(4, dtype=torch.int32), torch.arange(5, dtype=torch.int32)
    query = torch.zeros(4, 1, dim, dtype=dtype)
    output = torch.ops.fi.paged_attention(query, finite, rows, four, four[:4], four, one)
    assert torch.equal(output.view(4, dim).nan_to_num(nan=-7.0), rows.view(4, dim).to(dtype).nan_to_num(nan=-7.0))
    for column in range(0, dim, 7):  # the logit is one number of the key
        query[:, :, column] = 1
        _, lse = torch.ops.fi.paged_attention_with_lse(query, finite, finite, four, four[:4], four, one, scale=1.0)
        query[:, :, column] = 0
        wanted = finite.view(4, dim)[:, column].float() * math.log2(math.e)
        torch.testing.assert_close(lse[:, 0], wanted, rtol=1e-6, atol=1e-7)
