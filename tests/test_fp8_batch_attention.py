"""Attention over a batch of 8-bit queries, keys and values: the ops against float64 and wide queries, wrappers, compile, graphs.

Hopper multiplies 8 bits by 8 bits where requests have many rows and head_dim is 64 or 128. Those are held to what weights of
8 bits allow (`tests/test_fp8_attention.py` says why), everything else to the common budget, and to what wide queries give.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.fx.experimental._config
from batch_cases import (
    DEVICES,
    MIXED,
    Batch,
    check,
    decode_batch,
    empty,
    indptr,
    plan_decode,
    plan_prefill,
    plan_ragged,
    ragged_keys,
)
from torch._dynamo.testing import CompileCounterWithBackend

import fi_ops
from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference, upcast

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
OUT_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MANY = [1, 150, 40], [300, 150, 170]  # more rows than a segment of the plan takes
WIDENED = (80, 80)  # (head_dim_qk, head_dim_vo) that no products of 8 bits are for


def nan_of(shape, dtype, device):
    return torch.full(shape, math.nan, device=device).to(dtype)


def set_values(target, source):
    """`target` is part of a tensor of 8 bits, which some devices can't index."""
    target.view(torch.uint8).copy_(source.to(target.dtype).view(torch.uint8))


def ragged_args(device, lengths, dtype=E4M3, heads=4, kv_heads=2, dims=(64, 64)):
    """Arguments of `ragged_attention` up to kv_indptr: parts of larger tensors of NaN."""
    qo_lens, kv_lens = lengths
    tensors = []
    for count, h, dim in ((qo_lens, heads, dims[0]), (kv_lens, kv_heads, dims[0]), (kv_lens, kv_heads, dims[1])):
        part = nan_of((sum(count) + 40, h, dim + 16), dtype, device)[: sum(count), :, :dim]
        set_values(part, torch.randn(part.shape, device=device))
        tensors.append(part)
    return *tensors, indptr(qo_lens, device=device), indptr(kv_lens, device=device)


def paged_args(device, lengths, dtype=E4M3, heads=4, kv_heads=2, dims=(64, 64), page_size=16):
    """Arguments of `paged_attention` up to kv_last_page_len: what no request owns is NaN."""
    qo_lens, kv_lens = lengths
    query = ragged_args(device, lengths, dtype, heads, kv_heads, dims)[0]
    counts = [-(-n // page_size) for n in kv_lens]
    pages = torch.randperm(sum(counts) + 3)[: sum(counts)]
    caches = [nan_of((sum(counts) + 3, page_size, kv_heads, dim), dtype, device) for dim in dims]
    for own, length in zip(pages.split(counts), kv_lens, strict=True):
        for nth, page in enumerate(own.tolist()):
            rows = min(page_size, length - nth * page_size)
            for cache in caches:
                set_values(cache[page, :rows], torch.randn(cache[page, :rows].shape, device=device))
    last = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in kv_lens], dtype=torch.int32, device=device)
    table = pages.to(device, torch.int32), indptr(counts, device=device), last
    return query, *caches, indptr(qo_lens, device=device), *table


MAKERS = {"ragged": ragged_args, "paged": paged_args}


def scale_of(count, device):
    return torch.rand(count, device=device) + 0.5


def scales(device, heads=4, kv_heads=2):
    return {"q_scale": scale_of(heads, device), "k_scale": scale_of(kv_heads, device), "v_scale": scale_of(1, device)}


def bits(device, lengths):
    counts = [-(-q * kv // 8) for q, kv in zip(*lengths, strict=True)]
    mask = torch.randint(0, 256, (sum(counts),), dtype=torch.uint8, device=device)
    return {"custom_mask": mask, "mask_indptr": indptr(counts, device=device)}


def table_of(device, rows=400, dim=64):
    angles = torch.rand(rows, dim // 2, device=device) * 6.3
    return torch.cat((angles.cos(), angles.sin()), -1)


VARIANTS = {
    "all keys": lambda device, lengths: {},
    "causal": lambda device, lengths: {"causal": True},
    "window": lambda device, lengths: {"causal": True, "window_left": 70},
    "window alone": lambda device, lengths: {"window_left": 9},
    "soft cap": lambda device, lengths: {"causal": True, "logits_soft_cap": 9.0},
    "sinks": lambda device, lengths: {
        "causal": True,
        "sinks": torch.tensor([4.0, -math.inf, -3.0, 9.0], device=device),
    },
    "ALiBi": lambda device, lengths: {"alibi_slopes": scale_of(4, device)},
    "mask": bits,
    "RoPE": lambda device, lengths: {"causal": True, "cos_sin_cache": table_of(device)},
    "fixed split": lambda device, lengths: {"causal": True, "fixed_split_size": 128},
    "scale": lambda device, lengths: {"scale": -0.3},
}


def held_to_the_budget(name, args, options):
    for suffix in ("", "_with_lse"):
        spec = SPECS[f"{name}_attention{suffix}"]
        assert_op_matches_reference(spec, Sample(args, options, f"{options.keys()}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("lengths", [MIXED, MANY], ids=["mixed", "many rows"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, lengths, name, device):
    """Whatever attention of wide queries can do, with a scale a head, in each dtype of output."""
    torch.manual_seed(0)
    for dtype, out_dtype in zip(itertools.cycle((E4M3, E5M2)), OUT_DTYPES, strict=False):
        args = MAKERS[name](device, lengths, dtype, dims=WIDENED)
        options = VARIANTS[variant](device, lengths) | scales(device) | {"out_dtype": out_dtype}
        held_to_the_budget(name, args, options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (192, 128), (17, 9)])
def test_head_dims(dims, name, device):
    torch.manual_seed(0)
    for lengths in (MIXED,) if dims[0] in (64, 128) else (MIXED, MANY):
        args = MAKERS[name](device, lengths, dims=dims, heads=6)
        held_to_the_budget(name, args, {"causal": True} | scales(device, heads=6))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
def test_where_they_are_wide_ones(out_dtype, dtype, name, device):
    """Bit for bit what queries in the output's dtype give over the same keys; q_scale multiplies them before."""
    torch.manual_seed(0)
    op = getattr(torch.ops.fi, f"{name}_attention_with_lse")
    # Of the last, where Hopper multiplies 8 bits, only the requests with few rows: the first query.
    for lengths, dims, few in ((MIXED, (64, 64), None), (MANY, WIDENED, None), (MANY, (128, 128), 1)):
        query, *rest = MAKERS[name](device, lengths, dtype, dims=dims)
        options = {"causal": True} | scales(device)
        scale = options.pop("q_scale")
        for factor in (None, scale[:1], scale):
            wide = query.to(out_dtype)
            if factor is not None:
                wide = (query.float() * factor[:, None]).to(out_dtype)
            got = op(query, *rest, **options, q_scale=factor, out_dtype=out_dtype)
            for value, want in zip(got, op(wide, *rest, **options), strict=True):
                assert value.dtype == want.dtype and torch.equal(value[:few], want[:few])


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_as_dense_attention(device):
    """A request of its own, few rows: `attention` has the same arguments for 8 bits, and the same default dtype."""
    torch.manual_seed(0)
    query, key, value, qo_indptr, kv_indptr = ragged_args(device, ([5], [90]))
    options = {"causal": True} | scales(device)
    dense = (t.transpose(0, 1)[None] for t in (query, key, value))
    want = torch.ops.fi.attention(*dense, **options)[0].transpose(0, 1)
    got = torch.ops.fi.ragged_attention(query, key, value, qo_indptr, kv_indptr, **options)
    assert got.dtype == want.dtype == torch.bfloat16
    limit = 2 * torch.finfo(torch.bfloat16).eps * want.abs().max()
    assert (got.float() - want.float()).abs().max() <= limit


# ---- many rows, where products of 8 bits are ----

TYPICAL_ERROR = 0.035  # root mean square, of that of the outputs
LARGEST_ERROR = 2**-4  # of the largest output
LSE_ERROR = 1e-3  # of the largest LSE, beside what rounding queries times their scale costs


def check_many_rows(name, args, options):
    """The op, with LSE and without, is what it is in float64, by what weights of 8 bits allow."""
    reference = SPECS[f"{name}_attention_with_lse"].reference
    ops = (getattr(torch.ops.fi, f"{name}_attention{suffix}") for suffix in ("_with_lse", ""))
    (output, lse), alone = (op(*args, **options) for op in ops)
    wide = {key: upcast(value) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    want, want_lse = reference(*map(upcast, args), **wide)
    seen = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), seen), "rows that see nothing"
    assert torch.all(lse[~seen] == -math.inf)
    rounding = (reference(*args, **options)[1].double() - want_lse)[seen].abs().max()
    error = (lse.double() - want_lse)[seen].abs().max()
    limit = 2 * rounding + LSE_ERROR * max(1.0, want_lse[seen].abs().max().item())
    assert error <= limit, f"LSE off by {error:.2e}, budget {limit:.2e}"
    for result in (output, alone):
        assert result.dtype == options.get("out_dtype", torch.bfloat16)
        assert not result[~seen].any()
        error = (result.double() - want).abs()
        assert error.max() <= LARGEST_ERROR * want.abs().max(), f"worst at {int(error.argmax())}"
        share = (error.square().mean() / want.square().mean()).sqrt()
        assert share <= TYPICAL_ERROR, f"off by {share:.4f} as a rule"


# Query tiles have 128 rows, KV tiles 128 keys, values are transposed 32 keys at a time; heads of a group share a request's last
# tile where they fit.
MANY_ROWS = {
    "one tile": ([128], [128]),
    "33 keys": ([65], [33]),
    "a tail of few rows": ([133, 70], [133, 517]),
    "more queries than keys": ([200, 90, 1], [70, 0, 3]),
    "mixed": ([1, 150, 40, 0, 3, 300], [300, 150, 170, 9, 40, 300]),
    "more tiles than blocks": ([257, 130, 129, 260], [300, 130, 700, 260]),
}
SEEN = {
    "all keys": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_left": 70},
    "window alone": {"window_left": 3},
}
PAGES = {
    "ragged": None,
    "pages of 16": 16,
    "pages of 48": 48,
    "pages of 128": 128,
    "pages of 256": 256,
    "pages of 5": 5,
}


def many_rows_args(pages, device, lengths, dtype, **sizes):
    if PAGES[pages] is None:
        return "ragged", ragged_args(device, lengths, dtype, **sizes)
    return "paged", paged_args(device, lengths, dtype, page_size=PAGES[pages], **sizes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("lengths", MANY_ROWS)
@pytest.mark.parametrize("pages", ["ragged", "pages of 16"])
def test_many_rows(pages, lengths, seen, dim, device):
    torch.manual_seed(0)
    name, args = many_rows_args(pages, device, MANY_ROWS[lengths], E4M3, dims=(dim, dim))
    check_many_rows(name, args, SEEN[seen])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (6, 2), (16, 2)])
@pytest.mark.parametrize("pages", PAGES)
def test_many_rows_of_heads_and_pages(pages, heads, dim, device):
    torch.manual_seed(0)
    sizes = {"heads": heads[0], "kv_heads": heads[1], "dims": (dim, dim)}
    name, args = many_rows_args(pages, device, MANY_ROWS["mixed"], E5M2, **sizes)
    check_many_rows(name, args, {"causal": True, "window_left": 200})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out_dtype", OUT_DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("pages", ["ragged", "pages of 48"])
def test_many_rows_with_scales(pages, sign, dim, out_dtype, device):
    """One a head and one for all; below 0, and 0: an ordinary mean. Sinks, too."""
    torch.manual_seed(0)
    name, args = many_rows_args(pages, device, MANY_ROWS["mixed"], E4M3, dims=(dim, dim))
    signs = torch.tensor([1.0, sign, 1.0, 1.0], device=device)
    each = {"q_scale": scale_of(4, device) * signs, "k_scale": scale_of(2, device), "v_scale": -scale_of(2, device)}
    check_many_rows(name, args, {"causal": True, "out_dtype": out_dtype} | each)
    every = {key: scale[1:2] for key, scale in each.items()}
    sinks = torch.tensor([4.0, -3.0, -math.inf, 9.0], device=device)
    check_many_rows(name, args, {"out_dtype": out_dtype, "sinks": sinks} | every)
    check_many_rows(name, args, {"scale": -0.2, "q_scale": each["q_scale"].abs() + 0.1, "k_scale": -every["k_scale"]})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 128])
def test_many_rows_over_caches_of_any_layout(dim, device):
    """HND, and both caches in one tensor."""
    torch.manual_seed(0)
    query, key, value, *rest = paged_args(device, MANY_ROWS["mixed"], dims=(dim, dim))
    by_head = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
    check_many_rows("paged", (query, *by_head, *rest), {"causal": True})
    both = torch.stack((key.view(torch.uint8), value.view(torch.uint8)), 1).view(key.dtype)
    check_many_rows("paged", (query, both[:, 0], both[:, 1], *rest), {"causal": True})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pages", ["ragged", "pages of 16"])
def test_many_rows_of_long_keys_of_a_mean(pages, device):
    """Sums that don't cancel: in the precision of one product after the other half of them would be lost."""
    torch.manual_seed(0)
    name, (query, key, value, *rest) = many_rows_args(pages, device, ([70], [20000]), E4M3, heads=2, kv_heads=1)
    set_values(value, value.float() + 1)
    # With a fixed split no kernel takes the call away because it has few tiles for many keys.
    check_many_rows(name, (query, key, value, *rest), {"fixed_split_size": 1 << 20})


# ---- the functions and FlashInfer's wrappers ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_functions(dtype, device):
    batch = Batch(device, *MIXED, dtype=dtype, layout="HND", fused=True)
    scale = scale_of(4, device)
    table = (batch.qo_indptr.to(device), *batch.table_on(device)[1::-1], batch.table_on(device)[2])
    options = {"causal": True, "return_lse": True, "q_scale": scale, "out_dtype": torch.float16}
    got = fi_ops.paged_attention(batch.q, batch.cache, *table, kv_layout="HND", **options)
    scaled = batch.expect_scaled(scale, torch.float16, causal=True)
    check(got, scaled)
    kv_indptr = indptr(batch.kv_lens, device=device)
    check(fi_ops.ragged_attention(batch.q, *ragged_keys(batch), table[0], kv_indptr, **options), scaled)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_wrappers(dtype, device):
    """Scales as numbers, for all, for each KV head and each query head, by position; what dtype the output has."""
    batch = decode_batch(device, dtype=dtype)
    heads, one = torch.tensor([0.5, 1.5], device=device), torch.tensor(2.0, device=device)
    wrapper = plan_decode(batch)
    check(wrapper.run_return_lse(batch.q, batch.cache), batch.expect())
    got = wrapper.run_return_lse(batch.q, batch.cache, q_scale=0.5, k_scale=1.5, v_scale=2.5)
    check(got, batch.expect(logits_scale=0.75, v_scale=2.5))
    got = wrapper.run_return_lse(batch.q, batch.cache, one, heads, heads)
    check(got, batch.expect(logits_scale=2 * heads, v_scale=heads))
    each = scale_of(4, device)
    wrapper = plan_decode(batch, o_data_type="float16")
    got = wrapper.run_return_lse(batch.q, batch.cache, q_scale=each, k_scale=heads)
    check(got, batch.expect_scaled(each, torch.float16, logits_scale=heads))

    batch = Batch(device, *MIXED, dtype=dtype)
    got = plan_prefill(batch, causal=True).run_return_lse(batch.q, batch.cache, k_scale=heads, v_scale=0.5)
    check(got, batch.expect(causal=True, logits_scale=heads, v_scale=0.5))
    out = torch.empty(batch.q.shape, dtype=torch.float32, device=device)
    wrapper = plan_ragged(batch, window_left=5)
    got = wrapper.run_return_lse(batch.q, *ragged_keys(batch), each, heads, one, out=out)
    assert got[0] is out
    check(got, batch.expect_scaled(each, torch.float32, window_left=5, logits_scale=heads, v_scale=2.0))
    got = plan_ragged(batch, o_data_type=torch.float32).run_return_lse(batch.q, *ragged_keys(batch))
    check(got, batch.expect(out_dtype=torch.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_more_wrappers(device):
    """Those that are built on the others: the mixed batch, POD's two, cascades, sparse blocks."""
    batch = Batch(device, *MIXED, dtype=E4M3)
    wrapper = fi_ops.BatchAttention("NHD", device)
    lengths = torch.tensor(batch.kv_lens, dtype=torch.int32)
    types = {"q_data_type": E4M3, "kv_data_type": E4M3}
    sizes = (*batch.sizes, batch.head_dim_vo, batch.page_size)
    wrapper.plan(batch.qo_indptr, batch.kv_indptr, batch.kv_indices, lengths, *sizes, causal=True, **types)
    check(
        wrapper.run(batch.q, batch.cache, k_scale=0.5, v_scale=2.0),
        batch.expect(causal=True, logits_scale=0.5, v_scale=2.0),
    )

    decode = decode_batch(device, dtype=E4M3)
    prompt = Batch(device, [70], [90], dtype=E4M3)
    pod = fi_ops.PODWithPagedKVCacheWrapper(empty(device))
    plan_decode(decode, pod)
    prefilled, (out, lse) = pod.run(
        prompt.q,
        prompt.keys[0],
        prompt.values[0],
        decode.q,
        decode.cache,
        causal_p=True,
        q_scale=0.5,
        return_lse_d=True,
    )
    check((out, lse), decode.expect(logits_scale=0.5))
    want = torch.ops.fi.attention(
        *(t.transpose(0, 1)[None] for t in (prompt.q, prompt.keys[0], prompt.values[0])), causal=True
    )
    assert torch.equal(prefilled, want[0].transpose(0, 1))

    whole = Batch(device, [3], [64], dtype=E4M3, page_size=16)
    table = whole.qo_indptr, *whole.table
    cascade = fi_ops.MultiLevelCascadeAttentionWrapper(1, empty(device))
    cascade.plan(*([t.to(device)] for t in table), *whole.sizes, 16, causal=True, **types)
    check((cascade.run(whole.q, whole.cache),), whole.expect(causal=True))

    sparse = fi_ops.BlockSparseAttentionWrapper(empty(device))
    rows = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
    columns = torch.tensor([0, 3, 2], dtype=torch.int32, device=device)
    square = Batch(device, [32], [64], dtype=E4M3)
    sparse.plan(rows, columns, 32, 64, 16, 16, 4, 2, 64, q_data_type=E4M3, kv_data_type=E4M3, o_data_type="bfloat16")
    mask = torch.zeros(32, 64, dtype=torch.bool, device=device)
    mask[:16, :16] = mask[:16, 48:] = mask[16:, 32:48] = True
    got = sparse.run(square.q, square.keys[0], square.values[0], return_lse=True)
    check(got, square.expect([mask]))


def test_refusals():
    batch = decode_batch("cpu", dtype=E4M3)
    wrapper = plan_decode(batch)

    def refused(match, call):
        with pytest.raises(RuntimeError, match=match):
            call()

    run = lambda *args, **options: wrapper.run(batch.q, batch.cache, *args, **options)  # noqa: E731
    refused(
        r"got 2 positional arguments too many.*pass q_scale, k_scale, v_scale and sinks by name", lambda: run(1.0, 1.0)
    )
    refused(r"got 3 positional arguments too many", lambda: run(1.0, 1.0, 1.0, v_scale=2.0))
    refused(r"q_scale must be a number or a tensor of 1 or 4 elements, got 3", lambda: run(q_scale=torch.ones(3)))
    refused(r"out_dtype must be float32, .* got float64", lambda: run(out=torch.empty(5, 4, 64, dtype=torch.float64)))
    wide = plan_decode(decode_batch("cpu"))
    refused(r"q must be torch.float32, as planned, got torch.float8_e4m3fn", lambda: wide.run(batch.q, batch.cache))
    mixed = decode_batch("cpu", dtype=E4M3, kv_dtype=E5M2)
    refused(
        r"paged_k_cache must have query's dtype float8_e4m3fn, got float8_e5m2; convert",
        lambda: plan_decode(mixed).run(mixed.q, mixed.cache),
    )


# ---- compiled, captured ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MAKERS)
@torch.fx.experimental._config.patch(use_duck_shape=False)  # else sizes that are equal by chance are one symbol
def test_compiled_once_for_all_sizes(name, device):
    count = CompileCounterWithBackend("aot_eager")
    op = getattr(torch.ops.fi, f"{name}_attention_with_lse")

    def step(*args, q_scale):
        output, lse = op(*args, causal=True, q_scale=q_scale, out_dtype=torch.float16)
        return output * 2, lse

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for lengths in (([1, 5, 9], [40, 5, 30]), ([2, 7, 9, 4], [41, 7, 33, 8]), MANY):
        args, q_scale = MAKERS[name](device, lengths), scale_of(4, device)
        for got, want in zip(compiled(*args, q_scale=q_scale), step(*args, q_scale=q_scale), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
    assert count.frame_count == 1


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_wrapper(device):
    batch = Batch(device, *MIXED, dtype=E4M3)
    wrapper = plan_prefill(batch, causal=True)
    scale = scale_of(4, device)

    def step(q, cache, q_scale):
        return wrapper.run(q, cache, q_scale=q_scale) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(batch.q, batch.cache, scale), step(batch.q, batch.cache, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("lengths", [MIXED, MANY], ids=["mixed", "many rows"])
def test_captured(lengths, name):
    """Replayed with other queries, keys and scales: nothing of them was read on the host."""
    torch.manual_seed(0)
    op = getattr(torch.ops.fi, f"{name}_attention_with_lse")
    args, options = MAKERS[name]("cuda", lengths), scales("cuda")
    others, other_options = MAKERS[name]("cuda", lengths), scales("cuda")
    op(*args, causal=True, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*args, causal=True, **options)
    want = op(*others, causal=True, **other_options)
    for mine, theirs in zip((*args, *options.values()), (*others, *other_options.values()), strict=True):
        mine.view(torch.uint8).copy_(theirs.view(torch.uint8)) if mine.dtype.itemsize == 1 else mine.copy_(theirs)
    graph.replay()
    for got, expected in zip(captured, want, strict=True):
        assert torch.equal(got, expected)
