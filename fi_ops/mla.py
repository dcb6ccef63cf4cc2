"""Multi-head latent attention (DeepSeek-V2 and V3) over a paged cache, with FlashInfer's name and arguments.

The weights are absorbed: queries are `q_nope` (times W_UK) and `q_pe` (rotated), the cache holds one compressed row a token for
all heads, and the output is what W_UV takes. `fi_ops/library/mla.py` says what is computed, `append_paged_mla_kv_cache` fills the
cache. Without absorption (prompts: head_dim_qk 192, head_dim_vo 128) it is `BatchPrefillWithRaggedKVCacheWrapper`'s attention.
"""

from __future__ import annotations

import math

import torch

from ._arguments import refuse, require, return_in
from ._batch_options import Settings, dtypes_of, refuse_given
from ._batch_wrapper import BatchWrapper

__all__ = ["BatchMLAPagedAttentionWrapper"]


class BatchMLAPagedAttentionWrapper(BatchWrapper):
    """Latent attention of any mix of decode, append and prefill, in one op; `fi_ops/_batch_wrapper.py` says what wrappers share.

    There is no work plan: the kernels cut the work up themselves, on the device and inside their launch. So `plan` only keeps the
    index tensors and the numbers; it costs a few copies wherever they are, and q may have any number of rows in `run`.

    Args:
        float_workspace_buffer: a tensor of any size on the device to work on; only its device is used.
        use_cuda_graph: `plan` writes into the buffers that follow; they fix the batch.
        qo_indptr, kv_indptr: buffers `[batch + 1]`, int32 or int64.
        kv_indices: a buffer for as many pages as any plan has.
        kv_len_arr: a buffer `[batch]`. `run` reads what `plan` derives from it: a new length needs a `plan`.
        backend: see `fi_ops._batch_wrapper`.

    Raises:
        RuntimeError: a backend that FlashInfer doesn't name; use_cuda_graph without buffers, or buffers that don't agree.

    Source: FlashInfer `BatchMLAPagedAttentionWrapper`.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(float_workspace_buffer.device, use_cuda_graph=use_cuda_graph, backend=backend)
        self._kv_len_arr: torch.Tensor | None = None
        self._sizes: dict[str, int] = {}  # what `run`'s tensors must have, by name
        self._use_buffers(
            0 if kv_len_arr is None else kv_len_arr.shape[0], _kv_len_arr=kv_len_arr, _qo_indptr=qo_indptr,
            _kv_indptr=kv_indptr, _kv_indices=kv_indices,
        )  # fmt: skip

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: str | torch.dtype | None,
        kv_data_type: str | torch.dtype | None,
        use_profiler: bool = False,
    ) -> None:
        """Take the batch of the runs that follow: its queries, its pages, and what attention is. No sync.

        Args:
            qo_indptr: int32 or int64 `[batch + 1]`: request b has the queries `qo_indptr[b]:qo_indptr[b + 1]`, the last of its
                tokens; for decode `arange(batch + 1)`.
            kv_indptr: like qo_indptr: request b has the pages `kv_indices[kv_indptr[b]:kv_indptr[b + 1]]`.
            kv_indices: int32 or int64 `[nnz_pages]`.
            kv_len_arr: int32 or int64 `[batch]`: the number of each request's keys, which end in its last page (0: no pages).
            num_heads: of the queries.
            head_dim_ckv, head_dim_kpe: widths of the compressed and of the rotated part; DeepSeek's 512 and 64.
            page_size: tokens of a page.
            causal: query i of a request sees key j when `j <= i + kv_len - qo_len`.
            sm_scale: `1 / sqrt(head_dim)` of the head before absorption (DeepSeek: 128 + 64), times YaRN's.
            q_data_type, kv_data_type: see `fi_ops._batch_wrapper`.
            use_profiler: refused.

        Raises:
            RuntimeError: sizes, dtypes or options that don't fit; values are checked in `run`, on the CPU.
        """
        function = "BatchMLAPagedAttentionWrapper.plan"
        require(function, not use_profiler, "use_profiler is not supported; leave it out and use torch.profiler")
        require(
            function,
            sm_scale is not None and sm_scale == sm_scale,
            f"sm_scale must be a number, got {sm_scale}; pass 1/sqrt of the head_dim before absorption",
        )
        dtypes = dtypes_of(function, q_data_type, kv_data_type)
        sizes = {
            "num_heads": num_heads, "head_dim_ckv": head_dim_ckv, "head_dim_kpe": head_dim_kpe, "page_size": page_size,
        }  # fmt: skip
        for name, size in sizes.items():
            require(function, size >= 1, f"{name} must be 1 or more, got {size}; pass the model's and the cache's")
        batch = qo_indptr.shape[0] - 1
        self._check_batch(function, batch, kv_indptr=(kv_indptr, batch + 1), kv_len_arr=(kv_len_arr, batch))
        qo, kv, indices, lengths = (
            t.to(self.device, non_blocking=True) for t in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        )
        self._check_fits(function, _kv_indices=indices)
        # Not (length - 1) % page_size + 1: a length that is not in the request's last page is then an error of the op.
        pages = kv.diff()
        last = torch.where(pages > 0, lengths - (pages - 1) * page_size, lengths)
        # Nothing has been changed so far.
        self._keep(
            True, _qo_indptr=qo, _kv_indptr=kv, _kv_indices=indices, _kv_len_arr=lengths, _kv_last_page_len=last,
        )  # fmt: skip
        self._dtypes, self._sizes = dtypes, sizes
        self._settings = Settings(causal=causal, sm_scale=sm_scale)

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
        *,
        kv_scale: float | torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch. One op, no sync; can be compiled and captured.

        Args:
            q_nope: `[nnz_qo, num_heads, head_dim_ckv]`, float32, bfloat16 or float16. Rows beyond qo_indptr[-1] are padding.
            q_pe: `[nnz_qo, num_heads, head_dim_kpe]`, q_nope's dtype.
            ckv_cache: `[num_pages, page_size, head_dim_ckv]`, q_nope's dtype, float8_e4m3fn or float8_e5m2.
            kpe_cache: `[num_pages, page_size, head_dim_kpe]`, ckv_cache's dtype; both may be views of one tensor.
            out, lse: written and returned, of the output's shape and dtype.
            return_lse: also return the log-sum-exp.
            return_lse_base_on_e: natural logarithms in it, in place of base 2.
            kv_scale: a number, or a float32 tensor of one element, that the caches are multiplied by (fp8); None is 1.
            profiler_buffer, kv_len, page_table: refused (FlashInfer's profiler; its CUTLASS backend, which isn't planned).

        Returns:
            `[nnz_qo, num_heads, head_dim_ckv]` in q_nope's dtype, and with return_lse float32 `[nnz_qo, num_heads]`.

        Raises:
            RuntimeError: nothing is planned; tensors that aren't as planned; what the op refuses.
        """
        function = "BatchMLAPagedAttentionWrapper.run"
        refuse_given(function, "it is not there", profiler_buffer=profiler_buffer)
        refuse_given(function, "lengths and pages are plan's", kv_len=kv_len, page_table=page_table)
        settings = self._settings
        if settings is None:
            refuse(function, "nothing is planned; call plan first")
        self._check_as_planned(function, q_nope, q_pe, ckv_cache)
        if kv_scale is not None:
            if isinstance(kv_scale, torch.Tensor):
                kv_scale = kv_scale.reshape(-1).float()
            else:
                kv_scale = torch.full((1,), kv_scale, dtype=torch.float32, device=q_nope.device)
        with_lse = return_lse or lse is not None
        op = torch.ops.fi.mla_paged_attention_with_lse if with_lse else torch.ops.fi.mla_paged_attention
        result = op(
            q_nope, q_pe, ckv_cache, kpe_cache, self._qo_indptr, self._kv_indices, self._kv_indptr, self._kv_last_page_len,
            settings.sm_scale, kv_scale, causal=settings.causal,
        )  # fmt: skip
        if not with_lse:
            return return_in(function, out, result)
        output, log_sum_exp = result
        if return_lse_base_on_e:
            log_sum_exp = log_sum_exp * math.log(2)
        output, log_sum_exp = return_in(function, out, output), return_in(function, lse, log_sum_exp, "lse")
        return (output, log_sum_exp) if return_lse else output

    def _check_as_planned(self, function: str, q_nope, q_pe, ckv_cache) -> None:
        """Whether `run` got what was planned for; the op checks how the tensors fit together."""
        query_dtype, kv_dtype, _ = self._dtypes
        for name, tensor, dtype in (("q", q_nope, query_dtype), ("kv", ckv_cache, kv_dtype)):
            if dtype is not None and tensor.dtype != dtype:
                what = "q_nope" if name == "q" else "ckv_cache"
                refuse(
                    function, f"{what} must be {dtype}, as planned, got {tensor.dtype}; pass {name}_data_type to plan"
                )
        if q_nope.dim() != 3 or q_pe.dim() != 3 or ckv_cache.dim() != 3:
            return  # the op says what is wrong
        given = {
            "num_heads": q_nope.shape[1], "head_dim_ckv": q_nope.shape[2], "head_dim_kpe": q_pe.shape[2],
            "page_size": ckv_cache.shape[1],
        }  # fmt: skip
        for name, got in given.items():
            want = self._sizes[name]
            if got != want:
                refuse(function, f"{name} must be {want}, as planned, got {got}; plan for these tensors")
