"""Decode attention with FlashInfer's names, arguments and defaults: of one request, and of a batch over a paged cache.

What the wrappers share is in `fi_ops/_batch_wrapper.py`.
"""

from __future__ import annotations

import torch

from ._arguments import refuse, require
from ._batch_options import positional_scales, split_keys, with_data_type
from ._batch_wrapper import BatchWrapper
from .page import PagedKVCache
from .prefill import attend_one_request

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "single_decode_with_kv_cache",
]


def single_decode_with_kv_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token over its request's KV cache; the token stands at position `kv_len - 1`.

    Args:
        q: `[num_qo_heads, head_dim]`, float32, bfloat16 or float16.
        k: `[kv_len, num_kv_heads, head_dim]` (`kv_layout="NHD"`) or `[num_kv_heads, kv_len, head_dim]` ("HND"), q's dtype.
        v: like k, with its own `head_dim_vo`.
        pos_encoding_mode: "NONE", "ROPE_LLAMA" (rotate-half RoPE on q and k in the kernel) or "ALIBI".
        use_tensor_cores: accepted and without effect: the kernel chooses by shape.
        q_scale, k_scale, v_scale: dequantisation scales, a number or a tensor of one element or one a head.
        window_left: how far back the query sees, inclusive; -1 is no window.
        logits_soft_cap: `cap * tanh(logits / cap)`; None or 0 is none.
        sm_scale: default `1 / sqrt(head_dim)`.
        rope_scale, rope_theta: for ROPE_LLAMA; default 1.0 and 1e4.
        return_lse: also return the log-sum-exp, base 2.

    Returns:
        `[num_qo_heads, head_dim_vo]`, and with `return_lse` float32 `[num_qo_heads]`.

    Raises:
        RuntimeError: shapes, dtypes, devices or options that don't fit; the message says which.

    Source: FlashInfer `single_decode_with_kv_cache`; Flash-Decoding (split KV).
    """
    name = "single_decode_with_kv_cache"
    require(
        name,
        q.dim() == 2,
        f"q must be [num_qo_heads, head_dim], got {list(q.shape)}; for more tokens use single_prefill_with_kv_cache",
    )
    output, lse = attend_one_request(
        name, q[None], k, v, mask=None, causal=False, kv_layout=kv_layout, pos_encoding_mode=pos_encoding_mode,
        sm_scale=sm_scale, window_left=window_left, logits_soft_cap=logits_soft_cap, rope_scale=rope_scale, rope_theta=rope_theta,
        q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse,
    )  # fmt: skip
    return output[0] if lse is None else (output[0], lse[0])


class BatchDecodeWithPagedKVCacheWrapper(BatchWrapper):
    """Decode of a batch over a paged cache: each request's last token (or last `q_len_per_req`) against its whole cache.

    Args:
        float_workspace_buffer: a tensor of any size on the device to work on; only its device is used.
        kv_layout: "NHD" or "HND".
        use_cuda_graph: keep the state in the three buffers, all of them required: a captured `run` then follows each later
            `plan`. The batch is fixed; a request without pages pads it.
        use_tensor_cores: accepted and without effect: the kernel chooses by shape.
        paged_kv_indptr_buffer: `[batch + 1]`.
        paged_kv_indices_buffer: as many pages as there may ever be.
        paged_kv_last_page_len_buffer: `[batch]`.
        backend, jit_args: see `fi_ops._batch_wrapper`.

    Source: FlashInfer `BatchDecodeWithPagedKVCacheWrapper`.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list | None = None,
    ) -> None:
        super().__init__(float_workspace_buffer.device, kv_layout, use_cuda_graph, backend, jit_args)
        self._use_tensor_cores = use_tensor_cores
        self._q_len_per_req: int | None = None
        self._use_buffers(
            0 if paged_kv_last_page_len_buffer is None else paged_kv_last_page_len_buffer.shape[0],
            _kv_indptr=paged_kv_indptr_buffer, _kv_indices=paged_kv_indices_buffer,
            _kv_last_page_len=paged_kv_last_page_len_buffer,
        )  # fmt: skip

    @property
    def use_tensor_cores(self) -> bool:
        return self._use_tensor_cores

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
    ) -> None:
        """Plan the runs that follow: the batch's pages, and what attention is. One plan serves all layers, without a sync.

        Args:
            indptr, indices, last_page_len: the page table (`fi_ops.page`'s kv_indptr, kv_indices, kv_last_page_len).
            pos_encoding_mode: "NONE", "ROPE_LLAMA" (rotate-half RoPE of q and k in the kernel) or "ALIBI".
            window_left: how far back a query sees, inclusive; -1 is no window.
            logits_soft_cap: `cap * tanh(logits / cap)`; None or 0 is none.
            data_type: of keys and values where kv_data_type is left out, and of queries where q_data_type is and it is not fp8.
            sm_scale: default `1 / sqrt(head_dim)`.
            rope_scale, rope_theta: for ROPE_LLAMA; default 1.0 and 1e4.
            q_len_per_req: the number of queries of each request, its last tokens; causal among themselves.
            q_data_type, kv_data_type, o_data_type, non_blocking, block_tables, seq_lens, fixed_split_size, disable_split_kv: see
                `fi_ops._batch_wrapper`.

        Raises:
            RuntimeError: sizes, dtypes or options that don't fit; values are checked in `run`, on the CPU.
        """
        function = f"{type(self).__name__}.plan"
        require(
            function, q_len_per_req >= 1, f"q_len_per_req must be 1 or more, got {q_len_per_req}; pass 1 for decode"
        )
        q_data_type, kv_data_type = with_data_type(q_data_type, kv_data_type, data_type)
        batch = last_page_len.shape[0]
        if self._use_cuda_graph:
            require(
                function,
                self._q_len_per_req in (None, q_len_per_req),
                f"q_len_per_req is fixed in CUDA graph mode at {self._q_len_per_req}, got {q_len_per_req}; make another wrapper",
            )
        qo_indptr = self._qo_indptr
        if qo_indptr is None or qo_indptr.shape[0] != batch + 1 or self._q_len_per_req != q_len_per_req:
            qo_indptr = q_len_per_req * torch.arange(batch + 1, dtype=torch.int32, device=self.device)
        self._plan_batch(
            qo_indptr=qo_indptr, kv_indptr=indptr, kv_indices=indices, kv_last_page_len=last_page_len,
            nnz_qo=batch * q_len_per_req, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim,
            page_size=page_size, q_data_type=q_data_type, kv_data_type=kv_data_type, o_data_type=o_data_type,
            non_blocking=non_blocking, causal=q_len_per_req > 1, pos_encoding_mode=pos_encoding_mode, window_left=window_left,
            logits_soft_cap=logits_soft_cap, sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
            fixed_split_size=split_keys(function, fixed_split_size, disable_split_kv, page_size),
        )  # fmt: skip
        self._q_len_per_req = q_len_per_req

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
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: PagedKVCache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch. One op, no sync; can be compiled and captured.

        Args:
            q: `[batch * q_len_per_req, num_qo_heads, head_dim]`.
            paged_kv_cache: a pair or one tensor, in kv_layout (`fi_ops.page`).
            q_scale, k_scale, v_scale: see `fi_ops._batch_wrapper`.
            out, lse: written and returned, of the output's shape and dtype.
            return_lse: also return the log-sum-exp.
            window_left, q_len_per_req: as planned, or None.
            sinks: `[num_qo_heads]`, one logit a head that joins the softmax's sum and gives no value.
            args: q_scale, k_scale and v_scale, of fp8 queries alone; others are refused (custom kernels).
            kv_cache_sf, skip_softmax_threshold_scale_factor: refused (NVFP4, skipped blocks).

        Returns:
            `[rows of q, num_qo_heads, head_dim_vo]`, and with return_lse float32 `[rows of q, num_qo_heads]`.
        """
        function = f"{type(self).__name__}.run"
        scales = positional_scales(function, q, args, q_scale, k_scale, v_scale)
        planned = self._q_len_per_req
        if q_len_per_req is not None and q_len_per_req != planned:
            refuse(function, f"q_len_per_req must be {planned}, as planned, got {q_len_per_req}; pass it to plan")
        if self._plan_rows is not None and q.shape[0] != self._plan_rows:
            refuse(
                function,
                f"q must have batch * q_len_per_req = {self._plan_rows} rows, got {q.shape[0]}; plan for this batch",
            )
        return self._run_paged(
            q, paged_kv_cache, **scales, out=out, lse=lse, return_lse=return_lse, enable_pdl=enable_pdl,
            window_left=window_left, sinks=sinks, kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
        )  # fmt: skip

    def forward(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ):
        """`run` with these arguments in place of `plan`'s, defaults too (FlashInfer's deprecated form)."""
        self._override_but_causal(
            pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale,
            rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)

    def forward_return_lse(
        self,
        q: torch.Tensor,
        paged_kv_cache: PagedKVCache,
        pos_encoding_mode: str = "NONE",
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ):
        """`forward`, and the log-sum-exp."""
        self._override_but_causal(
            pos_encoding_mode=pos_encoding_mode, window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale,
            rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        return self.run_return_lse(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` with `use_cuda_graph=True` and its buffers first.

    Source: FlashInfer `CUDAGraphBatchDecodeWithPagedKVCacheWrapper`.
    """

    def __init__(
        self,
        workspace_buffer: torch.Tensor,
        indptr_buffer: torch.Tensor,
        indices_buffer: torch.Tensor,
        last_page_len_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, use_cuda_graph=True, use_tensor_cores=use_tensor_cores,
            paged_kv_indptr_buffer=indptr_buffer, paged_kv_indices_buffer=indices_buffer,
            paged_kv_last_page_len_buffer=last_page_len_buffer,
        )  # fmt: skip
