"""Attention of any mix of prefill, append and decode in one op: plain functions, and FlashInfer's `BatchAttention`.

The functions are what a serving engine calls that keeps its own tensors: everything is a tensor in or out, nothing is read
back, so a step can be compiled with fullgraph and captured in a CUDA graph, its plan included:

    plan = fi_ops.batch_attention_plan(qo_indptr, kv_indptr, kv_last_page_len, nnz_qo, group_size, page_size, causal=True)
    for layer in layers:
        fi_ops.append_paged_kv_cache(...)
        out = fi_ops.paged_attention(q, cache, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, plan=plan, causal=True)

Arguments that recur, beside those of `fi_ops.page`:
    qo_indptr: int32 or int64 `[batch + 1]`: request b has the queries `q[qo_indptr[b]:qo_indptr[b + 1]]`, the last of its
        tokens. Rows of q outside of qo_indptr[0] .. qo_indptr[-1] are padding: their output is 0, their LSE -inf.
    fixed_split_size: 0, or a multiple of 64 keys: a request's result does not depend, bit for bit, on the rest of the batch.
"""

from __future__ import annotations

import torch

from ._arguments import refuse, require
from ._batch_options import Settings, check_kv_layout, refuse_given
from ._batch_prefill import BatchPrefillWithPagedKVCacheWrapper
from ._batch_wrapper import BatchWrapper
from .page import PagedKVCache, _as_nhd

__all__ = [
    "BatchAttention",
    "BatchAttentionWithAttentionSinkWrapper",
    "batch_attention_plan",
    "paged_attention",
    "ragged_attention",
]


def batch_attention_plan(
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor | None,
    nnz_qo: int,
    group_size: int,
    page_size: int = 1,
    causal: bool = False,
    window_left: int = -1,
    fixed_split_size: int = 0,
) -> torch.Tensor:
    """The plan of a batch: its attention cut into pieces of even work. Made once, it serves all layers of a step.

    Its size follows from the sizes of the arguments alone, never from what is in them: made inside a captured graph, it is
    made anew at each replay from the lengths at that time.

    Args:
        kv_last_page_len: None for `ragged_attention`, whose kv_indptr counts keys.
        nnz_qo: rows of q, padding included.
        group_size: num_qo_heads / num_kv_heads.
        page_size: 1 for `ragged_attention`.
        causal, window_left, fixed_split_size: as in the attention that it is for.

    Returns:
        int32, on qo_indptr's device; for `plan=` with the same arguments.

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers that don't fit; on the CPU (on CUDA under FI_OPS_CHECK=1) values too.
    """
    return torch.ops.fi.batch_attention_plan(
        qo_indptr, kv_indptr, kv_last_page_len, nnz_qo, group_size, page_size, causal, window_left, fixed_split_size
    )


def paged_attention(
    q: torch.Tensor,
    paged_kv_cache: PagedKVCache,
    qo_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    *,
    kv_layout: str = "NHD",
    custom_mask: torch.Tensor | None = None,
    mask_indptr: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cos_sin_cache: torch.Tensor | None = None,
    is_neox: bool = True,
    plan: torch.Tensor | None = None,
    causal: bool = False,
    window_left: int = -1,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    fixed_split_size: int = 0,
    return_lse: bool = False,
    q_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a ragged batch over a paged cache: decode, append, prefill or any mix.

    Args:
        q: `[nnz_qo, num_qo_heads, head_dim]`, float32, bfloat16, float16, float8_e4m3fn or float8_e5m2.
        paged_kv_cache: see `fi_ops.page`; q's dtype or, where that has more than 8 bits, float8_e4m3fn or float8_e5m2.
        custom_mask, mask_indptr: uint8 bits, lowest first: of request b, `[qo_len, kv_len]` row by row from byte
            `mask_indptr[b]` on (`segment_packbits(mask, indptr, bitorder="little")` makes them of bools); beside causal.
        k_scale, v_scale: float32 `[1]` or `[num_kv_heads]`; they multiply logits and output.
        alibi_slopes: float32 `[num_qo_heads]`.
        sinks: float32 `[num_qo_heads]`, one logit a head that joins the softmax's sum and gives no value.
        cos_sin_cache: float32 `[max_len, rotary_dim]`, cosines of all pairs, then sines: queries and keys are rotated by the row
            of their position, as pairs (i, i + rotary_dim / 2) (is_neox) or (2i, 2i + 1); the cache holds keys that are not.
        plan: of `batch_attention_plan`; None: made by the op.
        causal: query i sees key j when `j <= i + kv_len - qo_len` (bottom-right aligned).
        window_left: how far back a query sees, inclusive; -1 is no window.
        sm_scale: default `1 / sqrt(head_dim)`.
        logits_soft_cap: `cap * tanh(logits / cap)`; 0 is none.
        return_lse: also return the log-sum-exp, base 2.
        q_scale: float32 `[1]` or `[num_qo_heads]`, of q of 8 bits alone; multiplies logits.
        out_dtype: of the output of q of 8 bits: float32, bfloat16 (default) or float16.

    Returns:
        `[nnz_qo, num_qo_heads, head_dim_vo]` in q's dtype (8 bits: out_dtype), and with return_lse float32 `[nnz_qo,
        num_qo_heads]`.

    Raises:
        RuntimeError: shapes, dtypes, devices or strides that don't fit; on the CPU (on CUDA under FI_OPS_CHECK=1) values too.

    Sources: PagedAttention (vLLM); FlashInfer's batch wrappers.
    """
    k, v = _as_nhd("paged_attention", paged_kv_cache, kv_layout)
    op = torch.ops.fi.paged_attention_with_lse if return_lse else torch.ops.fi.paged_attention
    return op(
        q, k, v, qo_indptr, kv_indices, kv_indptr, kv_last_page_len, custom_mask, mask_indptr, k_scale, v_scale, alibi_slopes,
        sinks, cos_sin_cache, plan, causal=causal, window_left=window_left, scale=sm_scale, logits_soft_cap=logits_soft_cap,
        interleaved=not is_neox, fixed_split_size=fixed_split_size, q_scale=q_scale, out_dtype=out_dtype,
    )  # fmt: skip


def ragged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    kv_layout: str = "NHD",
    custom_mask: torch.Tensor | None = None,
    mask_indptr: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cos_sin_cache: torch.Tensor | None = None,
    is_neox: bool = True,
    plan: torch.Tensor | None = None,
    causal: bool = False,
    window_left: int = -1,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    fixed_split_size: int = 0,
    return_lse: bool = False,
    q_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`paged_attention` over ragged keys: request b has `k[kv_indptr[b]:kv_indptr[b + 1]]` and the same rows of v.

    Args:
        k: `[nnz_kv, num_kv_heads, head_dim]` ("HND": `[num_kv_heads, nnz_kv, head_dim]`).
        v: like k, with its own head_dim_vo.
    """
    check_kv_layout("ragged_attention", kv_layout)
    if kv_layout == "HND":
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    op = torch.ops.fi.ragged_attention_with_lse if return_lse else torch.ops.fi.ragged_attention
    return op(
        q, k, v, qo_indptr, kv_indptr, custom_mask, mask_indptr, k_scale, v_scale, alibi_slopes, sinks, cos_sin_cache, plan,
        causal=causal, window_left=window_left, scale=sm_scale, logits_soft_cap=logits_soft_cap, interleaved=not is_neox,
        fixed_split_size=fixed_split_size, q_scale=q_scale, out_dtype=out_dtype,
    )  # fmt: skip


class BatchAttention(BatchWrapper):
    """Prefill, append and decode of any mix over a paged cache, in one op; `fi_ops/_batch_wrapper.py` says what wrappers share.

    Args:
        kv_layout: "NHD" or "HND".
        device: of the tensors.

    Source: FlashInfer `BatchAttention`.
    """

    def __init__(self, kv_layout: str = "NHD", device: str = "cuda") -> None:
        super().__init__(device, kv_layout)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: str | torch.dtype | None = torch.bfloat16,
        kv_data_type: str | torch.dtype | None = torch.bfloat16,
        use_profiler: bool = False,
    ) -> None:
        """Plan the runs that follow; arguments as in `BatchPrefillWithPagedKVCacheWrapper.plan`.

        Args:
            kv_len_arr: int32 or int64 `[batch]`: the number of each request's keys, which end in its last page.
            use_profiler: refused.
        """
        function = "BatchAttention.plan"
        require(function, not use_profiler, "use_profiler is not supported; leave it out and use torch.profiler")
        require(
            function,
            kv_len_arr.shape[0] == kv_indptr.shape[0] - 1,
            f"kv_len_arr must have {kv_indptr.shape[0] - 1} elements, as kv_indptr has requests, got {kv_len_arr.shape[0]}; pass "
            f"one length a request",
        )
        if kv_len_arr.device != kv_indptr.device:
            kv_len_arr, kv_indptr = kv_len_arr.to(self.device), kv_indptr.to(self.device)
        pages = kv_indptr.diff()
        kv_last_page_len = torch.where(pages > 0, kv_len_arr - (pages - 1) * page_size, kv_len_arr)
        self._plan_batch(
            qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_indices=kv_indices, kv_last_page_len=kv_last_page_len,
            num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk, head_dim_vo=head_dim_vo,
            page_size=page_size, q_data_type=q_data_type, kv_data_type=kv_data_type, causal=causal, sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
        )  # fmt: skip

    def run(
        self,
        q: torch.Tensor,
        kv_cache: PagedKVCache,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        logits_soft_cap: float = 0.0,
        profiler_buffer: torch.Tensor | None = None,
        kv_cache_sf: PagedKVCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the planned batch, and its log-sum-exp; arguments as in `BatchPrefillWithPagedKVCacheWrapper.run`.

        Args:
            logits_soft_cap: in place of plan's, where it is not 0.
            profiler_buffer, kv_cache_sf: refused.
        """
        function = "BatchAttention.run"
        refuse_given(function, "it is not there", profiler_buffer=profiler_buffer, kv_cache_sf=kv_cache_sf)
        k, v = _as_nhd(function, kv_cache, self._kv_layout)
        return self._attend(
            q, k, v, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse, return_lse=True,
            logits_soft_cap=logits_soft_cap or None,
        )  # fmt: skip


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """`BatchPrefillWithPagedKVCacheWrapper` whose `run` takes sinks and the scale by position: `run(q, cache, sink, sm_scale)`.

    Args:
        pos_encoding_mode, window_left: what `plan` must agree with, where it is not the default.
        q_data_type, kv_data_type, head_dim_qk, head_dim_vo, use_fp16_qk_reduction: accepted; `plan`'s count.

    Source: FlashInfer `BatchAttentionWithAttentionSinkWrapper`.
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
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: torch.dtype = torch.bfloat16,
        kv_data_type: torch.dtype = torch.bfloat16,
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf,
            paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf, backend,
        )  # fmt: skip
        self._built_for = {"pos_encoding_mode": pos_encoding_mode, "has_window": window_left >= 0}

    def _check_settings(self, settings: Settings) -> None:
        given = {"pos_encoding_mode": settings.pos_encoding_mode, "has_window": settings.window_left >= 0}
        if given != self._built_for:
            refuse(
                "BatchAttentionWithAttentionSinkWrapper.plan",
                f"pos_encoding_mode and the presence of a window must be the constructor's, {self._built_for}, got {given}; pass "
                f"them to both",
            )

    def run(self, q: torch.Tensor, paged_kv_cache: PagedKVCache, *args, sinks: torch.Tensor | None = None, **options):
        """As `BatchPrefillWithPagedKVCacheWrapper.run`; args are the sinks and then the scale, each in place of its option."""
        require(
            "BatchAttentionWithAttentionSinkWrapper.run",
            len(args) <= 2,
            f"got {len(args)} positional arguments after the cache; pass the sinks and the scale",
        )
        if args:
            sinks = args[0]
        if len(args) == 2:
            options["sm_scale"] = args[1]
        return self._run_paged(q, paged_kv_cache, sinks=sinks, **options)
