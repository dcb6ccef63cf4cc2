"""Samples and error samples of attention over a batch, paged and ragged, and of its plan."""

from __future__ import annotations

import itertools

import torch

from ._page_samples import page_table
from ._plan import make_plan
from ._spec import FP8, ErrorSample, Sample

_DECODE = ([1, 1, 3, 1], [37, 1, 90, 16])
_MIXED = ([1, 5, 0, 9, 3], [40, 5, 30, 33, 70])  # decode, prefill, no query, append
_MANY = ([1, 150, 40], [300, 150, 170])  # more rows than a segment takes


def _indptr(device, counts, index=torch.int32):
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=index, device=device)


def _parts(
    device, dtype, qo_lens, kv_lens, *, paged, page_size=4, num_pages=None, heads=4, kv_heads=2, head_dim=64, head_dim_vo=None,
    padding=0, kv_dtype=None, q_dtype=None, index=torch.int32,
):  # fmt: skip
    """The positional arguments of a call, to the end of the index tensors. kv_dtype, q_dtype: where they are not dtype."""
    head_dim_vo = head_dim_vo or head_dim

    def rand(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    query = rand(sum(qo_lens) + padding, heads, head_dim).to(q_dtype or dtype)
    qo_indptr = _indptr(device, qo_lens, index)
    if paged:
        num_pages = num_pages or sum(-(-n // page_size) for n in kv_lens) + 3
        table = page_table(device, kv_lens, page_size, num_pages, index)
        shape = [num_pages, page_size]
    else:
        table = (_indptr(device, kv_lens, index),)
        shape = [sum(kv_lens) + 3]
    key, value = (rand(*shape, kv_heads, d).to(kv_dtype or dtype) for d in (head_dim, head_dim_vo))
    return query, key, value, qo_indptr, *table


def _packed_masks(device, qo_lens, kv_lens, share=0.6):
    """Random bits for each request, from a byte of its own on: (custom_mask, mask_indptr)."""
    counts = [-(-q * kv // 8) for q, kv in zip(qo_lens, kv_lens, strict=True)]
    bits = (torch.rand(sum(counts), 8, device=device) < share).to(torch.uint8)
    packed = (bits << torch.arange(8, device=device)).sum(-1).to(torch.uint8)
    return packed, _indptr(device, counts)


def _table(device, length, rotary_dim):
    angles = torch.rand(length, rotary_dim // 2, device=device) * 6.3
    return torch.cat((angles.cos(), angles.sin()), -1)


def _samples(device, dtype, paged: bool):
    def parts(lengths, **sizes):
        return _parts(device, dtype, *lengths, paged=paged, **sizes)

    slopes, sinks = torch.rand(4, device=device) * 0.2, torch.randn(4, device=device)
    yield Sample(parts(_DECODE), name="decode")
    yield Sample(
        parts(_DECODE, heads=8, kv_heads=1, head_dim=128, page_size=16), {"causal": True}, "decode, 8 heads a group"
    )
    yield Sample(parts(_MIXED, page_size=16), {"causal": True}, "decode, append, prefill and no query, causal")
    yield Sample(parts(_MIXED, page_size=1, index=torch.int64), name="mixed, page_size 1, int64")
    yield Sample(parts(_MIXED, page_size=5, padding=3), {"causal": True, "window_left": 11}, "window, padding")
    yield Sample(parts(_MANY, page_size=16, head_dim=128), {"causal": True}, "many rows, causal")
    yield Sample(parts(_MANY, page_size=3), {"causal": True, "window_left": 50}, "many rows, window")
    yield Sample(parts(_MANY, page_size=64, heads=8, kv_heads=8), name="many rows, no groups, full")
    yield Sample(parts(([2, 70, 3], [1, 20, 0])), {"causal": True}, "more queries than keys, causal")
    yield Sample(parts(_MIXED), {"scale": 0.3, "logits_soft_cap": 8.0, "causal": True}, "scale and soft cap")
    yield Sample(parts(_MIXED), {"causal": True, "alibi_slopes": slopes}, "ALiBi")
    yield Sample(parts(_MANY), {"causal": True, "sinks": sinks}, "sinks")
    for lengths, name in ((_MIXED, "custom mask"), (_MANY, "custom mask, many rows")):
        mask, mask_indptr = _packed_masks(device, *lengths)
        yield Sample((*parts(lengths, page_size=8), mask, mask_indptr), name=name)
    mask, mask_indptr = _packed_masks(device, *_MIXED, share=0.05)
    yield Sample((*parts(_MIXED), mask, mask_indptr), {"causal": True}, "sparse custom mask and causal")
    for interleaved in (False, True):
        rope = {"cos_sin_cache": _table(device, 400, 32), "interleaved": interleaved, "causal": True}
        yield Sample(parts(_MIXED), rope, f"RoPE, {'interleaved' if interleaved else 'rotate-half'}, partial")
    padded = {"cos_sin_cache": _table(device, 40, 64)}
    yield Sample(parts(([1, 2, 1, 1], [37, 0, 0, 16])), padded, "RoPE, requests without keys")
    rope = {"cos_sin_cache": _table(device, 400, 64), "causal": True}
    yield Sample(parts(_MANY, page_size=16), rope, "RoPE, many rows")
    for fp8 in FP8:
        scales = {"k_scale": torch.rand(1, device=device) + 0.5, "v_scale": torch.rand(2, device=device) + 0.5}
        yield Sample(parts(_MIXED, kv_dtype=fp8, page_size=16), {"causal": True} | scales, f"{fp8}, scales")
        yield Sample(parts(_MANY, kv_dtype=fp8, head_dim=128), {"causal": True}, f"{fp8}, many rows")
    scales = {"k_scale": torch.rand(2, device=device) + 0.5, "v_scale": torch.rand(1, device=device) + 0.5}
    yield Sample(parts(_MIXED), scales | {"causal": True}, "scales of heads")
    yield Sample(
        parts(_MIXED, head_dim=192, head_dim_vo=128, page_size=16), {"causal": True}, "head_dim 192, head_dim_vo 128"
    )
    yield Sample(parts(_MANY, head_dim=80), {"causal": True}, "head_dim 80, many rows")
    yield Sample(parts(_MIXED, head_dim=256, page_size=8), {"causal": True}, "head_dim 256")
    yield Sample(parts(_MIXED, head_dim=17, head_dim_vo=9, heads=3, kv_heads=1), {"causal": True}, "odd sizes")
    yield Sample(parts(([1, 3], [1000, 700]), page_size=16), {"causal": True}, "long")
    split = {"causal": True, "fixed_split_size": 128}
    yield Sample(parts(([1, 3, 40], [1000, 700, 300]), page_size=16), split, "fixed split")
    mask, mask_indptr = _packed_masks(device, *_MIXED, share=0.9)
    everything = {
        "k_scale": torch.rand(2, device=device) + 0.5, "v_scale": torch.rand(2, device=device) + 0.5, "alibi_slopes": slopes,
        "sinks": sinks, "cos_sin_cache": _table(device, 100, 64), "causal": True, "window_left": 30, "scale": 0.2,
        "logits_soft_cap": 20.0, "interleaved": True,
    }  # fmt: skip
    yield Sample((*parts(_MIXED), mask, mask_indptr), everything, "all features at once")
    yield from _fp8_query_samples(device, dtype, paged)
    eight = parts(_MIXED, kv_dtype=FP8[0], q_dtype=FP8[0])
    options = everything | {"q_scale": torch.rand(4, device=device) + 0.5, "out_dtype": dtype}
    yield Sample((*eight, mask, mask_indptr), options, "8-bit queries, all features at once")
    yield Sample(parts(([1] * 40, list(range(40))), page_size=2), name="batch of 40, one without keys")
    yield Sample(parts(([0, 0], [4, 0])), name="no queries")
    yield Sample(parts(([], []), padding=2), name="no requests, padding alone")
    yield Sample(parts(([2], [9]), heads=0, kv_heads=0), name="no heads")
    yield _planned_sample(device, parts(_MIXED, page_size=16), paged)


def _fp8_query_samples(device, dtype, paged: bool):
    """Queries of 8 bits, too. `dtype` is the output's. Where products of 8 bits are, LSEs are less exact: not of such sizes."""

    def parts(lengths, fp8, **sizes):
        return _parts(device, dtype, *lengths, paged=paged, kv_dtype=fp8, q_dtype=fp8, **sizes)

    def scale(count):
        return torch.rand(count, device=device) + 0.5

    causal, one = {"causal": True, "out_dtype": dtype}, {"q_scale": scale(1), "k_scale": scale(1), "v_scale": scale(1)}
    heads = {"q_scale": scale(4), "k_scale": scale(2), "v_scale": scale(2)}
    for fp8 in FP8:
        yield Sample(parts(_DECODE, fp8, page_size=16), name=f"{fp8} queries, decode, bfloat16 by default")
        yield Sample(parts(_MIXED, fp8, padding=3), causal | heads, f"{fp8} queries, scales a head, padding")
        yield Sample(parts(_MANY, fp8, head_dim=80, page_size=16), causal | one, f"{fp8} queries, many rows")
    odd = parts(_MANY, FP8[0], heads=3, kv_heads=1, head_dim=17, head_dim_vo=9, page_size=5)
    yield Sample(odd, causal | {"q_scale": scale(3)}, "8-bit queries, odd sizes")
    split = causal | {"window_left": 300, "fixed_split_size": 128}
    yield Sample(parts(([1, 3, 20], [1000, 700, 300]), FP8[1], page_size=16), split, "8-bit queries, window, split")
    yield Sample(parts(([0, 0], [4, 0]), FP8[0]), heads | {"out_dtype": dtype}, "no 8-bit queries")
    query, *rest = parts(_MIXED, FP8[0])
    qkv = torch.randn(query.shape[0], 8, 67, device=device).to(FP8[0])
    yield Sample((qkv[:, :4, 3:], *rest), causal | one, "8-bit queries from a packed qkv, unaligned")


def _planned_sample(device, args, paged: bool):
    query, key, _, qo_indptr = args[:4]
    kv_indptr, last, page_size = (args[5], args[6], key.shape[1]) if paged else (args[4], None, 1)
    group = query.shape[1] // key.shape[-2]
    plan = make_plan(qo_indptr, kv_indptr, last, query.shape[0], group, page_size, causal=True)
    return Sample(args, {"causal": True, "plan": plan}, "a plan given")


def paged_samples(device, dtype):
    yield from _samples(device, dtype, paged=True)

    def parts(lengths, **sizes):
        return _parts(device, dtype, *lengths, paged=True, **sizes)

    for heads in (2, 4):
        query, key, value, *tables = parts(_MIXED, kv_heads=heads, page_size=8)
        hnd = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value))
        yield Sample((query, *hnd, *tables), {"causal": True}, f"HND caches, {heads} heads")
        fused = torch.stack((key, value), 1)
        yield Sample(
            (query, fused[:, 0], fused[:, 1], *tables), {"causal": True}, f"one tensor of both caches, {heads} heads"
        )
    query, key, _, *tables = parts(_MIXED, head_dim=8)
    wide = [torch.randn(*key.shape[:2], 3, 19, device=device).to(dtype)[:, :, 1:, 3:11] for _ in range(2)]
    strided = (t.repeat_interleave(2)[::2] for t in tables)
    yield Sample((query, *wide, *strided), {"causal": True}, "strided, unaligned caches, strided tables")
    qkv = torch.randn(query.shape[0], 8, 64, device=device).to(dtype)
    yield Sample((qkv[:, :4], *parts(_MIXED)[1:]), {"causal": True}, "query from a packed qkv")
    query, key, value, qo_indptr, kv_indices, *rest = parts(([1, 1, 3], [40, 41, 42]), page_size=8)
    kv_indices = kv_indices.clone()
    kv_indices[6:10], kv_indices[12:16] = kv_indices[:4], kv_indices[:4]
    yield Sample((query, key, value, qo_indptr, kv_indices, *rest), {"causal": True}, "a shared prefix")
    repeated = kv_indices.clone()
    repeated[:6] = repeated[0]
    longer = torch.cat((repeated, repeated.new_tensor([-7, 1000])))
    yield Sample(
        (query, key, value, qo_indptr, longer, *rest), name="a repeated page, kv_indices longer than kv_indptr says"
    )


def ragged_samples(device, dtype):
    yield from _samples(device, dtype, paged=False)
    query, key, _, *tables = _parts(device, dtype, *_MANY, paged=False, kv_heads=2)
    qkv = torch.randn(key.shape[0], 8, 64, device=device).to(dtype)
    yield Sample((query, qkv[:, 4:6], qkv[:, 6:], *tables), {"causal": True}, "key and value from a packed qkv")


def plan_samples(device, dtype):
    def sample(name, qo_lens, pages, last, nnz_qo=None, group_size=4, page_size=16, **options):
        qo_indptr, kv_indptr = _indptr(device, qo_lens, dtype), _indptr(device, pages, dtype)
        lens = None if last is None else torch.tensor(last, device=device, dtype=torch.int32)
        args = (qo_indptr, kv_indptr, lens, sum(qo_lens) if nnz_qo is None else nnz_qo, group_size, page_size)
        return Sample(args, options, name)

    batch = [1, 17, 0, 300, 9], [3, 2, 4, 20, 0], [5, 16, 1, 9, 0]
    for options in (
        {},
        {"causal": True},
        {"causal": True, "window_left": 100},
        {"causal": True, "fixed_split_size": 256},
    ):
        yield sample(f"mixed, {options}", *batch, **options)
    yield sample("padding", *batch, nnz_qo=400, causal=True)
    yield sample("decode, batch of 300", [1] * 300, list(range(300)), [1 if n else 0 for n in range(300)])
    yield sample("one of 128k among 255 of 512", [1] * 255 + [1], [32] * 255 + [8192], [16] * 256)
    tokens = [37 * int(i) % 900 for i in torch.randperm(1100)]
    ragged = {"page_size": 1, "causal": True}
    yield sample("ragged, batch of 1100, many tiles", tokens, tokens, None, group_size=1, **ragged)
    yield sample("one long prompt", [70000], [70000], None, group_size=7, **ragged)
    yield sample("more queries than keys, 128 heads a group", [5, 5], [1, 3], None, group_size=128, **ragged)
    args = sample("", *batch).args
    strided = tuple(t.repeat_interleave(2)[::2] for t in args[:3])
    yield Sample((*strided, *args[3:]), {"causal": True}, "strided")
    yield sample("no requests", [], [], None, nnz_qo=3)


# ---- refusals ----


def _bad_calls(good, names):
    def bad(match, needs_values=False, **changed):
        given = dict(zip(names, good, strict=True)) | {k: v for k, v in changed.items() if k in names}
        return ErrorSample(
            tuple(given.values()),
            match,
            {k: v for k, v in changed.items() if k not in names},
            needs_values=needs_values,
        )

    return bad


def _fp8_query_errors(bad, query, keys):
    """Of 8-bit queries, their scale, the dtype of what they give. `keys`: keys and values by their names."""
    eight = {"query": query.to(FP8[0])} | {name: t.to(FP8[0]) for name, t in keys.items()}
    key_name, key = next(iter(keys.items()))
    wrong = rf"{key_name} must have query's dtype float8_e4m3fn, got {{}}; convert"
    yield bad(wrong.format("float32"), query=eight["query"])
    yield bad(wrong.format("float8_e5m2"), **eight | {key_name: key.to(FP8[1])})
    one = torch.ones(1, device=query.device)
    wrong = r"q_scale must be left out where query is not of 8 bits, got query in float32; fold them into scale and the output"
    yield bad(wrong, q_scale=one)
    heads = r"q_scale must be \[1 or num_qo_heads 4\], got \[2\]; pass one scale, or one a head"
    yield bad(heads, **eight, q_scale=one.expand(2))
    yield bad(r"q_scale must be float32, got float16", **eight, q_scale=one.half())
    wrong = r"out_dtype must be query's dtype float32, got bfloat16; leave it out and convert the output"
    yield bad(wrong, out_dtype=torch.bfloat16)
    floats = r"out_dtype must be float32, bfloat16 or float16, got {}; leave it out for bfloat16"
    yield bad(floats.format("float64"), **eight, out_dtype=torch.float64)
    yield bad(floats.format("float8_e4m3fn"), **eight, out_dtype=FP8[0])


def _shared_errors(device, bad, query, keys, qo_indptr, kv_indptr):
    """What paged and ragged attention refuse alike: (2 KV heads, 4 query heads of 64, two requests)."""
    floats = "float32, bfloat16, float16, float8_e4m3fn or float8_e5m2"
    yield bad(rf"query must be {floats}, got float64; convert", query=query.double())
    yield bad(r"query must be \[nnz_qo, num_qo_heads, head_dim\], got \[4, 4\]; reshape it to 3", query=query[..., 0])
    yield bad(r"query must have a contiguous last dimension", query=query.mT.contiguous().mT)
    yield bad(r"query must have a multiple of .*'s 2 heads, got 3; repeat or drop heads", query=query[:, :3])
    yield from _fp8_query_errors(bad, query, keys)
    yield bad(r"qo_indptr must be int32 or int64, got float32; convert", qo_indptr=qo_indptr.float())
    yield bad(r"qo_indptr must be \[batch \+ 1\], got \[3, 1\]; start it with 0", qo_indptr=qo_indptr[:, None])
    yield bad(r"kv_indptr must be int32 or int64, got uint8", kv_indptr=kv_indptr.to(torch.uint8))
    yield bad(r"kv_indptr must be \[batch \+ 1\] = \[3\], got \[2\]; check", kv_indptr=kv_indptr[:2])
    mask = torch.zeros(20, dtype=torch.uint8, device=device)
    indptr = torch.tensor([0, 10, 20], device=device)
    yield bad(
        r"custom_mask and mask_indptr must be given together, got one of them; pass both or none", custom_mask=mask
    )
    yield bad(r"custom_mask must be uint8, got bool; convert", custom_mask=mask.bool(), mask_indptr=indptr)
    yield bad(r"mask_indptr must be \[batch \+ 1\] = \[3\], got \[2\]", custom_mask=mask, mask_indptr=indptr[:2])
    scale = torch.ones(3, device=device)
    yield bad(r"k_scale must be \[1 or num_kv_heads 2\], got \[3\]; pass one scale, or one a KV head", k_scale=scale)
    yield bad(r"v_scale must be float32, got float64", v_scale=scale.double())
    yield bad(r"alibi_slopes must be \[num_qo_heads\] = \[4\], got \[3\]", alibi_slopes=scale)
    yield bad(r"sinks must be float32, got bfloat16", sinks=scale.bfloat16())
    table = torch.zeros(100, 65, device=device)
    yield bad(
        r"cos_sin_cache must be \[max_len, rotary_dim\] with an even rotary_dim, .* 64, got \[100, 65\]",
        cos_sin_cache=table,
    )
    yield bad(r"cos_sin_cache must be float32, got float16", cos_sin_cache=table[:, :64].half())
    plan = torch.zeros(7, dtype=torch.int32, device=device)
    yield bad(r"plan must be what batch_attention_plan returns for these sizes = \[\d+\], got \[7\]; check", plan=plan)
    yield bad(r"plan must be int32, got int64", plan=plan.long())
    yield bad(r"window_left must be -1 \(no window\) or more, got -2; pass -1 for none", window_left=-2)
    yield bad(r"logits_soft_cap must be 0 \(none\) or more, got -1; pass 0", logits_soft_cap=-1.0)
    yield bad(r"scale must be a number, got nan; leave it out", scale=float("nan"))
    yield bad(
        r"fixed_split_size must be 0 \(none\) or a multiple of 64, got 100; round it up to one", fixed_split_size=100
    )

    def with_values(tensor, *values):
        return tensor.new_tensor(values)

    yield bad(
        r"qo_indptr must not be negative, got -1; start it with 0", True, qo_indptr=with_values(qo_indptr, -1, 2, 4)
    )
    yield bad(r"qo_indptr must not decrease, got 4 before 2", True, qo_indptr=with_values(qo_indptr, 0, 4, 2))
    yield bad(
        r"query has 4 tokens but qo_indptr\[-1\] is 5; pass indptr built from the same batch",
        True,
        qo_indptr=with_values(qo_indptr, 0, 1, 5),
    )
    yield bad(r"kv_indptr must not decrease, got 9 before 2", True, kv_indptr=with_values(kv_indptr, 0, 9, 2))
    yield bad(
        r"custom_mask has 20 bytes but request 1's bits end at byte \d+; pass the mask and indptr of segment_packbits",
        True,
        custom_mask=mask,
        mask_indptr=with_values(indptr, 0, 10, 20) + 15,
    )
    yield bad(
        r"mask_indptr must not decrease, got 9 before 2",
        True,
        custom_mask=mask,
        mask_indptr=with_values(indptr, 0, 9, 2),
    )
    short = torch.zeros(5, 64, device=device)
    yield bad(r"cos_sin_cache has 5 rows but request \d has \d+ keys; pass a longer table", True, cos_sin_cache=short)

    table = torch.zeros(100, 64, device=device)
    yield bad(
        r"cos_sin_cache has no row for a query before the first key, got 4 queries and . keys of request 0",
        True,
        cos_sin_cache=table,
        qo_indptr=with_values(qo_indptr, 0, 4, 4),
        kv_indptr=with_values(kv_indptr, 0, 1, 2),
    )


def paged_errors(device):
    good = _parts(device, torch.float32, [1, 3], [6, 7], paged=True, num_pages=10)
    query, k_cache, v_cache, qo_indptr, kv_indices, kv_indptr, last = good
    names = ("query", "paged_k_cache", "paged_v_cache", "qo_indptr", "kv_indices", "kv_indptr", "kv_last_page_len")
    bad = _bad_calls(good, names)
    keys = {"paged_k_cache": k_cache, "paged_v_cache": v_cache}
    yield from _shared_errors(device, bad, query, keys, qo_indptr, kv_indptr)
    yield bad(
        r"paged_k_cache must be float32, float8_e4m3fn or float8_e5m2, got bfloat16", paged_k_cache=k_cache.bfloat16()
    )
    yield bad(r"paged_k_cache must be \[num_pages, page_size, num_kv_heads, head_dim\], got", paged_k_cache=k_cache[0])
    yield bad(
        r"paged_v_cache must have paged_k_cache's dtype float32, got float8_e5m2", paged_v_cache=v_cache.to(FP8[1])
    )
    yield bad(
        r"paged_v_cache must be \[num_pages, page_size, num_kv_heads, head_dim_vo\] = \[10, 4, 2, 64\], got \[9, 4, 2, 64\]",
        paged_v_cache=v_cache[1:],
    )
    yield bad(
        r"paged_k_cache must be \[num_pages, page_size, num_kv_heads, head_dim\] = \[10, 4, 2, 64\], got \[10, 4, 2, 32\]",
        paged_k_cache=k_cache[..., :32],
        paged_v_cache=v_cache[..., :32],
    )
    yield bad(
        r"paged_k_cache must have pages of at least 1 token, got \[10, 0, 2, 64\]; allocate it with a page_size",
        paged_k_cache=k_cache[:, :0],
        paged_v_cache=v_cache[:, :0],
    )
    yield bad(r"kv_indices must be \[nnz_pages\], got \[4, 1\]", kv_indices=kv_indices[:, None])
    yield bad(r"kv_indices must be int32 or int64, got int16", kv_indices=kv_indices.short())
    yield bad(r"kv_last_page_len must be \[batch\] = \[2\], got \[1\]", kv_last_page_len=last[:1])
    for page in (-1, 10):
        wrong = kv_indices.clone()
        wrong[2] = page
        yield bad(
            rf"kv_indices must be pages of the cache, at least 0 and less than 10, got {page}; pass the table",
            True,
            kv_indices=wrong,
        )
    yield bad(
        r"kv_indices has 4 pages but kv_indptr\[-1\] is 6; pass indptr built from the same page table",
        True,
        kv_indptr=kv_indptr + 2,
    )
    for length in (0, 5):
        yield bad(
            rf"kv_last_page_len must be 1 to page_size 4, or 0 for a request without pages, got {length} for request 1",
            True,
            kv_last_page_len=last.new_tensor([2, length]),
        )


def ragged_errors(device):
    good = _parts(device, torch.float32, [1, 3], [6, 7], paged=False)
    query, key, value, qo_indptr, kv_indptr = good
    bad = _bad_calls(good, ("query", "key", "value", "qo_indptr", "kv_indptr"))
    yield from _shared_errors(device, bad, query, {"key": key, "value": value}, qo_indptr, kv_indptr)
    yield bad(r"key must be \[nnz_kv, num_kv_heads, head_dim\], got", key=key[None])
    yield bad(
        r"value must be \[nnz_kv, num_kv_heads, head_dim_vo\] = \[16, 2, 64\], got \[15, 2, 64\]", value=value[1:]
    )
    yield bad(r"value must have key's dtype float32, got float8_e4m3fn", value=value.to(FP8[0]))
    yield bad(
        r"key has 16 tokens but kv_indptr\[-1\] is 23; pass indptr built from the same batch",
        True,
        kv_indptr=kv_indptr + 10,
    )


def plan_errors(device):
    qo_indptr, kv_indptr = _indptr(device, [1, 3]), _indptr(device, [2, 2])
    last = torch.tensor([2, 3], device=device)
    good = (qo_indptr, kv_indptr, last, 4, 2, 16)
    bad = _bad_calls(good, ("qo_indptr", "kv_indptr", "kv_last_page_len", "nnz_qo", "group_size", "page_size"))
    yield bad(r"qo_indptr must be int32 or int64, got float32", qo_indptr=qo_indptr.float())
    yield bad(r"qo_indptr must be \[batch \+ 1\], got \[0\]; start it with 0", qo_indptr=qo_indptr[:0])
    yield bad(r"kv_indptr must be \[batch \+ 1\] = \[3\], got \[2\]", kv_indptr=kv_indptr[:2])
    yield bad(r"kv_last_page_len must be \[batch\] = \[2\], got \[1\]", kv_last_page_len=last[:1])
    yield bad(r"nnz_qo must be 0 or more, got -1; pass the number of query tokens", nnz_qo=-1)
    yield bad(r"group_size must be 1 or more, got 0; pass num_qo_heads / num_kv_heads", group_size=0)
    yield bad(r"page_size must be 1 or more, got 0; pass the cache's", page_size=0)
    yield bad(r"window_left must be -1 \(no window\) or more, got -3; pass -1 for none", window_left=-3)
    yield bad(
        r"fixed_split_size must be 0 \(none\) or a multiple of 64, got 65; round it up to one", fixed_split_size=65
    )
    yield bad(r"qo_indptr must not decrease, got 4 before 2", True, qo_indptr=qo_indptr.new_tensor([0, 4, 2]))
    yield bad(
        r"nnz_qo is 4 but qo_indptr\[-1\] is 6; pass the number of rows of query",
        True,
        qo_indptr=qo_indptr.new_tensor([0, 4, 6]),
    )
    yield bad(
        r"kv_last_page_len must be 1 to page_size 16, or 0 for a request without pages, got 17 for request 1",
        True,
        kv_last_page_len=last.new_tensor([2, 17]),
    )
