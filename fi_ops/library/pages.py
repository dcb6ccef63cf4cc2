"""Paged KV caches: append, page copies, and the index tensors of a batch.

A cache is a pair, keys `[num_pages, page_size, num_kv_heads, head_dim]` and values (their head_dim may differ), by strides with a
contiguous last dimension: HND caches `[num_pages, num_kv_heads, page_size, head_dim]` are the view `cache.transpose(1, 2)`, the
parts of one tensor `[num_pages, 2, ...]` the views `cache[:, 0]` and `cache[:, 1]`. Request b has the pages
`kv_indices[kv_indptr[b]:kv_indptr[b + 1]]` in order, all full but the last, which holds `kv_last_page_len[b]` tokens (1 to
page_size; 0 for a request without pages). Index tensors are int32 or int64, each by itself, with any stride; -1 marks padding.
Requests may share pages to read; what is written must be one token's, or one copy's, alone.

Values are checked on the CPU always, on CUDA under FI_OPS_CHECK=1, before anything is written: the whole table, and where each
token goes. Without the check CUDA leaves out what the table places nowhere, and never leaves the tensors' memory.
Sources: PagedAttention (vLLM); FlashInfer's `page` module.
"""

from __future__ import annotations

import torch

from ._checks import (
    all_of,
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_writable,
    shape_of,
)
from ._page_samples import (
    append_errors,
    append_samples,
    batch_positions_errors,
    batch_positions_samples,
    copy_errors,
    copy_samples,
    rope_append_errors,
    rope_append_samples,
    seq_lens_errors,
    seq_lens_samples,
)
from ._reference import rotate
from ._spec import FLOATS, FP8, INDEX_TYPES, Cost, op

_CACHE = "[num_pages, page_size, num_kv_heads, head_dim]"


def _check_indices(name: str, arg: str, t, ref_name: str, ref) -> None:
    check_same_device(name, arg, t, ref_name, ref)
    check_dtype(name, arg, t, INDEX_TYPES)


def _check_indptr(name: str, arg: str, t) -> None:
    check_ndim(name, arg, t, 1, "[batch + 1]")
    check(name, t.shape[0] >= 1, lambda: f"{arg} must be [batch + 1], got [0]; start it with 0")


def _check_requests(name: str, indptr_arg: str, indptr, arg: str, of_requests) -> None:
    """`indptr` [batch + 1], and something of each request [batch]."""
    check_dtype(name, indptr_arg, indptr, INDEX_TYPES)
    _check_indptr(name, indptr_arg, indptr)
    _check_indices(name, arg, of_requests, indptr_arg, indptr)
    check_shape(name, arg, of_requests, (indptr.shape[0] - 1,), "[batch]")


def _check_caches(name: str, k_cache, v_cache) -> None:
    check_dtype(name, "paged_k_cache", k_cache, (*FLOATS, *FP8))
    check_ndim(name, "paged_k_cache", k_cache, 4, _CACHE)
    check_last_dim_contiguous(name, "paged_k_cache", k_cache)
    check_writable(name, "paged_k_cache", k_cache)
    check_same_device(name, "paged_v_cache", v_cache, "paged_k_cache", k_cache)
    check_same_dtype(name, "paged_v_cache", v_cache, "paged_k_cache", k_cache)
    check_ndim(name, "paged_v_cache", v_cache, 4, _CACHE)
    check_last_dim_contiguous(name, "paged_v_cache", v_cache)
    check_writable(name, "paged_v_cache", v_cache)
    want = (*k_cache.shape[:3], v_cache.shape[3])
    check_shape(name, "paged_v_cache", v_cache, want, "[num_pages, page_size, num_kv_heads, head_dim_vo]")
    check(
        name,
        k_cache.shape[1] >= 1,
        lambda: (
            f"paged_k_cache must have pages of at least 1 token, got {shape_of(k_cache)}; allocate it with a page_size"
        ),
    )


def _check_append(
    name, append_key, append_value, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len
) -> None:
    _check_caches(name, k_cache, v_cache)
    check_ndim(name, "append_key", append_key, 3, "[nnz, num_kv_heads, head_dim]")
    nnz = append_key.shape[0]
    for arg, t, cache_arg, cache in (
        ("append_key", append_key, "paged_k_cache", k_cache),
        ("append_value", append_value, "paged_v_cache", v_cache),
    ):
        check_same_device(name, arg, t, cache_arg, cache)
        if cache.dtype in FP8:
            check_dtype(name, arg, t, FLOATS)
        else:
            check_same_dtype(name, arg, t, cache_arg, cache)
        check_shape(name, arg, t, (nnz, cache.shape[2], cache.shape[3]), "[nnz, num_kv_heads, head_dim]")
        check_last_dim_contiguous(name, arg, t)
    check_same_dtype(name, "append_value", append_value, "append_key", append_key)
    for arg, t in (("batch_indices", batch_indices), ("positions", positions)):
        _check_indices(name, arg, t, "paged_k_cache", k_cache)
        check_shape(name, arg, t, (nnz,), "[nnz]")
    _check_indices(name, "kv_indices", kv_indices, "paged_k_cache", k_cache)
    check_ndim(name, "kv_indices", kv_indices, 1, "[nnz_pages]")
    _check_indices(name, "kv_indptr", kv_indptr, "paged_k_cache", k_cache)
    _check_indptr(name, "kv_indptr", kv_indptr)
    _check_indices(name, "kv_last_page_len", kv_last_page_len, "paged_k_cache", k_cache)
    check_shape(name, "kv_last_page_len", kv_last_page_len, (kv_indptr.shape[0] - 1,), "[batch]")


def _append_fake(
    append_key, append_value, batch_indices, positions, paged_k_cache, paged_v_cache, kv_indices, kv_indptr, kv_last_page_len
):  # fmt: skip
    _check_append(
        "append_paged_kv_cache", append_key, append_value, batch_indices, positions, paged_k_cache, paged_v_cache,
        kv_indices, kv_indptr, kv_last_page_len,
    )  # fmt: skip


def _rope_append_fake(
    query, append_key, append_value, cos_sin_cache, batch_indices, positions, paged_k_cache, paged_v_cache, kv_indices,
    kv_indptr, kv_last_page_len, *, interleaved=False,
):  # fmt: skip
    name = "rope_append_paged_kv_cache"
    _check_append(
        name, append_key, append_value, batch_indices, positions, paged_k_cache, paged_v_cache, kv_indices, kv_indptr,
        kv_last_page_len,
    )  # fmt: skip
    nnz, _, head_dim = append_key.shape
    check_same_device(name, "query", query, "append_key", append_key)
    check_same_dtype(name, "query", query, "append_key", append_key)
    check_ndim(name, "query", query, 3, "[nnz, num_qo_heads, head_dim]")
    check_shape(name, "query", query, (nnz, query.shape[1], head_dim), "[nnz, num_qo_heads, head_dim]")
    check_last_dim_contiguous(name, "query", query)
    check_same_device(name, "cos_sin_cache", cos_sin_cache, "append_key", append_key)
    check_dtype(name, "cos_sin_cache", cos_sin_cache, (torch.float32,))
    check_ndim(name, "cos_sin_cache", cos_sin_cache, 2, "[max_len, rotary_dim]")
    check_last_dim_contiguous(name, "cos_sin_cache", cos_sin_cache)
    rotary_dim = cos_sin_cache.shape[1]
    check(
        name,
        all_of(rotary_dim > 0, rotary_dim % 2 == 0, rotary_dim <= head_dim),
        lambda: (
            f"cos_sin_cache must be [max_len, rotary_dim] with an even rotary_dim of at most head_dim {head_dim}, "
            f"got {shape_of(cos_sin_cache)}; cat cos and sin along the last dimension"
        ),
    )
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _batch_positions_fake(append_indptr, seq_lens, nnz):
    name = "get_batch_indices_positions"
    _check_requests(name, "append_indptr", append_indptr, "seq_lens", seq_lens)
    check(name, nnz >= 0, lambda: f"nnz must be 0 or more, got {nnz}; pass the number of appended tokens")
    return tuple(torch.empty((nnz,), dtype=torch.int32, device=append_indptr.device) for _ in range(2))


def _seq_lens_fake(kv_indptr, kv_last_page_len, page_size):
    name = "get_seq_lens"
    _check_requests(name, "kv_indptr", kv_indptr, "kv_last_page_len", kv_last_page_len)
    check(name, page_size >= 1, lambda: f"page_size must be 1 or more, got {page_size}; pass the cache's")
    dtype = torch.promote_types(kv_indptr.dtype, kv_last_page_len.dtype)
    return torch.empty((kv_indptr.shape[0] - 1,), dtype=dtype, device=kv_indptr.device)


def _check_pages(name: str, arg: str, cache) -> None:
    check(
        name,
        1 <= cache.dim() <= 8,
        lambda: f"{arg} must be [num_pages, ...] of 1 to 8 dimensions, got {shape_of(cache)}; reshape it",
    )
    check_writable(name, arg, cache)


def _copy_fake(paged_k_cache, paged_v_cache, src_pages, dst_pages):
    name = "copy_pages"
    _check_pages(name, "paged_k_cache", paged_k_cache)
    check_same_device(name, "paged_v_cache", paged_v_cache, "paged_k_cache", paged_k_cache)
    _check_pages(name, "paged_v_cache", paged_v_cache)
    num_pages = paged_k_cache.shape[0]
    check(
        name,
        all_of(paged_v_cache.shape[0] == num_pages),
        lambda: (
            f"paged_v_cache must have paged_k_cache's {num_pages} pages, got {shape_of(paged_v_cache)}; "
            f"pass the two caches of one table"
        ),
    )
    _check_indices(name, "src_pages", src_pages, "paged_k_cache", paged_k_cache)
    check_ndim(name, "src_pages", src_pages, 1, "[num_copies]")
    _check_indices(name, "dst_pages", dst_pages, "paged_k_cache", paged_k_cache)
    check_shape(name, "dst_pages", dst_pages, (src_pages.shape[0],), "[num_copies]")


# ---- costs ----


def _index_bytes(*tensors) -> int:
    return sum(t.nbytes for t in tensors)


def _append_cost(
    append_key, append_value, batch_indices, positions, paged_k_cache, paged_v_cache, kv_indices, kv_indptr, kv_last_page_len
):  # fmt: skip
    elements = append_key.numel() + append_value.numel()
    return Cost(
        bytes=elements * (append_key.element_size() + paged_k_cache.element_size())
        + _index_bytes(batch_indices, positions)
    )


def _rope_append_cost(query, append_key, append_value, cos_sin_cache, *append, interleaved=False):
    moved = 2 * query.nbytes + append_key.shape[0] * cos_sin_cache.shape[1] * 4
    return Cost(
        bytes=moved + _append_cost(append_key, append_value, *append).bytes,
        flops=3 * (query.shape[1] + append_key.shape[1]) * append_key.shape[0] * cos_sin_cache.shape[1],
    )


def _batch_positions_cost(append_indptr, seq_lens, nnz):
    return Cost(bytes=8 * nnz + _index_bytes(append_indptr, seq_lens))


def _seq_lens_cost(kv_indptr, kv_last_page_len, page_size):
    return Cost(bytes=2 * kv_last_page_len.nbytes + kv_indptr.nbytes)


def _copy_cost(paged_k_cache, paged_v_cache, src_pages, dst_pages):
    page = (paged_k_cache.nbytes + paged_v_cache.nbytes) // max(paged_k_cache.shape[0], 1)
    return Cost(bytes=2 * src_pages.shape[0] * page + _index_bytes(src_pages, dst_pages))


# ---- references ----


def _as_cache_dtype(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """To nearest even; fp8 holds what is past its largest value as that, as the GPU's conversion does."""
    if cache.dtype not in FP8:
        return x.to(cache.dtype)
    largest = torch.finfo(cache.dtype).max
    return x.clamp(-largest, largest).to(cache.dtype)


def _entries(batch_indices, positions, page_size: int, kv_indices, kv_indptr):
    """Of the tokens that are no padding: which they are, their pages and the places in these."""
    tokens = ((batch_indices != -1) & (positions != -1)).nonzero()[:, 0]
    where = positions[tokens].long()
    nth = kv_indptr.long()[batch_indices[tokens].long()] + where // page_size
    return tokens, kv_indices.long()[nth], where % page_size


@op(
    "(Tensor append_key, Tensor append_value, Tensor batch_indices, Tensor positions, Tensor(a!) paged_k_cache, "
    "Tensor(b!) paged_v_cache, Tensor kv_indices, Tensor kv_indptr, Tensor kv_last_page_len) -> ()",
    fake=_append_fake,
    samples=append_samples,
    errors=append_errors,
    cost=_append_cost,
    exact=True,
)
def append_paged_kv_cache(
    append_key, append_value, batch_indices, positions, paged_k_cache, paged_v_cache, kv_indices, kv_indptr, kv_last_page_len
):  # fmt: skip
    """Write token i, `append_key[i]` and `append_value[i]`, to place `positions[i]` of request `batch_indices[i]`'s pages.

    append_key, append_value: `[nnz, num_kv_heads, head_dim]` in the cache's dtype, or float32, bfloat16 or float16 where that is
    float8_e4m3fn or float8_e5m2 (to nearest even; what is too large becomes the largest). batch_indices, positions: `[nnz]`; a
    token with -1 in either is left out. kv_indices `[nnz_pages]` may be longer than `kv_indptr[-1]`. A position may be anywhere
    in the request's pages; kv_last_page_len `[batch]` is checked, not used.
    """
    page_size = paged_k_cache.shape[1]
    tokens, pages, entries = _entries(batch_indices, positions, page_size, kv_indices, kv_indptr)
    paged_k_cache[pages, entries] = _as_cache_dtype(append_key[tokens], paged_k_cache)
    paged_v_cache[pages, entries] = _as_cache_dtype(append_value[tokens], paged_v_cache)


@op(
    "(Tensor query, Tensor append_key, Tensor append_value, Tensor cos_sin_cache, Tensor batch_indices, Tensor positions, "
    "Tensor(a!) paged_k_cache, Tensor(b!) paged_v_cache, Tensor kv_indices, Tensor kv_indptr, Tensor kv_last_page_len, *, "
    "bool interleaved=False) -> Tensor",
    fake=_rope_append_fake,
    samples=rope_append_samples,
    errors=rope_append_errors,
    cost=_rope_append_cost,
)
def rope_append_paged_kv_cache(
    query, append_key, append_value, cos_sin_cache, batch_indices, positions, paged_k_cache, paged_v_cache, kv_indices,
    kv_indptr, kv_last_page_len, *, interleaved=False,
):  # fmt: skip
    """RoPE on query and append_key by row `positions[i]` of cos_sin_cache, then `append_paged_kv_cache`; the rotated query.

    query: `[nnz, num_qo_heads, head_dim]` in append_key's dtype; the result is contiguous, padding's rows in it are query's.
    cos_sin_cache: float32 `[max_len, rotary_dim]`, the cosines of all pairs, then the sines; of each head the first rotary_dim
    elements are rotated, pairs as in `rope`. Products in float32, rounded once to query's dtype and to the cache's.
    """
    cos, sin = cos_sin_cache.chunk(2, -1)
    page_size, rotary_dim = paged_k_cache.shape[1], cos_sin_cache.shape[1]
    tokens, pages, entries = _entries(batch_indices, positions, page_size, kv_indices, kv_indptr)
    rows = positions[tokens].long()

    def rotated(x):
        heads_first = x[tokens].transpose(0, 1)[None]
        return rotate(heads_first, cos[rows][None], sin[rows][None], interleaved, rotary_dim)[0].transpose(0, 1)

    key = append_key if paged_k_cache.dtype not in FP8 else append_key.float()
    paged_k_cache[pages, entries] = _as_cache_dtype(rotated(key), paged_k_cache)
    paged_v_cache[pages, entries] = _as_cache_dtype(append_value[tokens], paged_v_cache)
    output = query.clone(memory_format=torch.contiguous_format)
    output[tokens] = rotated(query)
    return output


@op(
    "(Tensor append_indptr, Tensor seq_lens, SymInt nnz) -> (Tensor, Tensor)",
    fake=_batch_positions_fake,
    samples=batch_positions_samples,
    errors=batch_positions_errors,
    cost=_batch_positions_cost,
    dtypes=INDEX_TYPES,
    exact=True,
)
def get_batch_indices_positions(append_indptr, seq_lens, nnz):
    """The request and the position of each of nnz ragged tokens, int32 `[nnz]` each; -1 for those of no request.

    Request b has tokens `append_indptr[b]` to `append_indptr[b + 1] - 1`, which are the last of its `seq_lens[b]`.
    append_indptr `[batch + 1]`, seq_lens `[batch]`. nnz may be more than `append_indptr[-1]`: the rest is padding.
    """
    out = torch.full((2, nnz), -1, dtype=torch.int32, device=append_indptr.device)
    ends, lens = append_indptr.tolist(), seq_lens.tolist()
    for b, length in enumerate(lens):
        begin, end = ends[b], ends[b + 1]
        out[0, begin:end] = b
        out[1, begin:end] = torch.arange(length - (end - begin), length, device=out.device)
    return out[0].clone(), out[1].clone()


@op(
    "(Tensor kv_indptr, Tensor kv_last_page_len, int page_size) -> Tensor",
    fake=_seq_lens_fake,
    samples=seq_lens_samples,
    errors=seq_lens_errors,
    cost=_seq_lens_cost,
    dtypes=INDEX_TYPES,
    exact=True,
)
def get_seq_lens(kv_indptr, kv_last_page_len, page_size):
    """The number of tokens of each request, `[batch]`: `(pages - 1) * page_size + kv_last_page_len`, 0 without pages.

    kv_indptr `[batch + 1]`, kv_last_page_len `[batch]`; int32, or int64 where one of them is.
    """
    return (kv_indptr.diff() - 1).clamp(min=0) * page_size + kv_last_page_len


@op(
    "(Tensor(a!) paged_k_cache, Tensor(b!) paged_v_cache, Tensor src_pages, Tensor dst_pages) -> ()",
    fake=_copy_fake,
    samples=copy_samples,
    errors=copy_errors,
    cost=_copy_cost,
    dtypes=(*FLOATS, torch.uint8),
    exact=True,
)
def copy_pages(paged_k_cache, paged_v_cache, src_pages, dst_pages):
    """Copy page `src_pages[i]` over page `dst_pages[i]`, in both caches: what a fork of a prefix needs before it writes.

    Caches: `[num_pages, ...]` of any shape, strides and dtype (HND or NHD as they are; MLA's too), the same number of pages.
    src_pages, dst_pages: `[num_copies]`; a pair with -1 in either is left out. No page may be written twice, or read and written.
    """
    pairs = ((src_pages != -1) & (dst_pages != -1)).nonzero()[:, 0]
    for cache in (paged_k_cache, paged_v_cache):
        cache[dst_pages[pairs].long()] = cache[src_pages[pairs].long()]
