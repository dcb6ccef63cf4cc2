"""Paged KV caches with FlashInfer's names, arguments and defaults (`flashinfer.page`), over `torch.ops.fi`; and copies of pages.

Arguments that recur:
    paged_kv_cache: a pair (k_cache, v_cache), each `[max_num_pages, page_size, num_kv_heads, head_dim]` in the layout "NHD",
        `[max_num_pages, num_kv_heads, page_size, head_dim]` in "HND"; or one tensor `[max_num_pages, 2, ...]` of both, keys
        first. float32, bfloat16, float16, float8_e4m3fn or float8_e5m2; last dim contiguous, other strides free.
    kv_indices: `[kv_indptr[-1]]` or longer: the pages of all requests one after the other.
    kv_indptr: `[batch + 1]`: request b has the pages `kv_indices[kv_indptr[b]:kv_indptr[b + 1]]`.
    kv_last_page_len: `[batch]`: the tokens in each request's last page, 1 to page_size; 0 for a request without pages.

Index tensors are int32 or int64, on the cache's device. Nothing is read on the host, so all of it can be captured in a CUDA graph.
All raise `RuntimeError` for shapes, dtypes, devices or strides that don't fit, and on the CPU (on CUDA under FI_OPS_CHECK=1)
for values that don't, before anything is written; unchecked, what a wrong table places nowhere is left out.
"""

from __future__ import annotations

import torch

from ._arguments import require

__all__ = [
    "append_paged_kv_cache",
    "append_paged_mla_kv_cache",
    "copy_pages",
    "get_batch_indices_positions",
    "get_seq_lens",
    "rope_append_paged_kv_cache",
    "rope_append_paged_mla_kv_cache",
]

PagedKVCache = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def _pair(function: str, paged_kv_cache: PagedKVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """The key and the value cache, as they are laid out."""
    if isinstance(paged_kv_cache, torch.Tensor):
        require(
            function,
            paged_kv_cache.dim() == 5 and paged_kv_cache.shape[1] == 2,
            f"paged_kv_cache must be [max_num_pages, 2, ...] of 5 dimensions or a pair of tensors, "
            f"got {list(paged_kv_cache.shape)}; stack keys and values along dimension 1",
        )
        return paged_kv_cache[:, 0], paged_kv_cache[:, 1]
    require(
        function,
        len(paged_kv_cache) == 2,
        f"paged_kv_cache must be a tensor or a pair (k_cache, v_cache), got {len(paged_kv_cache)} of them; pass two",
    )
    return paged_kv_cache[0], paged_kv_cache[1]


def _as_nhd(function: str, paged_kv_cache: PagedKVCache, kv_layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The key and the value cache as views `[max_num_pages, page_size, num_kv_heads, head_dim]`."""
    require(function, kv_layout in ("NHD", "HND"), f"kv_layout must be NHD or HND, got {kv_layout}; pass one of them")
    k_cache, v_cache = _pair(function, paged_kv_cache)
    if kv_layout == "NHD":
        return k_cache, v_cache
    require(
        function,
        k_cache.dim() == 4 and v_cache.dim() == 4,
        f"paged_kv_cache must be [max_num_pages, num_kv_heads, page_size, head_dim] twice, got {list(k_cache.shape)} and "
        f"{list(v_cache.shape)}; reshape them to 4 dimensions",
    )
    return k_cache.transpose(1, 2), v_cache.transpose(1, 2)


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write new keys and values to their places in a paged cache, in place; arguments as in the module.

    The table is that after the append: the pages for what is appended are already there.

    Args:
        append_key: `[nnz, num_kv_heads, head_dim]`, ragged, in the cache's dtype; for fp8 caches float32, bfloat16 or float16,
            rounded to nearest even, what is too large to the largest (scale it before: nothing is scaled here).
        append_value: like append_key; its head_dim may differ.
        batch_indices: `[nnz]`: the request of each token; -1 for padding, which is left out.
        positions: `[nnz]`: the position of each token in its request; -1 for padding.
        paged_kv_cache: written.
        kv_layout: "NHD" or "HND".

    Raises:
        RuntimeError: also, where values are checked, for a position beyond the request's pages and for two tokens at one place.

    Source: FlashInfer `append_paged_kv_cache`.
    """
    k_cache, v_cache = _as_nhd("append_paged_kv_cache", paged_kv_cache, kv_layout)
    torch.ops.fi.append_paged_kv_cache(
        append_key, append_value, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len
    )


def rope_append_paged_kv_cache(
    query: torch.Tensor,
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
    is_neox: bool = True,
) -> torch.Tensor:
    """RoPE on new queries and keys at their positions, and `append_paged_kv_cache` of the rotated keys and the values, in one op.

    Args (the others as in `append_paged_kv_cache`):
        query: `[nnz, num_qo_heads, head_dim]`, append_key's dtype.
        cos_sin_cache: float32 `[max_len, rotary_dim]`, the cosines of all pairs, then the sines; token i takes row
            `positions[i]`. The first rotary_dim elements of each head are rotated.
        is_neox: True pairs (i, i + rotary_dim / 2), False pairs (2i, 2i + 1).

    Returns:
        query rotated, `[nnz, num_qo_heads, head_dim]`, contiguous; padding's rows as they were. Products in float32, rounded once
        (in fp8 caches keys are rounded once too: from float32).

    Sources: FlashInfer `apply_rope_with_cos_sin_cache` and `append_paged_kv_cache`.
    """
    k_cache, v_cache = _as_nhd("rope_append_paged_kv_cache", paged_kv_cache, kv_layout)
    return torch.ops.fi.rope_append_paged_kv_cache(
        query, append_key, append_value, cos_sin_cache, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr,
        kv_last_page_len, interleaved=not is_neox,
    )  # fmt: skip


def _check_mla(function: str, append_ckv, append_kpe, ckv_cache, kpe_cache) -> None:
    """Whether the tensors have the dimensions that are unsqueezed for the ops, which know heads."""
    shapes = (
        ("append_ckv", append_ckv, 2),
        ("append_kpe", append_kpe, 2),
        ("ckv_cache", ckv_cache, 3),
        ("kpe_cache", kpe_cache, 3),
    )
    for name, t, ndim in shapes:
        require(function, t.dim() == ndim, f"{name} must have {ndim} dimensions, got {list(t.shape)}; reshape it")


def append_paged_mla_kv_cache(
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
) -> None:
    """`append_paged_kv_cache` for the caches of multi-head latent attention, which have no heads.

    Args:
        append_ckv: `[nnz, ckv_dim]`, the compressed keys and values (any ckv_dim).
        append_kpe: `[nnz, kpe_dim]`, the keys' rotated part.
        ckv_cache: `[max_num_pages, page_size, ckv_dim]`, written.
        kpe_cache: `[max_num_pages, page_size, kpe_dim]`, written.

    Source: FlashInfer `append_paged_mla_kv_cache`.
    """
    _check_mla("append_paged_mla_kv_cache", append_ckv, append_kpe, ckv_cache, kpe_cache)
    torch.ops.fi.append_paged_kv_cache(
        append_ckv.unsqueeze(1), append_kpe.unsqueeze(1), batch_indices, positions, ckv_cache.unsqueeze(2),
        kpe_cache.unsqueeze(2), kv_indices, kv_indptr, kv_last_page_len,
    )  # fmt: skip


def rope_append_paged_mla_kv_cache(
    q_pe: torch.Tensor,
    append_ckv: torch.Tensor,
    append_kpe: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    is_neox: bool = True,
) -> torch.Tensor:
    """RoPE on the rotated part of latent attention's new queries and keys, and `append_paged_mla_kv_cache`, in one op.

    Args (the others as in `append_paged_mla_kv_cache`):
        q_pe: `[nnz, num_heads, kpe_dim]`, append_kpe's dtype.
        append_kpe: `[nnz, kpe_dim]`, before rotation.
        cos_sin_cache: float32 `[max_len, rotary_dim]`, the cosines of all pairs, then the sines; token i takes row
            `positions[i]`.
        is_neox: True pairs (i, i + rotary_dim / 2), False pairs (2i, 2i + 1), as DeepSeek's weights are.

    Returns:
        q_pe rotated, contiguous; padding's rows as they were.

    Sources: DeepSeek-V2 (decoupled RoPE); FlashInfer `append_paged_mla_kv_cache`.
    """
    _check_mla("rope_append_paged_mla_kv_cache", append_ckv, append_kpe, ckv_cache, kpe_cache)
    return torch.ops.fi.rope_append_paged_kv_cache(  # the part that is rotated as keys, the rest as values
        q_pe, append_kpe.unsqueeze(1), append_ckv.unsqueeze(1), cos_sin_cache, batch_indices, positions,
        kpe_cache.unsqueeze(2), ckv_cache.unsqueeze(2), kv_indices, kv_indptr, kv_last_page_len, interleaved=not is_neox,
    )  # fmt: skip


def get_batch_indices_positions(
    append_indptr: torch.Tensor, seq_lens: torch.Tensor, nnz: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The request and the position of each appended token, for `append_paged_kv_cache`.

    Args:
        append_indptr: int32 or int64 `[batch + 1]`: request b appends the tokens `append_indptr[b]:append_indptr[b + 1]`.
        seq_lens: int32 or int64 `[batch]`: each request's length after the append (`get_seq_lens`).
        nnz: the number of tokens, padding included.

    Returns:
        batch_indices and positions, int32 `[nnz]`; -1 for the tokens from `append_indptr[-1]` on (FlashInfer leaves these unset).

    Source: FlashInfer `get_batch_indices_positions`.
    """
    return torch.ops.fi.get_batch_indices_positions(append_indptr, seq_lens, nnz)


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """The number of tokens of each request in a paged cache.

    Args:
        kv_indptr, kv_last_page_len: as in the module, int32 or int64.
        page_size: tokens of a page.

    Returns:
        `[batch]`, int32, or int64 where an argument is.

    Source: FlashInfer `get_seq_lens`.
    """
    return torch.ops.fi.get_seq_lens(kv_indptr, kv_last_page_len, page_size)


def copy_pages(paged_kv_cache: PagedKVCache, src_pages: torch.Tensor, dst_pages: torch.Tensor) -> None:
    """Copy whole pages inside a paged cache: keys and values of page `src_pages[i]` to page `dst_pages[i]`.

    What a request needs that shares a prefix with others and is about to append to its last, partly filled page.

    Args:
        paged_kv_cache: written; either layout, a pair or one tensor; of a pair any dtype and any shape `[max_num_pages, ...]`
            (the two may differ: MLA's).
        src_pages: int32 or int64 `[num_copies]`; -1 for padding, which is left out.
        dst_pages: like src_pages; all different, and none of them in src_pages.
    """
    k_cache, v_cache = _pair("copy_pages", paged_kv_cache)
    torch.ops.fi.copy_pages(k_cache, v_cache, src_pages, dst_pages)
