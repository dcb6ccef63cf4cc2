"""FlashInfer's wrappers for prefill and append of a batch; `fi_ops/_batch_wrapper.py` says what all wrappers share."""

from __future__ import annotations

import torch

from ._batch_options import positional_scales, refuse_given, split_keys
from ._batch_wrapper import BatchWrapper
from .page import PagedKVCache

_MULTI_ITEM = "multi-item scoring is not there"


def _refuse_multi_item(
    function, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr
) -> None:
    refuse_given(
        function, _MULTI_ITEM, prefix_len_ptr=prefix_len_ptr, token_pos_in_items_ptr=token_pos_in_items_ptr,
        token_pos_in_items_len=token_pos_in_items_len or None, max_item_len_ptr=max_item_len_ptr,
    )  # fmt: skip


class BatchPrefillWithPagedKVCacheWrapper(BatchWrapper):
    """Prefill, append or decode of a ragged batch over a paged cache: request b's queries are the last of its tokens.

    Args:
        float_workspace_buffer: a tensor of any size on the device to work on; only its device is used.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: keep the state in the buffers that follow, all of them required (a mask's where there is one): a captured
            `run` then follows each later `plan`. The batch is fixed; so is the number of rows of `q`, at the first plan's
            `qo_indptr[-1]` or more (shorter plans leave the rest of the rows 0).
        qo_indptr_buf, paged_kv_indptr_buf: `[batch + 1]`.
        paged_kv_indices_buf: as many pages as there may ever be.
        paged_kv_last_page_len_buf: `[batch]`.
        custom_mask_buf, mask_indptr_buf: uint8 for `(num_elements + 7 * batch) / 8` bytes; `[batch + 1]`.
        backend, jit_args, jit_kwargs: see `fi_ops._batch_wrapper`.

    Source: FlashInfer `BatchPrefillWithPagedKVCacheWrapper`.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list | None = None,
        jit_kwargs: dict | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer.device, kv_layout, use_cuda_graph, backend, jit_args, jit_kwargs)
        self._use_buffers(
            0 if qo_indptr_buf is None else qo_indptr_buf.shape[0] - 1,
            _qo_indptr=qo_indptr_buf, _kv_indptr=paged_kv_indptr_buf, _kv_indices=paged_kv_indices_buf,
            _kv_last_page_len=paged_kv_last_page_len_buf, _custom_mask=custom_mask_buf, _mask_indptr=mask_indptr_buf,
        )  # fmt: skip

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
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
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Plan the runs that follow: the batch's lengths and pages, and what attention is.

        Args:
            qo_indptr: int32 or int64 `[batch + 1]`; request b has the queries `q[qo_indptr[b]:qo_indptr[b + 1]]`. On the host, one
                plan serves all layers; on the device, each `run` makes its own (there is no sync either way).
            paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len: the page table (`fi_ops.page`), after the append.
            head_dim_vo: default head_dim_qk.
            custom_mask: bool, `[qo_len, kv_len]` of each request, flattened, one after the other; True = attend. Replaces causal.
            packed_custom_mask: the same as bits, uint8, each request's from a byte of its own on, as
                `segment_packbits(custom_mask, indptr, bitorder="little")` makes it; instead of custom_mask.
            causal: query i sees key j when `j <= i + kv_len - qo_len` (bottom-right aligned).
            pos_encoding_mode: "NONE", "ROPE_LLAMA" (rotate-half RoPE of q and k in the kernel) or "ALIBI".
            sm_scale: default `1 / sqrt(head_dim_qk)`.
            window_left: how far back a query sees, inclusive; -1 is no window.
            logits_soft_cap: `cap * tanh(logits / cap)`; None or 0 is none.
            rope_scale, rope_theta: for ROPE_LLAMA; default 1.0 and 1e4.
            max_sequence_kv: a bound of the keys of one request, for ROPE_LLAMA's table.
            q_data_type, kv_data_type, o_data_type, non_blocking, seq_lens, seq_lens_q, block_tables, max_token_per_sequence,
                use_fp16_qk_reduction, fixed_split_size, disable_split_kv: see `fi_ops._batch_wrapper`.
            prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr: refused (multi-item scoring).

        Raises:
            RuntimeError: sizes, dtypes or options that don't fit; values are checked in `run`, on the CPU.
        """
        function = "BatchPrefillWithPagedKVCacheWrapper.plan"
        _refuse_multi_item(function, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr)
        self._plan_batch(
            qo_indptr=qo_indptr, kv_indptr=paged_kv_indptr, kv_indices=paged_kv_indices,
            kv_last_page_len=paged_kv_last_page_len, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk, head_dim_vo=head_dim_vo, page_size=page_size, custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask, max_sequence_kv=max_sequence_kv, q_data_type=q_data_type,
            kv_data_type=kv_data_type, o_data_type=o_data_type, non_blocking=non_blocking, causal=causal,
            pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale,
            rope_scale=rope_scale, rope_theta=rope_theta,
            fixed_split_size=split_keys(function, fixed_split_size, disable_split_kv, page_size),
        )  # fmt: skip

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        *args,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: PagedKVCache | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch. One op, no sync; can be compiled and captured.

        Args:
            q: `[qo_indptr[-1], num_qo_heads, head_dim_qk]`, or with more rows: padding, whose output is 0.
            paged_kv_cache: a pair or one tensor, in kv_layout (`fi_ops.page`).
            q_scale, k_scale, v_scale: see `fi_ops._batch_wrapper`.
            out, lse: written and returned, of the output's shape and dtype.
            return_lse: also return the log-sum-exp.
            window_left: as planned, or None.
            sinks: `[num_qo_heads]`, one logit a head that joins the softmax's sum and gives no value.
            args: q_scale, k_scale and v_scale, of fp8 queries alone; others are refused (custom kernels).
            kv_cache_sf, skip_softmax_threshold_scale_factor: refused (NVFP4, skipped blocks).

        Returns:
            `[rows of q, num_qo_heads, head_dim_vo]`, and with return_lse float32 `[rows of q, num_qo_heads]`.
        """
        function = "BatchPrefillWithPagedKVCacheWrapper.run"
        return self._run_paged(
            q, paged_kv_cache, **positional_scales(function, q, args, q_scale, k_scale, v_scale), out=out, lse=lse,
            return_lse=return_lse, enable_pdl=enable_pdl, window_left=window_left, sinks=sinks, kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
        )  # fmt: skip

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ):
        """`run` with these arguments in place of `plan`'s, defaults too (FlashInfer's deprecated form)."""
        self._override(
            causal=causal, pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ):
        """`forward`, and the log-sum-exp."""
        self._override(
            causal=causal, pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        return self.run_return_lse(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale)


class BatchPrefillWithRaggedKVCacheWrapper(BatchWrapper):
    """Prefill or append of a ragged batch over ragged keys and values: `k[kv_indptr[b]:kv_indptr[b + 1]]` are request b's.

    Args:
        float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, custom_mask_buf, mask_indptr_buf, backend, jit_args,
            jit_kwargs: as in `BatchPrefillWithPagedKVCacheWrapper`.
        kv_indptr_buf: `[batch + 1]`.

    Source: FlashInfer `BatchPrefillWithRaggedKVCacheWrapper`.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        kv_indptr_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list | None = None,
        jit_kwargs: dict | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer.device, kv_layout, use_cuda_graph, backend, jit_args, jit_kwargs)
        self._use_buffers(
            0 if qo_indptr_buf is None else qo_indptr_buf.shape[0] - 1,
            _qo_indptr=qo_indptr_buf, _kv_indptr=kv_indptr_buf, _custom_mask=custom_mask_buf, _mask_indptr=mask_indptr_buf,
        )  # fmt: skip

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Plan the runs that follow; arguments as in `BatchPrefillWithPagedKVCacheWrapper.plan`, fixed_split_size in keys.

        Args:
            kv_indptr: int32 or int64 `[batch + 1]`, counts rows of `k` and `v`.
        """
        function = "BatchPrefillWithRaggedKVCacheWrapper.plan"
        _refuse_multi_item(function, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr)
        self._plan_batch(
            qo_indptr=qo_indptr, kv_indptr=kv_indptr, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads,
            head_dim_qk=head_dim_qk, head_dim_vo=head_dim_vo, custom_mask=custom_mask,
            packed_custom_mask=packed_custom_mask, q_data_type=q_data_type, kv_data_type=kv_data_type,
            o_data_type=o_data_type, non_blocking=non_blocking, causal=causal, pos_encoding_mode=pos_encoding_mode,
            window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale, rope_scale=rope_scale,
            rope_theta=rope_theta, fixed_split_size=split_keys(function, fixed_split_size, disable_split_kv, 1),
        )  # fmt: skip

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *args,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        o_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch; as `BatchPrefillWithPagedKVCacheWrapper.run` but for the keys.

        Args:
            k: `[kv_indptr[-1], num_kv_heads, head_dim_qk]` or with more rows ("HND": heads first).
            v: like k, with head_dim_vo.
            o_scale: refused: it is an fp8 output's.
        """
        function = "BatchPrefillWithRaggedKVCacheWrapper.run"
        scales = positional_scales(function, q, args, q_scale, k_scale, v_scale)
        refuse_given(function, "outputs are not fp8", o_scale=o_scale)
        if self._kv_layout == "HND" and k.dim() == 3 and v.dim() == 3:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        return self._attend(q, k, v, **scales, out=out, lse=lse, return_lse=return_lse, enable_pdl=enable_pdl)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ):
        """`run` with these arguments in place of `plan`'s, defaults too (FlashInfer's deprecated form)."""
        self._override(
            causal=causal, pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        return self.run(q, k, v)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ):
        """`forward`, and the log-sum-exp."""
        self._override(
            causal=causal, pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        return self.run_return_lse(q, k, v)
