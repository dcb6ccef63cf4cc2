"""Paged KV caches: the public functions against loops over single tokens, hostile tables, compilation, CUDA graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import fi_ops

RELAXED = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
INDEX = st.sampled_from([torch.int32, torch.int64])


def _append_by_loop(key, value, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr):
    """One token at a time into NHD caches; IndexError for one that has no place, ValueError for two at one."""
    page_size, taken = k_cache.shape[1], set()
    for n, (b, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        if b == -1 or position == -1:
            continue
        ends = kv_indptr.tolist()
        if not 0 <= b < len(ends) - 1 or not 0 <= position < (ends[b + 1] - ends[b]) * page_size:
            raise IndexError
        page, entry = kv_indices.tolist()[ends[b] + position // page_size], position % page_size
        if (page, entry) in taken:
            raise ValueError
        taken.add((page, entry))
        k_cache[page, entry], v_cache[page, entry] = key[n], value[n]


def _lay_out(k_cache, v_cache, layout: str, kind: str):
    """NHD caches as the caller of the public functions holds them, and a function that gives them back as NHD."""
    turn = (lambda t: t.transpose(-3, -2)) if layout == "HND" else (lambda t: t)
    if kind == "pair":
        held = turn(k_cache).contiguous(), turn(v_cache).contiguous()
        return held, lambda: (turn(held[0]), turn(held[1]))
    if kind == "strided pair":  # every third page of a longer one, heads with a gap between them
        long = [
            torch.full((3 * t.shape[0], *turn(t).shape[1:-1], t.shape[-1] + 3), 9.0, dtype=t.dtype)
            for t in (k_cache, v_cache)
        ]
        held = tuple(t[::3, ..., 1:-2].copy_(turn(c)) for t, c in zip(long, (k_cache, v_cache), strict=True))
        return held, lambda: (turn(held[0]), turn(held[1]))
    fused = torch.stack((turn(k_cache), turn(v_cache)), 1)
    return fused, lambda: (turn(fused)[:, 0], turn(fused)[:, 1])


@st.composite
def appends(draw):
    """(arguments of append_paged_kv_cache but the caches, NHD caches): random requests over scattered pages."""
    page_size, heads, head_dim = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 8, 20, 64]))
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    appended = [draw(st.integers(0, n)) for n in lengths]
    counts = [-(-n // page_size) for n in lengths]
    num_pages = sum(counts) + draw(st.integers(1, 4))
    order = draw(st.permutations(range(num_pages)))
    # A request may share the whole pages that it doesn't append to with the request before it.
    starts = [0, *itertools.accumulate(counts)]
    pages = list(order[: starts[-1]])
    for b in range(1, len(lengths)):
        for i in range(min((lengths[b] - appended[b]) // page_size, (lengths[b - 1] - appended[b - 1]) // page_size)):
            if draw(st.booleans()):
                pages[starts[b] + i] = pages[starts[b - 1] + i]
    last = [n - max(c - 1, 0) * page_size for n, c in zip(lengths, counts, strict=True)]
    index = draw(INDEX)
    table = [torch.tensor(x, dtype=index) for x in (pages, starts, last)]
    nnz = sum(appended) + draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))

    def rand(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    ends = torch.tensor([0, *itertools.accumulate(appended)], dtype=index)
    tokens = fi_ops.get_batch_indices_positions(ends, fi_ops.get_seq_lens(*table[1:], page_size), nnz)
    shuffle = torch.randperm(nnz, generator=generator)  # tokens may come in any order
    where = [t[shuffle].to(draw(INDEX)) for t in tokens]
    new = [rand(nnz, heads, head_dim) for _ in range(2)]
    return new, where, [rand(num_pages, page_size, heads, head_dim) for _ in range(2)], table


@RELAXED
@given(appends(), st.sampled_from(["NHD", "HND"]), st.sampled_from(["pair", "strided pair", "one tensor"]))
def test_append_is_one_token_at_a_time(call, layout, kind):
    new, where, caches, table = call
    expected = [t.clone() for t in caches]
    _append_by_loop(*new, *where, *expected, *table[:2])
    held, as_nhd = _lay_out(*caches, layout, kind)
    fi_ops.append_paged_kv_cache(*new, *where, held, *table, kv_layout=layout)
    assert all(torch.equal(a, b) for a, b in zip(as_nhd(), expected, strict=True))


@RELAXED
@given(appends(), st.data())
def test_hostile_tables_are_refused_or_harmless(call, data):
    """Any numbers in any index tensor: an error that leaves the caches as they are, or what the loop does."""
    new, where, caches, table = call
    tensors = [*where, *table]
    for _ in range(data.draw(st.integers(1, 3))):
        t = data.draw(st.sampled_from([t for t in tensors if t.numel()]))
        i = data.draw(st.integers(0, t.numel() - 1))
        near = st.integers(-3, 50)
        t[i] = data.draw(
            near if t.dtype == torch.int32 else near | st.sampled_from([-(2**63), 2**63 - 1, 2**32, 2**31])
        )
    got = [t.clone() for t in caches]
    try:
        fi_ops.append_paged_kv_cache(*new, *where, tuple(got), *table)
    except RuntimeError as refusal:
        assert str(refusal).startswith("fi::append_paged_kv_cache: ")
        assert all(torch.equal(a, b) for a, b in zip(got, caches, strict=True)), "wrote before refusing"
        return
    _append_by_loop(*new, *where, *caches, *table[:2])
    assert all(torch.equal(a, b) for a, b in zip(got, caches, strict=True))


@RELAXED
@given(st.lists(st.integers(0, 30), max_size=9), st.integers(0, 5), st.data())
def test_batch_indices_and_positions(appended, padding, data):
    lengths = [n + data.draw(st.integers(0, 100)) for n in appended]
    ends = torch.tensor([0, *itertools.accumulate(appended)], dtype=data.draw(INDEX))
    got = fi_ops.get_batch_indices_positions(
        ends, torch.tensor(lengths, dtype=data.draw(INDEX)), sum(appended) + padding
    )
    pairs = [(b, length - n + i) for b, (n, length) in enumerate(zip(appended, lengths, strict=True)) for i in range(n)]
    assert list(zip(*(t.tolist() for t in got), strict=True)) == pairs + [(-1, -1)] * padding
    assert all(t.dtype == torch.int32 for t in got)


def test_flashinfer_examples():
    ends = torch.tensor([0, 1, 3, 6, 10], dtype=torch.int32)
    batch_indices, positions = fi_ops.get_batch_indices_positions(ends, torch.full((4,), 5), 10)
    assert batch_indices.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert positions.tolist() == [4, 3, 4, 2, 3, 4, 1, 2, 3, 4]
    kv_indptr, last = torch.tensor([0, 3, 4, 6, 8], dtype=torch.int32), torch.tensor([13, 8, 9, 6], dtype=torch.int32)
    lens = fi_ops.get_seq_lens(kv_indptr, last, 16)
    assert lens.tolist() == [45, 8, 25, 22] and lens.dtype == torch.int32
    ends = torch.tensor([0, 45, 53, 78, 100])
    batch_indices, positions = fi_ops.get_batch_indices_positions(ends, lens, 100)
    key, value = (torch.randn(100, 32, 128).half() for _ in range(2))
    cache = torch.randn(1000, 2, 16, 32, 128).half()
    before = cache.clone()
    fi_ops.append_paged_kv_cache(key, value, batch_indices, positions, cache, torch.arange(8), kv_indptr, last)
    for b, page in enumerate(kv_indptr[:-1].tolist()):
        for side, new in ((0, key), (1, value)):
            tokens = cache[page : kv_indptr[b + 1], side].flatten(0, 1)
            assert torch.equal(tokens[: lens[b]], new[ends[b] : ends[b + 1]])
            assert torch.equal(tokens[lens[b] :], before[page : kv_indptr[b + 1], side].flatten(0, 1)[lens[b] :])
    assert torch.equal(cache[8:], before[8:])


@RELAXED
@given(
    appends(), st.sampled_from(["NHD", "HND"]), st.sampled_from(["pair", "strided pair", "one tensor"]), st.booleans()
)
def test_rope_and_append_is_one_after_the_other(call, layout, kind, is_neox):
    """Bit for bit: rotation and append in one op, and by the two functions."""
    (key, value), where, caches, table = call
    nnz, heads, head_dim = key.shape
    if head_dim < 2:
        return
    query = torch.randn(nnz, 2 * heads, head_dim).to(key.dtype)
    angles = torch.rand(50, head_dim // 4 or 1) * 6.3
    cos_sin_cache = torch.cat((angles.cos(), angles.sin()), -1)
    real = ((where[0] != -1) & (where[1] != -1))[:, None, None]
    rotated = [t.clone().flatten(1) for t in (query, key)]
    at = where[1].clamp(min=0)
    fi_ops.apply_rope_with_cos_sin_cache_inplace(at, *rotated, head_dim, cos_sin_cache, is_neox)
    rotated = [torch.where(real, r.view_as(t), t) for r, t in zip(rotated, (query, key), strict=True)]
    (one, one_nhd), (two, two_nhd) = (_lay_out(*(c.clone() for c in caches), layout, kind) for _ in range(2))
    fi_ops.append_paged_kv_cache(rotated[1], value, *where, one, *table, layout)
    got = fi_ops.rope_append_paged_kv_cache(query, key, value, cos_sin_cache, *where, two, *table, layout, is_neox)
    assert torch.equal(got, rotated[0])
    assert all(torch.equal(a, b) for a, b in zip(one_nhd(), two_nhd(), strict=True))


def test_mla_append():
    batch_indices, positions = torch.tensor([0, 1, 1, -1]), torch.tensor([4, 0, 1, -1])
    table = torch.tensor([3, 1, 5]), torch.tensor([0, 2, 3]), torch.tensor([1, 2])
    ckv, kpe = torch.randn(4, 512).bfloat16(), torch.randn(4, 64).bfloat16()
    caches = [torch.zeros(6, 4, d, dtype=torch.bfloat16) for d in (512, 64)]
    fi_ops.append_paged_mla_kv_cache(ckv, kpe, batch_indices, positions, *caches, *table)
    for cache, new in zip(caches, (ckv, kpe), strict=True):
        expected = torch.zeros_like(cache)
        expected[1, 0], expected[5, 0], expected[5, 1] = new[:3]
        assert torch.equal(cache, expected)


@RELAXED
@given(
    st.lists(st.tuples(st.integers(-2, 8), st.integers(-2, 8)), max_size=5),
    st.sampled_from(["pair", "one tensor"]),
    INDEX,
)
def test_copies_are_refused_or_right(pairs, kind, index):
    k_cache, v_cache = torch.randn(8, 3, 2, 5), torch.randn(8, 3, 2, 5)
    held, as_nhd = _lay_out(k_cache, v_cache, "HND", kind)
    src, dst = (torch.tensor([p[i] for p in pairs], dtype=index) for i in (0, 1))
    real = [p for p in pairs if -1 not in p]
    read, written = [p[0] for p in real], [p[1] for p in real]
    good = all(-1 <= page < 8 for p in pairs for page in p)
    good = good and len(set(written)) == len(written) and not set(read) & set(written)
    if good:
        fi_ops.copy_pages(held, src, dst)
        for cache in (k_cache, v_cache):
            cache[written] = cache[read]
    else:
        with pytest.raises(RuntimeError, match=r"fi::copy_pages: (src|dst)_pages"):
            fi_ops.copy_pages(held, src, dst)
    assert all(torch.equal(a, b) for a, b in zip(as_nhd(), (k_cache, v_cache), strict=True))


def test_fork_of_a_prefix():
    """Two requests share a prefix that ends inside a page: refused to append to it both, right after a copy."""
    cache = torch.randn(6, 2, 4, 1, 8)
    new = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    tokens = torch.tensor([0, 1]), torch.tensor([6, 6])
    indptr, last = torch.tensor([0, 2, 4]), torch.tensor([3, 3])
    before = cache.clone()
    with pytest.raises(RuntimeError, match="got page 3, entry 2 twice; copy a page that requests share"):
        fi_ops.append_paged_kv_cache(*new, *tokens, cache, torch.tensor([0, 3, 0, 3]), indptr, last)
    assert torch.equal(cache, before)
    fi_ops.copy_pages(cache, torch.tensor([3]), torch.tensor([5]))
    fi_ops.append_paged_kv_cache(*new, *tokens, cache, torch.tensor([0, 3, 0, 5]), indptr, last)
    for page, n in ((3, 0), (5, 1)):
        assert torch.equal(cache[page, :, :2], before[3, :, :2])
        assert torch.equal(cache[page, :, 2], torch.stack([t[n] for t in new]))


def test_offsets_beyond_32_bits():
    """The caches' elements pass 2^31: only the pages that are touched exist in memory."""
    cache = torch.empty(2**14 + 1, 2, 16, 32, 128, dtype=torch.float16)
    assert cache[:-1].numel() >= 2**31
    new = torch.randn(1, 32, 128).half()
    table = torch.tensor([2**14]), torch.tensor([0, 1]), torch.tensor([16])
    fi_ops.append_paged_kv_cache(new, new + 1, torch.tensor([0]), torch.tensor([15]), cache, *table)
    assert torch.equal(cache[-1, 0, 15], new[0]) and torch.equal(cache[-1, 1, 15], new[0] + 1)
    fi_ops.copy_pages(cache, torch.tensor([2**14]), torch.tensor([2**14 - 1]))
    assert torch.equal(cache[-2, :, 15], cache[-1, :, 15])


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_rounds_every_bfloat16_as_torch(fp8):
    """To nearest even for all that the format can hold; what is larger, infinities too, becomes the largest; NaN stays."""
    every = torch.arange(2**16).to(torch.int32).to(torch.uint16).view(torch.bfloat16).view(-1, 1, 256)
    caches = torch.zeros(1, 256, 1, 256).to(fp8), torch.zeros(1, 256, 1, 256).to(fp8)
    table = torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([256])
    fi_ops.append_paged_kv_cache(every, every.contiguous(), torch.zeros(256).int(), torch.arange(256), caches, *table)
    largest = torch.finfo(fp8).max
    for cache in caches:
        got, want = cache.float().flatten(), every.float().clamp(-largest, largest).to(fp8).float().flatten()
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def test_refusals():
    new, zero = torch.randn(1, 2, 8), torch.zeros(1).int()
    cache, table = torch.randn(3, 2, 4, 2, 8), (zero, torch.tensor([0, 1]), torch.tensor([1]))
    for bad, text in (
        (
            cache[0],
            r"paged_kv_cache must be \[max_num_pages, 2, \.\.\.\] of 5 dimensions or a pair of tensors, got \[2, 4, 2, 8\]",
        ),
        (cache[:, :1], r"got \[3, 1, 4, 2, 8\]"),
        ((cache,), r"a tensor or a pair \(k_cache, v_cache\), got 1 of them"),
    ):
        with pytest.raises(RuntimeError, match=r"fi_ops\.append_paged_kv_cache: .*" + text):
            fi_ops.append_paged_kv_cache(new, new, zero, zero, bad, *table)
        with pytest.raises(RuntimeError, match=r"fi_ops\.copy_pages: .*" + text):
            fi_ops.copy_pages(bad, zero, zero)
    with pytest.raises(RuntimeError, match="kv_layout must be NHD or HND, got NDH; pass one"):
        fi_ops.append_paged_kv_cache(new, new, zero, zero, cache, *table, kv_layout="NDH")
    with pytest.raises(RuntimeError, match=r"paged_kv_cache must be .* twice, got"):
        fi_ops.append_paged_kv_cache(new, new, zero, zero, (cache, cache), *table, kv_layout="HND")
    with pytest.raises(RuntimeError, match=r"ckv_cache must have 3 dimensions, got \[3, 2, 4, 2, 8\]"):
        fi_ops.append_paged_mla_kv_cache(new[:, 0], new[:, 0], zero, zero, cache, cache, *table)


# ---------------------------------------------------------------------------------------------------- in compiled graphs


def _step(key, value, ends, cache, kv_indices, kv_indptr, last, table, layout):
    """What an engine does in a step, out of its page table alone."""
    page_size = cache.shape[3 if layout == "HND" else 2]
    lens = fi_ops.get_seq_lens(kv_indptr, last, page_size)
    batch_indices, positions = fi_ops.get_batch_indices_positions(ends, lens, key.shape[0])
    paged = (batch_indices, positions, cache, kv_indices, kv_indptr, last, layout)
    query = fi_ops.rope_append_paged_kv_cache(key, key, value, table, *paged)
    fi_ops.append_paged_kv_cache(key + 1, value, *paged)
    fi_ops.copy_pages(cache, kv_indices[-1:], kv_indices[:1] * 0 + cache.shape[0] - 1)
    return lens, positions, query


def _step_arguments(nnz: int, layout: str, device="cpu", seed: int = 0, batch: int = 3):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(nnz, 30, (batch,), generator=generator)
    counts = -(-lengths // 4)
    pages = torch.randperm(40, generator=generator)[: batch * 8]
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    ends = torch.cat((torch.zeros(batch).int(), torch.tensor([nnz]).int()))  # the last request appends all
    key, value = (torch.randn(nnz, 2, 8, generator=generator) for _ in range(2))
    cache = torch.randn(41, 2, 4, 2, 8, generator=generator)
    cache = cache.transpose(2, 3).contiguous() if layout == "HND" else cache
    angles = torch.rand(32, 4, generator=generator)
    table = torch.cat((angles.cos(), angles.sin()), -1)
    args = key, value, ends, cache, pages.int(), indptr, (lengths - (counts - 1) * 4).int(), table
    return (*(t.to(device) for t in args), layout)


def _clone(args):
    return [t.clone() if isinstance(t, torch.Tensor) else t for t in args]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_compiles_to_one_dynamic_graph(layout):
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_step, fullgraph=True, dynamic=True, backend=count)
    for nnz in (5, 9, 14):
        mine, theirs = _clone(_step_arguments(nnz, layout)), _clone(_step_arguments(nnz, layout))
        got, expected = compiled(*mine), _step(*theirs)
        assert all(torch.equal(a, b) for a, b in zip((*got, mine[3]), (*expected, theirs[3]), strict=True))
    assert count.frame_count == 1


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_inductor_writes_the_cache_in_place(layout):
    """Functionalisation makes copies of what an op writes; none of the cache is left in the code."""
    torch._dynamo.reset()
    mine, theirs = _clone(_step_arguments(5, layout)), _clone(_step_arguments(5, layout))
    got, [code] = run_and_get_code(torch.compile(_step, fullgraph=True), *mine)
    expected = _step(*theirs)
    assert all(torch.equal(a, b) for a, b in zip((*got, mine[3]), (*expected, theirs[3]), strict=True))
    for name in ("rope_append_paged_kv_cache", "append_paged_kv_cache", "copy_pages"):
        assert f"torch.ops.fi.{name}.default(" in code
    sizes = [line for line in code.splitlines() if "empty_strided" in line and "41" in line]
    assert not sizes, sizes


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_captured_step_follows_the_tables(layout):
    """Lengths, positions and pages are found on the device: replayed on another table, a graph does that table's step."""
    static = _clone(_step_arguments(9, layout, "cuda"))
    _step(*_clone(static))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = _step(*static)
    for seed in range(5):
        args = _clone(_step_arguments(9, layout, "cuda", seed))
        for mine, theirs in zip(static[:-1], args[:-1], strict=True):
            mine.copy_(theirs)
        graph.replay()
        expected = _step(*args)
        assert all(torch.equal(a, b) for a, b in zip((*got, static[3]), (*expected, args[3]), strict=True)), seed
