"""Samples and error samples of latent attention over a paged cache."""

from __future__ import annotations

import itertools
import math

import torch

from ._page_samples import page_table
from ._spec import FP8, ErrorSample, Sample

_SCALE = 1 / math.sqrt(192)


def _parts(
    device, dtype, qo_lens, kv_lens, *, page_size=16, heads=16, ckv=512, kpe=64, padding=0, kv_dtype=None, index=torch.int32,
):  # fmt: skip
    def rand(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    nnz, num_pages = sum(qo_lens) + padding, sum(-(-n // page_size) for n in kv_lens) + 3
    qo_indptr = torch.tensor([0, *itertools.accumulate(qo_lens)], dtype=index, device=device)
    caches = (rand(num_pages, page_size, d).to(kv_dtype or dtype) for d in (ckv, kpe))
    table = page_table(device, kv_lens, page_size, num_pages, index)
    queries = (rand(nnz, heads, d) / 2 for d in (ckv, kpe))  # logits of the size of a model's
    return *queries, *caches, qo_indptr, *table, _SCALE


def mla_samples(device, dtype):
    def parts(*lengths, **sizes):
        return _parts(device, dtype, *lengths, **sizes)

    yield Sample(parts([1, 1, 3, 1], [37, 1, 90, 16]), {"causal": True}, "decode and verify, 16 heads")
    yield Sample(parts([1, 2], [130, 65], heads=128, page_size=64), {"causal": True}, "decode, 128 heads, page_size 64")
    yield Sample(parts([1, 4, 0], [40, 33, 9], heads=32, page_size=1, padding=2), name="32 heads, page_size 1, padding")
    yield Sample(parts([4], [70], heads=64, index=torch.int64), {"causal": True}, "four rows, 64 heads, int64")
    yield Sample(parts([9, 40], [30, 40], page_size=8), {"causal": True}, "append and prefill")
    yield Sample(parts([5, 2, 1], [3, 2, 0]), {"causal": True}, "queries without keys")
    yield Sample(parts([2, 1], [20, 50], heads=5, page_size=3), name="5 heads, page_size 3")
    yield Sample(parts([1, 3], [300, 20], heads=1, page_size=5), {"causal": True}, "one head")
    yield Sample(parts([2], [20], heads=3, ckv=40, kpe=9), {"causal": True}, "odd sizes")
    long = parts([3, 70, 0, 1], [1500, 700, 40, 3], heads=3, ckv=40, kpe=9)
    yield Sample(long, {"causal": True}, "long requests, their keys split")
    scale = torch.rand(1, device=device) + 0.5
    for fp8 in FP8:
        name = str(fp8).removeprefix("torch.")
        yield Sample((*parts([1, 3], [40, 70], kv_dtype=fp8), scale), {"causal": True}, f"{name}, scale")
        yield Sample(parts([1], [30], kv_dtype=fp8, heads=20, page_size=64), name=f"{name}, no scale")
    yield Sample((*parts([2], [40]), scale), name="scale, not fp8")
    q_nope, _, ckv, _, *rest = parts([1, 2], [40, 33])
    both = torch.randn(*ckv.shape[:2], 576, device=device).to(dtype)
    query = torch.randn(*q_nope.shape[:2], 576, device=device).to(dtype) / 2
    strided = query[..., :512], query[..., 512:], both[..., :512], both[..., 512:]
    yield Sample((*strided, *rest), {"causal": True}, "parts of one query and of one cache")
    args = parts([1, 2], [40, 33], page_size=8)
    gaps = (t.repeat_interleave(2, 1)[:, ::2] for t in args[2:4])
    yield Sample((*args[:2], *gaps, *args[4:]), name="strided caches")
    yield Sample(parts([0, 0], [4, 0]), name="no queries")
    yield Sample(parts([], [], padding=2), name="no requests, padding alone")
    yield Sample(parts([2], [20], heads=0), name="no heads")


def mla_errors(device):
    good = _parts(device, torch.float32, [1, 3], [6, 7], page_size=4, heads=4)
    names = (
        "q_nope", "q_pe", "ckv_cache", "kpe_cache", "qo_indptr", "kv_indices", "kv_indptr", "kv_last_page_len", "scale", "kv_scale",
    )  # fmt: skip
    given = dict(zip(names, (*good, None), strict=True))

    def bad(match, needs_values=False, **changed):
        return ErrorSample(tuple((given | changed).values()), match, needs_values=needs_values)

    q_nope, q_pe, ckv, kpe, qo_indptr, kv_indices, kv_indptr, last, _ = good
    yield bad(r"has no backward, got an input that requires grad", q_pe=q_pe.clone().requires_grad_())
    yield bad(r"q_nope must be float32, bfloat16 or float16, got float64; convert", q_nope=q_nope.double())
    yield bad(r"q_nope must be \[nnz_qo, num_heads, head_dim_ckv\], got \[4, 4\]", q_nope=q_nope[..., 0])
    yield bad(r"q_nope must have a contiguous last dimension", q_nope=q_nope.mT.contiguous().mT)
    yield bad(r"q_pe must have q_nope's dtype float32, got float16", q_pe=q_pe.half())
    yield bad(r"q_pe must be \[nnz_qo, num_heads, head_dim_kpe\], got \[4, 256\]", q_pe=q_pe.flatten(1))
    yield bad(r"q_pe must be \[nnz_qo, num_heads, head_dim_kpe\] = \[4, 4, 64\], got \[3, 4, 64\]", q_pe=q_pe[1:])
    yield bad(r"ckv_cache must be float32, float8_e4m3fn or float8_e5m2, got bfloat16", ckv_cache=ckv.bfloat16())
    yield bad(r"ckv_cache must be \[num_pages, page_size, head_dim_ckv\], got \[28, 512\]", ckv_cache=ckv.flatten(0, 1))
    layout = r"ckv_cache must be \[num_pages, page_size, head_dim_ckv\] = \[7, 4, 512\], got \[7, 4, 500\]"
    yield bad(layout, ckv_cache=ckv[..., :500])
    yield bad(r"ckv_cache must have a contiguous last dimension", ckv_cache=ckv.mT.contiguous().mT)
    yield bad(r"kpe_cache must have ckv_cache's dtype float32, got float8_e4m3fn", kpe_cache=kpe.to(FP8[0]))
    layout = r"kpe_cache must be \[num_pages, page_size, head_dim_kpe\] = \[7, 4, 64\], got \[6, 4, 64\]"
    yield bad(layout, kpe_cache=kpe[1:])
    yield bad(r"page_size must be 1 or more, got 0; pass the cache's", ckv_cache=ckv[:, :0], kpe_cache=kpe[:, :0])
    yield bad(r"qo_indptr must be int32 or int64, got float32", qo_indptr=qo_indptr.float())
    yield bad(r"qo_indptr must be \[batch \+ 1\], got \[0\]; start it with 0", qo_indptr=qo_indptr[:0])
    yield bad(r"kv_indices must be int32 or int64, got int16", kv_indices=kv_indices.short())
    yield bad(r"kv_indices must be \[nnz_pages\], got \[4, 1\]", kv_indices=kv_indices[:, None])
    yield bad(r"kv_indptr must be \[batch \+ 1\] = \[3\], got \[2\]", kv_indptr=kv_indptr[:2])
    yield bad(r"kv_last_page_len must be \[batch\] = \[2\], got \[1\]", kv_last_page_len=last[:1])
    yield bad(r"scale must be a number, got nan; pass 1/sqrt of the head_dim before absorption", scale=math.nan)
    yield bad(r"kv_scale must be \[1\] = \[1\], got \[2\]", kv_scale=torch.ones(2, device=device))
    yield bad(r"kv_scale must be float32, got float16", kv_scale=torch.ones(1, device=device).half())
    wrong = kv_indices.clone()
    wrong[0] = 7
    yield bad(r"kv_indices must be pages of the cache, at least 0 and less than 7, got 7", True, kv_indices=wrong)
    yield bad(r"qo_indptr must not decrease, got 4 before 2", True, qo_indptr=qo_indptr.new_tensor([0, 4, 2]))
    yield bad(r"q_nope has 4 tokens but qo_indptr\[-1\] is 5; pass", True, qo_indptr=qo_indptr.new_tensor([0, 1, 5]))
    yield bad(r"kv_indices has 4 pages but kv_indptr\[-1\] is 6; pass indptr built from", True, kv_indptr=kv_indptr + 2)
    yield bad(r"kv_last_page_len must be 1 to page_size 4, .* got 5 for request 1", True, kv_last_page_len=last + 2)
