"""Samples and error samples of the ops on paged caches."""

from __future__ import annotations

import itertools

import torch

from ._spec import FP8, ErrorSample, Sample


def page_table(device, lengths, page_size: int, num_pages: int, index=torch.int32):
    """(kv_indices, kv_indptr, kv_last_page_len) of requests of `lengths` tokens, their pages scattered over the cache."""
    counts = [-(-n // page_size) for n in lengths]
    kv_indices = torch.randperm(num_pages)[: sum(counts)]
    kv_indptr = torch.tensor([0, *itertools.accumulate(counts)])
    last = torch.tensor(
        [n - max(c - 1, 0) * page_size for n, c in zip(lengths, counts, strict=True)], dtype=torch.int64
    )
    return tuple(t.to(device, index) for t in (kv_indices, kv_indptr, last))


def _tokens(device, appended, lengths, padding: int = 0, index=torch.int32):
    """(batch_indices, positions) of the last `appended[b]` tokens of each request, then padding."""
    requests = [b for b, n in enumerate(appended) for _ in range(n)]
    places = [i for n, total in zip(appended, lengths, strict=True) for i in range(total - n, total)]
    return tuple(torch.tensor(x + [-1] * padding, dtype=index, device=device) for x in (requests, places))


def _append_parts(
    device, dtype, appended, lengths, *, page_size=4, num_pages=24, heads=2, head_dim=16, head_dim_vo=None, padding=0,
    index=torch.int32, token_index=torch.int32,
):  # fmt: skip
    head_dim_vo = head_dim_vo or head_dim
    batch_indices, positions = _tokens(device, appended, lengths, padding, token_index)
    table = page_table(device, lengths, page_size, num_pages, index)
    new = [torch.randn(len(positions), heads, d, device=device).to(dtype) for d in (head_dim, head_dim_vo)]
    caches = [torch.randn(num_pages, page_size, heads, d, device=device).to(dtype) for d in (head_dim, head_dim_vo)]
    return (*new, batch_indices, positions, *caches, *table)


def _with_caches(parts, k_cache, v_cache):
    return (*parts[:4], k_cache, v_cache, *parts[6:])


def append_samples(device, dtype):
    def parts(*args, **sizes):
        return _append_parts(device, dtype, *args, **sizes)

    yield Sample(parts([1], [37], page_size=16, heads=8, head_dim=128), name="decode, one request")
    yield Sample(parts([1] * 5, [1, 16, 17, 40, 3], page_size=16, heads=4, head_dim=64), name="decode, batch of 5")
    yield Sample(parts([9, 0, 20, 1], [9, 0, 29, 8]), name="prefill and decode, ragged, a request without pages")
    yield Sample(parts([3, 2], [7, 2], page_size=1, index=torch.int64), name="page_size 1, int64 table")
    mixed = parts([5, 4], [5, 11], page_size=5, padding=3, token_index=torch.int64)
    yield Sample(mixed, name="page_size 5, int64 tokens, padding")
    one_sided = [t.clone() for t in parts([4, 4], [9, 6])]
    one_sided[2][1], one_sided[3][6] = -1, -1
    yield Sample(tuple(one_sided), name="-1 in one of batch_indices and positions")
    yield Sample(parts([6], [17], heads=3, head_dim=5, head_dim_vo=9), name="odd sizes, head_dim_vo apart")
    yield Sample(
        parts([30], [30], heads=1, head_dim=80, head_dim_vo=48, page_size=7), name="one head, head_dim_vo apart"
    )
    yield Sample(parts([300], [700], page_size=64, heads=4, head_dim=128), name="many tokens")
    prompts = parts([700, 403], [700, 900], num_pages=420, padding=3, heads=3)
    yield Sample(prompts, name="prompts, padding")
    for fp8 in FP8:
        yield Sample(_with_caches(prompts, *(t.to(fp8) for t in prompts[4:6])), name=f"prompts into {fp8}")

    hnd = parts([3, 7], [10, 9])
    views = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in hnd[4:6])
    yield Sample(_with_caches(hnd, *views), name="HND caches")
    for layout, transposed in (("NHD", False), ("HND", True)):
        args = parts([3, 7], [10, 9], heads=4)
        fused = torch.stack([t.transpose(1, 2) if transposed else t for t in args[4:6]], 1)
        views = (t.transpose(1, 2) if transposed else t for t in fused.unbind(1))
        yield Sample(_with_caches(args, *views), name=f"one {layout} tensor of both caches")
    args = parts([2, 3], [8, 9], heads=2, head_dim=8)
    wide = [torch.randn(24, 6, 3, 19, device=device).to(dtype)[:, 1:5, 1:, 3:11] for _ in range(2)]
    yield Sample(_with_caches(args, *wide), name="strided, unaligned caches")
    qkv = torch.randn(5, 8, 16, device=device).to(dtype)
    strided = (qkv[:, 4:6], qkv[:, 6:], *(t.repeat_interleave(2)[::2] for t in parts([2, 3], [8, 9])[2:4]))
    args = parts([2, 3], [8, 9])
    tables = (t.repeat_interleave(3)[::3] for t in args[6:])
    yield Sample((*strided, *args[4:6], *tables), name="packed qkv, strided index tensors")

    args = parts([2, 2], [10, 11])  # three pages each: the first two are made one prefix
    kv_indices = args[6].clone()
    kv_indices[3:5] = kv_indices[:2]
    yield Sample((*args[:6], kv_indices, *args[7:]), name="a shared prefix")
    longer = torch.cat((args[6], args[6].new_tensor([-7, 1000])))
    yield Sample((*args[:6], longer, *args[7:]), name="kv_indices longer than kv_indptr says")
    earlier = (*args[:3], args[3] - 7, *args[4:])
    yield Sample(earlier, name="positions that are not the last")
    yield Sample(parts([0, 0], [4, 0]), name="no tokens")
    yield Sample(parts([], [], padding=2), name="no requests, padding alone")
    yield Sample(parts([2], [3], heads=0), name="no heads")
    for fp8 in FP8:
        for head_dim in (64, 20, 5):
            args = parts([3, 7], [10, 9], head_dim=head_dim)
            scaled = [t * 10.0 ** torch.randint(-5, 7, t.shape, device=device).to(dtype) for t in args[:2]]
            name = f"{fp8}, head_dim {head_dim}"
            yield Sample((*scaled, *args[2:4], *(t.to(fp8) for t in args[4:6]), *args[6:]), name=name)


def _rope_append_parts(device, dtype, appended, lengths, *, num_qo_heads=4, rotary_dim=16, max_len=50, **sizes):
    parts = _append_parts(device, dtype, appended, lengths, **sizes)
    query = torch.randn(parts[0].shape[0], num_qo_heads, parts[0].shape[2], device=device).to(dtype)
    angles = torch.rand(max_len, rotary_dim // 2, device=device) * 6.3
    return (query, *parts[:2], torch.cat((angles.cos(), angles.sin()), -1), *parts[2:])


def rope_append_samples(device, dtype):
    def parts(*args, **sizes):
        return _rope_append_parts(device, dtype, *args, **sizes)

    llama = {"num_qo_heads": 32, "heads": 8, "head_dim": 128, "rotary_dim": 128, "page_size": 16}
    yield Sample(parts([1], [37], **llama), name="decode, one request")
    for interleaved in (False, True):
        kind, word = {"interleaved": interleaved}, "interleaved" if interleaved else "rotate-half"
        yield Sample(parts([1, 1, 9], [4, 19, 9], head_dim=64, rotary_dim=64, padding=2), kind, f"{word}, padding")
        partial = parts([2, 3], [8, 9], head_dim=80, rotary_dim=24, head_dim_vo=48, token_index=torch.int64)
        yield Sample(partial, kind, f"{word}, partial rotary_dim, head_dim_vo apart, int64")
        odd = parts([3, 4], [3, 11], head_dim=9, rotary_dim=6, num_qo_heads=3, heads=1, page_size=5)
        yield Sample(odd, kind, f"{word}, odd sizes")
        for fp8 in FP8:
            args = parts([3, 7], [10, 9], head_dim=64, rotary_dim=32)
            yield Sample((*args[:6], *(t.to(fp8) for t in args[6:8]), *args[8:]), kind, f"{word}, {fp8}")
        args = parts([40], [45], head_dim=128, rotary_dim=128, page_size=16)
        qkv = torch.randn(40, 8, 128, device=device).to(dtype)
        views = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in args[6:8])
        strided = (qkv[:, :4], qkv[:, 4:6], qkv[:, 6:], args[3].repeat(1, 2)[:, :128], *args[4:6], *views, *args[8:])
        yield Sample(strided, kind, f"{word}, packed qkv, strided table, HND caches")
    yield Sample(parts([2], [3], num_qo_heads=0), name="no query heads")
    yield Sample(parts([0, 0], [4, 0]), name="no tokens")
    yield Sample(parts([], [], padding=3, max_len=0), name="padding alone, a table without rows")


def batch_positions_samples(device, dtype):
    def call(appended, lengths, padding=0):
        indptr = torch.tensor([0, *itertools.accumulate(appended)], device=device, dtype=dtype)
        return indptr, torch.tensor(lengths, device=device, dtype=dtype), sum(appended) + padding

    yield Sample(call([1, 2, 3, 4], [5, 5, 5, 5]), name="FlashInfer's example")
    yield Sample(call([1] * 300, list(range(1, 301))), name="decode, batch of 300")
    yield Sample(call([0, 7, 0, 0, 40000, 1, 0], [3, 9, 0, 1, 50000, 1, 8], 100), name="empty requests, padding")
    indptr, lens, nnz = call([3, 4], [3, 9])
    strided = (indptr.repeat_interleave(2)[::2], lens.repeat_interleave(3)[::3])
    yield Sample((*strided, nnz), name="strided")
    yield Sample((indptr + 2, lens.long(), nnz + 4), name="a part of the tokens, int64 seq_lens")
    yield Sample(call([], [], 3), name="no requests")
    yield Sample(call([0, 0], [4, 0]), name="no tokens")


def seq_lens_samples(device, dtype):
    for page_size in (1, 16, 5):
        lengths = [1, page_size, page_size + 1, 0, 1000, 0]
        _, kv_indptr, last = page_table(device, lengths, page_size, 1200, dtype)
        yield Sample((kv_indptr, last, page_size), name=f"page_size {page_size}")
        yield Sample((kv_indptr + 7, last.long(), page_size), name=f"page_size {page_size}, int64 kv_last_page_len")
        strided = (kv_indptr.repeat_interleave(2)[::2], last.repeat_interleave(2)[::2])
        yield Sample((*strided, page_size), name=f"page_size {page_size}, strided")
    _, kv_indptr, last = page_table(device, list(range(700)), 32, 20000, dtype)
    yield Sample((kv_indptr, last, 32), name="batch of 700")
    yield Sample((kv_indptr[:1], last[:0], 32), name="no requests")


def copy_samples(device, dtype):
    def rand(*shape):
        return (torch.rand(*shape, device=device) * 200).to(dtype)

    def indices(*values, index=torch.int32):
        return torch.tensor(values, device=device, dtype=index)

    pair = rand(9, 4, 2, 16), rand(9, 4, 2, 16)
    yield Sample((*pair, indices(3, 0, 5), indices(8, 2, 7)), name="NHD, three pages")
    yield Sample((*pair, indices(3, 3, 3), indices(8, 2, 7, index=torch.int64)), name="one page to three")
    yield Sample((*pair, indices(3, -1, 5, 1), indices(8, 2, -1, 0)), name="padding")
    yield Sample((*pair, indices(), indices()), name="nothing to copy")
    yield Sample(
        (rand(40, 16, 8, 128), rand(40, 16, 8, 128), indices(*range(20)), indices(*range(39, 19, -1))), name="20 pages"
    )
    fused = rand(9, 2, 2, 4, 16)
    yield Sample((fused[:, 0], fused[:, 1], indices(1), indices(4)), name="one tensor of both caches")
    permuted = [rand(5, 4, 9, 6).permute(2, 1, 0, 3) for _ in range(2)]
    yield Sample((*permuted, indices(1, 2), indices(4, 0)), name="dimensions in another order")
    gaps = [rand(9, 6, 5, 19)[:, 1:5, 1:, 3:10] for _ in range(2)]
    yield Sample((*gaps, indices(1, 2), indices(4, 0)), name="pages of many pieces, odd sizes")
    even = [rand(9, 6, 5, 24)[:, ::2, 1:, 4:20] for _ in range(2)]
    yield Sample((*even, indices(1, 2), indices(4, 0)), name="pages of many pieces")
    yield Sample(
        (rand(9, 7, 33), rand(9, 5), indices(1, 2).repeat_interleave(2)[::2], indices(4, 0)),
        name="caches of two shapes",
    )
    yield Sample((rand(9), rand(9, 3, 0), indices(1, 2), indices(4, 0)), name="pages of one element and of none")


# ---- refusals ----


def append_errors(device):
    good = _append_parts(device, torch.float32, [3, 2], [7, 6], num_pages=10)
    names = (
        "append_key", "append_value", "batch_indices", "positions", "paged_k_cache", "paged_v_cache", "kv_indices",
        "kv_indptr", "kv_last_page_len",
    )  # fmt: skip

    def bad(match, needs_values=False, **changed):
        args = dict(zip(names, good, strict=True)) | changed
        return ErrorSample(tuple(args.values()), match, needs_values=needs_values)

    key, value, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr, last = good
    yield bad(
        r"paged_k_cache must be float32, bfloat16, float16, float8_e4m3fn or float8_e5m2, got float64; convert",
        paged_k_cache=k_cache.double(),
    )
    yield bad(r"paged_k_cache must be \[num_pages, .*\], got \[4, 2, 16\]; reshape", paged_k_cache=k_cache[0])
    yield bad(r"paged_k_cache must have a contiguous last dimension", paged_k_cache=k_cache.mT)
    expanded = k_cache[:1].expand(10, 4, 2, 16)
    yield bad(r"paged_k_cache is written and must not be expanded", paged_k_cache=expanded)
    yield bad(r"paged_v_cache is written and must not be expanded", paged_v_cache=expanded)
    yield bad(r"paged_v_cache must have paged_k_cache's dtype float32, got float16", paged_v_cache=v_cache.half())
    yield bad(r"paged_v_cache must be .* = \[10, 4, 2, 16\], got \[10, 3, 2, 16\]; check", paged_v_cache=v_cache[:, :3])
    yield bad(
        r"paged_k_cache must have pages of at least 1 token, got \[10, 0, 2, 16\]; allocate",
        paged_k_cache=k_cache[:, :0], paged_v_cache=v_cache[:, :0],
    )  # fmt: skip
    yield bad(r"append_key must be \[nnz, num_kv_heads, head_dim\], got \[5, 32\]; reshape", append_key=key.flatten(1))
    yield bad(r"append_key must have paged_k_cache's dtype float32, got bfloat16", append_key=key.bfloat16())
    yield bad(r"append_key must be .* = \[5, 2, 16\], got \[5, 1, 16\]; check", append_key=key[:, :1])
    yield bad(r"append_key must have a contiguous last dimension", append_key=torch.randn(5, 16, 2, device=device).mT)
    yield bad(r"append_value must be .* = \[5, 2, 16\], got \[4, 2, 16\]; check", append_value=value[:4])
    yield bad(r"has no backward, got an input that requires grad", append_value=value.clone().requires_grad_())
    eight = [t.to(torch.float8_e5m2) for t in (k_cache, v_cache)]
    yield bad(
        r"append_key must be float32, bfloat16 or float16, got float64; convert",
        append_key=key.double(), paged_k_cache=eight[0], paged_v_cache=eight[1],
    )  # fmt: skip
    yield bad(
        r"append_value must have append_key's dtype float32, got float16; convert",
        append_value=value.half(), paged_k_cache=eight[0], paged_v_cache=eight[1],
    )  # fmt: skip
    yield bad(r"batch_indices must be int32 or int64, got float32; convert", batch_indices=batch_indices.float())
    yield bad(r"batch_indices must be \[nnz\] = \[5\], got \[4\]; check", batch_indices=batch_indices[:4])
    yield bad(r"positions must be int32 or int64, got int16; convert", positions=positions.short())
    yield bad(r"positions must be \[nnz\] = \[5\], got \[1, 5\]; check", positions=positions[None])
    yield bad(r"kv_indices must be int32 or int64, got uint8; convert", kv_indices=kv_indices.byte())
    yield bad(r"kv_indices must be \[nnz_pages\], got \[1, 4\]; reshape", kv_indices=kv_indices[None])
    yield bad(r"kv_indptr must be \[batch \+ 1\], got \[1, 3\]; reshape", kv_indptr=kv_indptr[None])
    yield bad(r"kv_indptr must be \[batch \+ 1\], got \[0\]; start it with 0", kv_indptr=kv_indptr[:0])
    yield bad(r"kv_last_page_len must be \[batch\] = \[2\], got \[1\]; check", kv_last_page_len=last[:1])

    def table(match, **changed):
        return bad(match, True, **{name: torch.tensor(v, device=device) for name, v in changed.items()})

    pages = kv_indices.tolist()
    yield table(r"kv_indptr must not be negative, got -1; start it with 0", kv_indptr=[-1, 2, 4])
    yield table(r"kv_indptr must not decrease, got 5 before 4; make it", kv_indptr=[0, 5, 4])
    yield table(r"kv_indices has 4 pages but kv_indptr\[-1\] is 6; pass indptr built", kv_indptr=[0, 2, 6])
    yield table(r"kv_indices has 4 pages but kv_indptr\[-1\] is 4611686018427387904; pass", kv_indptr=[0, 2, 2**62])
    text = r"kv_indices must be pages of the cache, at least 0 and less than 10, got {}; pass"
    yield table(text.format(10), kv_indices=[*pages[:3], 10])
    yield table(text.format(-1), kv_indices=[-1, *pages[1:]])
    yield table(text.format(2**33), kv_indices=[pages[0], 2**33, *pages[2:]])
    text = r"kv_last_page_len must be 1 to page_size 4, or 0 for a request without pages, got {} for request {}; pass"
    yield table(text.format(5, 1), kv_last_page_len=[3, 5])
    yield table(text.format(0, 0), kv_last_page_len=[0, 2])
    yield table(text.format(2, 1), kv_indptr=[0, 4, 4], kv_last_page_len=[3, 2])
    text = r"batch_indices must be -1 \(padding\) or a request, less than 2, got {}; fix"
    yield table(text.format(2), batch_indices=[0, 0, 0, 1, 2])
    yield table(text.format(-2), batch_indices=[-2, 0, 0, 1, 1])
    text = (
        r"positions must be -1 \(padding\) or within the request's pages, got {} for request {} with 2 pages of 4; give"
    )
    yield table(text.format(8, 1), positions=[4, 5, 6, 4, 8])
    yield table(text.format(-2, 0), positions=[-2, 5, 6, 4, 5])
    yield table(text.format(2**40, 0), positions=[4, 2**40, 6, 4, 5])
    text = r"must give each token a place of its own, got page {}, entry {} twice; copy a page"
    yield table(text.format(pages[1], 2), positions=[4, 6, 6, 4, 5])
    shared = [pages[0], pages[1], pages[1], pages[2]]
    yield table(text.format(pages[1], 0), kv_indices=shared, positions=[4, 5, 6, 0, 5])


def rope_append_errors(device):
    good = _rope_append_parts(device, torch.float32, [3, 2], [7, 6], num_pages=10)
    query, table = good[0], good[3]

    def bad(at, value, match, needs_values=False):
        return ErrorSample((*good[:at], value, *good[at + 1 :]), match, needs_values=needs_values)

    yield bad(0, query.half(), r"query must have append_key's dtype float32, got float16; convert")
    yield bad(0, query[0], r"query must be \[nnz, num_qo_heads, head_dim\], got \[4, 16\]; reshape")
    yield bad(0, query[:4], r"query must be .* = \[5, 4, 16\], got \[4, 4, 16\]; check")
    yield bad(0, query[..., :8], r"query must be .* = \[5, 4, 16\], got \[5, 4, 8\]; check")
    yield bad(0, query.mT.contiguous().mT, r"query must have a contiguous last dimension")
    yield bad(0, query.clone().requires_grad_(), r"has no backward, got an input that requires grad")
    yield bad(1, good[1][:, :1], r"append_key must be .* = \[5, 2, 16\], got \[5, 1, 16\]; check")
    yield bad(3, table.half(), r"cos_sin_cache must be float32, got float16; convert")
    yield bad(3, table[None], r"cos_sin_cache must be \[max_len, rotary_dim\], got \[1, 50, 16\]; reshape")
    yield bad(3, table.mT.contiguous().mT, r"cos_sin_cache must have a contiguous last dimension")
    text = r"cos_sin_cache must be .* with an even rotary_dim of at most head_dim 16, got \[50, {}\]; cat"
    for width in (0, 7, 18):
        yield bad(3, torch.zeros(50, width, device=device), text.format(width))
    rows = r"positions must be rows of cos_sin_cache, less than 6, got 6; make it longer"
    yield bad(3, table[:6], rows, needs_values=True)
    yield bad(
        4, good[4] + 2, r"batch_indices must be -1 \(padding\) or a request, less than 2, got 2", needs_values=True
    )


def batch_positions_errors(device):
    indptr, lens = torch.tensor([0, 2, 5], device=device), torch.tensor([4, 3], device=device)
    yield ErrorSample((indptr.float(), lens, 5), r"append_indptr must be int32 or int64, got float32; convert")
    yield ErrorSample((indptr[None], lens, 5), r"append_indptr must be \[batch \+ 1\], got \[1, 3\]; reshape")
    yield ErrorSample((indptr[:0], lens, 5), r"append_indptr must be \[batch \+ 1\], got \[0\]; start it with 0")
    yield ErrorSample((indptr, lens.float(), 5), r"seq_lens must be int32 or int64, got float32; convert")
    yield ErrorSample((indptr, indptr, 5), r"seq_lens must be \[batch\] = \[2\], got \[3\]; check")
    yield ErrorSample((indptr, lens, -1), r"nnz must be 0 or more, got -1; pass the number of appended tokens")
    yield ErrorSample((indptr, lens, 4), r"nnz must be at least append_indptr\[-1\] 5, got 4; pass", needs_values=True)
    yield ErrorSample(
        (indptr - 1, lens, 5), r"append_indptr must not be negative, got -1; start it with 0", needs_values=True
    )
    yield ErrorSample(
        (indptr.flip(0), lens, 5), r"append_indptr must not decrease, got 5 before 2; make it", needs_values=True
    )
    text = r"seq_lens must count the appended tokens and be at most 2\^31, got {} for request {} that appends {}; pass"
    yield ErrorSample((indptr, lens - 1, 5), text.format(2, 1, 3), needs_values=True)
    yield ErrorSample((indptr, lens + 2**31, 5), text.format(2**31 + 4, 0, 2), needs_values=True)


def seq_lens_errors(device):
    _, indptr, last = page_table(device, [5, 0, 8], 4, 10)
    yield ErrorSample((indptr.float(), last, 4), r"kv_indptr must be int32 or int64, got float32; convert")
    yield ErrorSample((indptr[None], last, 4), r"kv_indptr must be \[batch \+ 1\], got \[1, 4\]; reshape")
    yield ErrorSample((indptr[:0], last, 4), r"kv_indptr must be \[batch \+ 1\], got \[0\]; start it with 0")
    yield ErrorSample((indptr, last.bool(), 4), r"kv_last_page_len must be int32 or int64, got bool; convert")
    yield ErrorSample((indptr, last[:2], 4), r"kv_last_page_len must be \[batch\] = \[3\], got \[2\]; check")
    yield ErrorSample((indptr, last, 0), r"page_size must be 1 or more, got 0; pass the cache's")
    yield ErrorSample(
        (indptr.flip(0), last, 4), r"kv_indptr must not decrease, got 4 before 2; make it", needs_values=True
    )
    yield ErrorSample((indptr - 1, last, 4), r"kv_indptr must not be negative, got -1; start it", needs_values=True)
    text = r"kv_last_page_len must be 1 to page_size {}, or 0 for a request without pages, got {} for request {}; pass"
    yield ErrorSample((indptr, last, 3), text.format(3, 4, 2), needs_values=True)
    yield ErrorSample((indptr, last.clamp(min=1), 4), text.format(4, 1, 1), needs_values=True)


def copy_errors(device):
    caches = [torch.randn(6, 4, 2, 8, device=device) for _ in range(2)]
    src, dst = (torch.tensor(x, device=device) for x in ([1, 0], [4, 3]))
    number = torch.tensor(1.0, device=device)
    yield ErrorSample(
        (number, caches[1], src, dst), r"paged_k_cache must be \[num_pages, \.\.\.\] of 1 to 8 dimensions, got \[\]"
    )
    yield ErrorSample(
        (caches[0], number, src, dst), r"paged_v_cache must be \[num_pages, \.\.\.\] of 1 to 8 dimensions, got \[\]"
    )
    expanded = caches[0][:1].expand(6, 4, 2, 8)
    yield ErrorSample((expanded, caches[1], src, dst), r"paged_k_cache is written and must not be expanded")
    yield ErrorSample((caches[0], expanded, src, dst), r"paged_v_cache is written and must not be expanded")
    yield ErrorSample(
        (caches[0], caches[1][:5], src, dst),
        r"paged_v_cache must have paged_k_cache's 6 pages, got \[5, 4, 2, 8\]; pass",
    )
    yield ErrorSample((*caches, src.float(), dst), r"src_pages must be int32 or int64, got float32; convert")
    yield ErrorSample((*caches, src[None], dst), r"src_pages must be \[num_copies\], got \[1, 2\]; reshape")
    yield ErrorSample((*caches, src, dst.short()), r"dst_pages must be int32 or int64, got int16; convert")
    yield ErrorSample((*caches, src, dst[:1]), r"dst_pages must be \[num_copies\] = \[2\], got \[1\]; check")
    yield ErrorSample(
        (caches[0].clone().requires_grad_(), caches[1], src, dst), r"has no backward, got an input that requires grad"
    )
    text = r"{} must be -1 \(padding\) or pages of the cache, less than 6, got {}; fix"
    yield ErrorSample((*caches, src + 5, dst), text.format("src_pages", 6), needs_values=True)
    yield ErrorSample((*caches, src, dst - 6), text.format("dst_pages", -2), needs_values=True)
    yield ErrorSample((*caches, src, dst * 0 + 5), r"dst_pages must differ, got page 5 twice; copy", needs_values=True)
    yield ErrorSample(
        (*caches, src, src.flip(0)),
        r"src_pages and dst_pages must not overlap, got page 0 in both; copy",
        needs_values=True,
    )
