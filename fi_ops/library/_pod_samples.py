"""Samples and error samples of POD-attention."""

from __future__ import annotations

import math

import torch

from ._page_samples import page_table
from ._spec import FP8, ErrorSample, Sample


def _parts(
    device, dtype, qo_len, kv_len, kv_lens, *, page_size=16, heads=4, kv_heads=2, head_dim=64, head_dim_vo=None, kv_dtype=None,
    index=torch.int32,
):  # fmt: skip
    def rand(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    dims = head_dim, head_dim_vo or head_dim
    num_pages = sum(-(-n // page_size) for n in kv_lens) + 3
    key_p, value_p = (rand(kv_len, kv_heads, d) for d in dims)
    caches = (rand(num_pages, page_size, kv_heads, d).to(kv_dtype or dtype) for d in dims)
    table = page_table(device, kv_lens, page_size, num_pages, index)
    return rand(qo_len, heads, head_dim), key_p, value_p, rand(len(kv_lens), heads, head_dim), *caches, *table


def pod_samples(device, dtype):
    def parts(*lengths, **sizes):
        return _parts(device, dtype, *lengths, **sizes)

    yield Sample(parts(40, 70, [37, 1, 90]), {"causal_p": True}, "append of 40, decode of 3")
    yield Sample(parts(200, 200, [300, 17], heads=8, head_dim=128), {"causal_p": True}, "prompt of 200, decode of 2")
    yield Sample(parts(150, 150, [1000] * 5, page_size=1, index=torch.int64), name="full, page_size 1, int64")
    windows = {"causal_p": True, "window_left_p": 20, "window_left": 33}
    yield Sample(parts(100, 130, [80, 3], page_size=5), windows, "windows")
    numbers = {"scale_p": 0.2, "logits_soft_cap_p": 8.0, "scale": 0.1, "logits_soft_cap": 20.0}
    yield Sample(parts(100, 100, [80, 3]), numbers, "scales and soft caps")
    for fp8 in FP8:
        yield Sample(parts(70, 90, [40, 50], kv_dtype=fp8), {"causal_p": True}, f"{fp8} cache")
    yield Sample(
        parts(80, 90, [40, 50], head_dim=192, head_dim_vo=128), {"causal_p": True}, "head_dim 192, head_dim_vo 128"
    )
    yield Sample(parts(9, 20, [40], heads=3, kv_heads=1, head_dim=17, head_dim_vo=9), {"causal_p": True}, "odd sizes")
    yield Sample(parts(1, 40, [40, 0]), name="one row, a request without pages")
    yield Sample(parts(0, 0, [40, 3]), name="decode alone")
    yield Sample(parts(70, 70, []), {"causal_p": True}, "prefill alone")
    query_p, _, _, query, k_cache, v_cache, *table = parts(70, 90, [40, 50])
    qkv = torch.randn(90, 8, 64, device=device).to(dtype)
    fused = torch.stack((k_cache, v_cache), 1)
    strided = (query_p, qkv[:, 4:6], qkv[:, 6:], query, fused[:, 0], fused[:, 1], *table)
    yield Sample(strided, {"causal_p": True}, "packed qkv, one tensor of both caches")


def pod_errors(device):
    good = _parts(device, torch.float32, 5, 9, [6, 7], page_size=4)
    names = (
        "query_p", "key_p", "value_p", "query", "paged_k_cache", "paged_v_cache", "kv_indices", "kv_indptr", "kv_last_page_len",
    )  # fmt: skip
    given = dict(zip(names, good, strict=True))

    def bad(match, needs_values=False, options=None, **changed):
        return ErrorSample(tuple((given | changed).values()), match, options or {}, needs_values=needs_values)

    query_p, key_p, value_p, query, k_cache, v_cache, kv_indices, kv_indptr, last = good
    yield bad(r"query_p must be float32, bfloat16 or float16, got float64; convert", query_p=query_p.double())
    yield bad(r"query_p must be \[qo_len, num_qo_heads, head_dim\], got \[5, 4\]", query_p=query_p[..., 0])
    yield bad(
        r"key_p must be \[kv_len, num_kv_heads, head_dim\] = \[9, 2, 64\], got \[9, 2, 32\]", key_p=key_p[..., :32]
    )
    yield bad(
        r"value_p must be \[kv_len, num_kv_heads, head_dim_vo\] = \[9, 2, 64\], got \[8, 2, 64\]", value_p=value_p[1:]
    )
    yield bad(r"query_p must have a multiple of key_p's 2 heads, got 3", query_p=query_p[:, :3])
    yield bad(r"query must have query_p's dtype float32, got float16", query=query.half())
    yield bad(r"paged_k_cache must be float32, float8_e4m3fn or float8_e5m2, got float16", paged_k_cache=k_cache.half())
    yield bad(r"paged_v_cache must be .* = \[7, 4, 2, 64\], got \[6, 4, 2, 64\]", paged_v_cache=v_cache[1:])
    yield bad(r"kv_indices must be \[nnz_pages\], got \[4, 1\]", kv_indices=kv_indices[:, None])
    yield bad(r"kv_indptr must be \[batch \+ 1\] = \[3\], got \[2\]", kv_indptr=kv_indptr[:2])
    yield bad(r"kv_last_page_len must be int32 or int64, got float32", kv_last_page_len=last.float())
    yield bad(r"window_left_p must be -1 \(no window\) or more, got -2", options={"window_left_p": -2})
    yield bad(r"scale must be a number, got nan", options={"scale": math.nan})
    yield bad(r"logits_soft_cap_p must be 0 \(none\) or more, got -1", options={"logits_soft_cap_p": -1.0})
    yield bad(r"kv_indptr must not decrease, got 4 before 2", True, kv_indptr=kv_indptr.new_tensor([0, 4, 2]))
    wrong = kv_indices.clone()
    wrong[0] = 7
    yield bad(r"kv_indices must be pages of the cache, at least 0 and less than 7, got 7", True, kv_indices=wrong)
