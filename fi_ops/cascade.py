"""Shared prefixes and merging of attention states, with FlashInfer's names, arguments and defaults (`flashinfer.cascade`).

A state is the output of attention over a part of the keys, v `[seq_len, num_heads, head_dim]` (float32, bfloat16 or float16),
and the base-2 log-sum-exp of its logits, s `[seq_len, num_heads]`. A state with s = -inf contributes nothing, whatever its v
holds; where all are -inf the result is 0 and -inf. `RuntimeError` for shapes, dtypes, devices or strides that don't fit.
"""

from __future__ import annotations

import torch

from ._arguments import require
from ._batch_prefill import BatchPrefillWithPagedKVCacheWrapper
from .decode import BatchDecodeWithPagedKVCacheWrapper
from .page import PagedKVCache
from .prefill import single_prefill_with_kv_cache

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two states.

    Args:
        v_a, v_b: `[seq_len, num_heads, head_dim]`, one dtype.
        s_a, s_b: `[seq_len, num_heads]`, converted to float32 where they are not.

    Returns:
        v `[seq_len, num_heads, head_dim]` in v_a's dtype and s `[seq_len, num_heads]`, float32.

    Source: FlashInfer `merge_state`.
    """
    return torch.ops.fi.merge_state(v_a, s_a.float(), v_b, s_b.float())


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """Merge another state into (v, s), in place.

    Args:
        v: `[seq_len, num_heads, head_dim]`, overwritten.
        s: `[seq_len, num_heads]`, overwritten; must be float32 (FlashInfer converts, and then writes to the copy).
        v_other: like v.
        s_other: like s, converted to float32 where it is not.
        mask: bool `[seq_len]`, the tokens to merge; others keep their state. None merges all.

    Source: FlashInfer `merge_state_in_place`.
    """
    torch.ops.fi.merge_state_in_place(v, s, v_other, s_other.float(), mask)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge any number of states.

    Args:
        v: `[seq_len, num_states, num_heads, head_dim]`.
        s: `[seq_len, num_states, num_heads]`, converted to float32 where it is not.

    Returns:
        v `[seq_len, num_heads, head_dim]` in v's dtype and s `[seq_len, num_heads]`, float32.

    Source: FlashInfer `merge_states`.
    """
    return torch.ops.fi.merge_states(v, s.float())


class MultiLevelCascadeAttentionWrapper:
    """Attention of requests that share prefixes, in levels: each level's keys are read once for all the queries that share them.

    Level 0 is the widest: its qo_indptr joins the queries of all requests that share a prefix into one request, whose pages are
    the prefix's. The last level has each request's own keys, and is alone causal. Each level is one op over the same cache;
    their states are merged. `fi_ops/_batch_wrapper.py` says what wrappers share.

        qo_indptr_arr = [torch.tensor([0, 7]), torch.arange(8)]  # 7 decoding requests with a prefix in common

    Args:
        num_levels: any number.
        float_workspace_buffer: a tensor of any size on the device to work on; only its device is used.
        kv_layout: "NHD" or "HND".
        use_cuda_graph, qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr: a
            buffer a level, as `BatchPrefillWithPagedKVCacheWrapper` takes them.

    Source: FlashInfer `MultiLevelCascadeAttentionWrapper`.
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indptr_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_indices_buf_arr: list[torch.Tensor] | None = None,
        paged_kv_last_page_len_buf_arr: list[torch.Tensor] | None = None,
    ) -> None:
        function = "MultiLevelCascadeAttentionWrapper"
        require(function, num_levels >= 1, f"num_levels must be 1 or more, got {num_levels}; pass the number of levels")
        arrays = {
            "qo_indptr_buf_arr": qo_indptr_buf_arr, "paged_kv_indptr_buf_arr": paged_kv_indptr_buf_arr,
            "paged_kv_indices_buf_arr": paged_kv_indices_buf_arr,
            "paged_kv_last_page_len_buf_arr": paged_kv_last_page_len_buf_arr,
        }  # fmt: skip
        if use_cuda_graph:
            _check_levels(function, num_levels, **arrays)
        self._use_cuda_graph, self._num_levels = use_cuda_graph, num_levels
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(
                float_workspace_buffer,
                kv_layout,
                use_cuda_graph,
                *((array[i] for array in arrays.values() if array) if use_cuda_graph else ()),
            )
            for i in range(num_levels)
        ]

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: torch.Tensor, int_workspace_buffers: list[torch.Tensor]
    ) -> None:
        """Accepted and without effect: no workspace is used."""

    def plan(
        self,
        qo_indptr_arr: list[torch.Tensor],
        paged_kv_indptr_arr: list[torch.Tensor],
        paged_kv_indices_arr: list[torch.Tensor],
        paged_kv_last_page_len: list[torch.Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        """Plan the runs that follow; arguments as in `BatchPrefillWithPagedKVCacheWrapper.plan`, lists of one tensor a level.

        Args:
            qo_indptr_arr: int32 or int64 `[level's requests + 1]` each, over the same queries. A query that is in no request of
                a level (outside of its first and last value) has no keys there.
            causal: of the last level.
            pos_encoding_mode, window_left: with more levels than one, refused but for "NONE" and -1: keys of a level don't know
                their distance to a query (FlashInfer counts positions within the level).
        """
        function = "MultiLevelCascadeAttentionWrapper.plan"
        tables = {
            "qo_indptr_arr": qo_indptr_arr, "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr, "paged_kv_last_page_len": paged_kv_last_page_len,
        }  # fmt: skip
        _check_levels(function, self._num_levels, **tables)
        if self._num_levels > 1:
            why = "positions are not known across levels; rotate q and k beforehand"
            require(
                function,
                pos_encoding_mode == "NONE",
                f"pos_encoding_mode must be 'NONE', got {pos_encoding_mode!r}: {why}",
            )
            require(function, window_left == -1, f"window_left must be -1, got {window_left}: {why}")
        for i, level in enumerate(self._levels):
            level.plan(
                qo_indptr_arr[i], paged_kv_indptr_arr[i], paged_kv_indices_arr[i], paged_kv_last_page_len[i], num_qo_heads,
                num_kv_heads, head_dim, page_size, causal=causal and i == self._num_levels - 1,
                pos_encoding_mode=pos_encoding_mode, sm_scale=sm_scale, window_left=window_left,
                logits_soft_cap=logits_soft_cap, rope_scale=rope_scale, rope_theta=rope_theta, q_data_type=q_data_type,
                kv_data_type=kv_data_type,
            )  # fmt: skip

    begin_forward = plan

    def run(self, q: torch.Tensor, paged_kv_cache: PagedKVCache) -> torch.Tensor:
        """Attention of q over all levels.

        Args:
            q: `[nnz_qo, num_qo_heads, head_dim]`.
            paged_kv_cache: of all levels; a pair or one tensor, in kv_layout (`fi_ops.page`).

        Returns:
            `[nnz_qo, num_qo_heads, head_dim]`.
        """
        states = [level.run(q, paged_kv_cache, return_lse=True) for level in self._levels]
        if len(states) <= 2:
            return states[0][0] if len(states) == 1 else merge_state(*states[0], *states[1])[0]
        return merge_states(*(torch.stack(parts, 1) for parts in zip(*states, strict=True)))[0]

    forward = run

    def end_forward(self) -> None:
        """Accepted and without effect, as FlashInfer's."""


def _check_levels(function: str, num_levels: int, **arrays) -> None:
    for name, array in arrays.items():
        require(
            function,
            array is not None and len(array) == num_levels,
            f"{name} must have a tensor a level, {num_levels}, got {None if array is None else len(array)}; pass one for each",
        )


class _SharedPrefix:
    """What the two wrappers share: a dense prefix that all requests have in common, and a paged cache of what is their own."""

    _unique: BatchDecodeWithPagedKVCacheWrapper | BatchPrefillWithPagedKVCacheWrapper

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Accepted and without effect: no workspace is used."""

    def end_forward(self) -> None:
        """Accepted and without effect, as FlashInfer's."""

    def _merged(self, q, k_shared, v_shared, unique_state, sm_scale=None):
        shared_state = single_prefill_with_kv_cache(
            q, k_shared, v_shared, kv_layout=self._unique._kv_layout, sm_scale=sm_scale, return_lse=True
        )
        return merge_state(*shared_state, *unique_state)[0]


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Decode of requests with one prefix in common, which lies in a tensor of its own; newer: `MultiLevelCascadeAttentionWrapper`.

    Args:
        float_workspace_buffer: a tensor of any size on the device to work on; only its device is used.
        kv_layout: "NHD" or "HND", of the prefix and of the cache.

    Source: FlashInfer `BatchDecodeWithSharedPrefixPagedKVCacheWrapper`.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._unique: BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout
        )

    def begin_forward(
        self,
        unique_kv_indptr: torch.Tensor,
        unique_kv_indices: torch.Tensor,
        unique_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: str | torch.dtype = "float16",
    ) -> None:
        """Plan the calls of `forward` that follow: the pages of what is each request's own (`fi_ops.page`)."""
        self._unique.plan(
            unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            data_type=data_type,
        )  # fmt: skip

    def forward(
        self, q: torch.Tensor, k_shared: torch.Tensor, v_shared: torch.Tensor, unique_kv_cache: PagedKVCache
    ) -> torch.Tensor:
        """Attention over prefix and own keys.

        Args:
            q: `[batch, num_qo_heads, head_dim]`.
            k_shared, v_shared: `[prefix_len, num_kv_heads, head_dim]` ("HND": heads first).
            unique_kv_cache: see `fi_ops.page`.

        Returns:
            `[batch, num_qo_heads, head_dim]`.
        """
        return self._merged(q, k_shared, v_shared, self._unique.run(q, unique_kv_cache, return_lse=True))


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Prefill or append of requests with one prefix in common; newer: `MultiLevelCascadeAttentionWrapper`.

    Args: as in `BatchDecodeWithSharedPrefixPagedKVCacheWrapper`.

    Source: FlashInfer `BatchPrefillWithSharedPrefixPagedKVCacheWrapper`.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._unique: BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout
        )

    def begin_forward(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
    ) -> None:
        """Plan the calls of `forward` that follow; the pages are of what is each request's own. Any dtype (`forward` says)."""
        self._unique.plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim,
            page_size, q_data_type=None,
        )  # fmt: skip

    def forward(
        self,
        q: torch.Tensor,
        k_shared: torch.Tensor,
        v_shared: torch.Tensor,
        unique_kv_cache: PagedKVCache,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> torch.Tensor:
        """Attention over the prefix, whole, and own keys, causal or not.

        Args:
            q: `[nnz_qo, num_qo_heads, head_dim]`.
            k_shared, v_shared: `[prefix_len, num_kv_heads, head_dim]` ("HND": heads first).
            unique_kv_cache: see `fi_ops.page`.
            rope_scale, rope_theta: without effect, as in FlashInfer: nothing is rotated here.

        Returns:
            `[nnz_qo, num_qo_heads, head_dim]`.
        """
        own = self._unique.forward_return_lse(q, unique_kv_cache, causal=causal, sm_scale=sm_scale)
        return self._merged(q, k_shared, v_shared, own, sm_scale)
