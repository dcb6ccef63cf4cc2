"""Prefill and decode in one call with FlashInfer's names, arguments and defaults (`flashinfer.pod`).

`PODWithPagedKVCacheWrapper` is one op for prefill, whose keys are tensors of their own, and decode; with a mask, positions,
scales other than numbers for q and k, or fp8 queries it is two. Over one paged cache `BatchPODWithPagedKVCacheWrapper` is one
op for both where it can be, and `BatchAttention` always:

    wrapper = fi_ops.BatchAttention("NHD", device)
    wrapper.plan(qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_qo_heads, num_kv_heads, head_dim, head_dim, page_size,
                 causal=True)  # qo_indptr [0, 512, 513, 514]: a prompt's 512 tokens and two decoding requests
    out, lse = wrapper.run(torch.cat((q_p, q_d)), paged_kv_cache)

Source: POD-Attention (Kamath et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch

from ._arguments import require
from ._batch_options import check_kv_layout, with_data_type
from ._batch_prefill import BatchPrefillWithPagedKVCacheWrapper
from ._batch_wrapper import values_known
from .decode import BatchDecodeWithPagedKVCacheWrapper
from .library._spec import FP8
from .page import PagedKVCache, _as_nhd
from .prefill import single_prefill_with_kv_cache

__all__ = ["BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"]


class PODWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """Prefill of one request with keys and values of its own, and decode of a batch over a paged cache.

    Args:
        float_workspace_buffer, kv_layout, use_cuda_graph, paged_kv_indptr_buffer, paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer, jit_args: as in `BatchDecodeWithPagedKVCacheWrapper`.

    Source: FlashInfer `PODWithPagedKVCacheWrapper`.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        jit_args: list | None = None,
    ) -> None:
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, paged_kv_indptr_buffer=paged_kv_indptr_buffer,
            paged_kv_indices_buffer=paged_kv_indices_buffer, paged_kv_last_page_len_buffer=paged_kv_last_page_len_buffer,
            jit_args=jit_args,
        )  # fmt: skip

    def plan(  # type: ignore[override]  # FlashInfer's arguments
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
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Plan the decode of the runs that follow; arguments as in `BatchDecodeWithPagedKVCacheWrapper.plan`."""
        super().plan(
            indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            pos_encoding_mode=pos_encoding_mode, window_left=window_left, q_data_type=q_data_type,
            kv_data_type=kv_data_type, data_type=data_type, sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
            non_blocking=non_blocking,
        )  # fmt: skip

    begin_forward = plan  # type: ignore[assignment]

    def run(  # type: ignore[override]  # FlashInfer's arguments
        self,
        q_p: torch.Tensor,
        k_p: torch.Tensor,
        v_p: torch.Tensor,
        q_d: torch.Tensor,
        paged_kv_cache_d: PagedKVCache,
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: float | None = None,
        window_left_p: int = -1,
        rope_scale_p: float | None = None,
        rope_theta_p: float | None = None,
        return_lse_p: bool = False,
        custom_mask_d: torch.Tensor | None = None,
        packed_custom_mask_d: torch.Tensor | None = None,
        causal_d: bool = False,
        kv_layout_d: str = "NHD",
        pos_encoding_mode_d: str = "NONE",
        sm_scale_d: float | None = None,
        window_left_d: int = -1,
        rope_scale_d: float | None = None,
        rope_theta_d: float | None = None,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
        *args,
    ) -> tuple:
        """Both attentions of a step.

        Args:
            q_p, k_p, v_p, and those that end in _p: `single_prefill_with_kv_cache`'s.
            q_d, paged_kv_cache_d, q_scale, k_scale, v_scale: `BatchDecodeWithPagedKVCacheWrapper.run`'s.
            causal_d: without effect: there is one query a request.
            kv_layout_d, pos_encoding_mode_d, sm_scale_d, window_left_d, rope_scale_d, rope_theta_d: their defaults, or as in the
                constructor and `plan`, which count (FlashInfer doesn't look at them).
            custom_mask_d, packed_custom_mask_d, args: refused.
            return_lse_p, return_lse_d: that result is a pair `(output, LSE)`.

        Returns:
            prefill's output `[qo_len, num_qo_heads, head_dim]` and decode's `[batch, num_qo_heads, head_dim]`.
        """
        function = "PODWithPagedKVCacheWrapper.run"
        settings = self._settings
        require(function, settings is not None, "nothing is planned; call plan first")
        assert settings is not None
        masks = custom_mask_d is not None or packed_custom_mask_d is not None
        require(
            function, not masks, "custom_mask_d and packed_custom_mask_d are not supported; one query sees all keys"
        )
        require(function, not args, f"got {len(args)} positional arguments too many; leave them out")
        given = {
            "kv_layout_d": (kv_layout_d, "NHD", self._kv_layout),
            "pos_encoding_mode_d": (pos_encoding_mode_d, "NONE", settings.pos_encoding_mode),
            "sm_scale_d": (sm_scale_d, None, settings.sm_scale),
            "window_left_d": (window_left_d, -1, settings.window_left),
            "rope_scale_d": (rope_scale_d, None, settings.rope_scale),
            "rope_theta_d": (rope_theta_d, None, settings.rope_theta),
        }
        for name, (value, default, planned) in given.items():
            require(
                function,
                value in (default, planned),
                f"{name} must be {planned}, as planned, got {value}; pass it to plan (kv_layout_d: to the constructor)",
            )
        by_number = not isinstance(q_scale, torch.Tensor) and not isinstance(k_scale, torch.Tensor) and v_scale is None
        no_mask = custom_mask_p is None and packed_custom_mask_p is None
        no_positions = pos_encoding_mode_p == "NONE" and settings.pos_encoding_mode == "NONE"
        if by_number and no_mask and no_positions and q_p.dtype == q_d.dtype and q_d.dtype not in FP8:
            check_kv_layout(function, kv_layout_p)
            if kv_layout_p == "HND" and k_p.dim() == 3 and v_p.dim() == 3:
                k_p, v_p = k_p.transpose(0, 1), v_p.transpose(0, 1)
            k_d, v_d = _as_nhd(function, paged_kv_cache_d, self._kv_layout)
            self._check_call(function, q_d, k_d, v_d, k_d.shape[1] if k_d.dim() == 4 else None)
            scale = q_d.shape[-1] ** -0.5 if settings.sm_scale is None else settings.sm_scale
            for factor in (q_scale, k_scale):
                scale = scale if factor is None else scale * factor
            out_p, lse_p, out_d, lse_d = torch.ops.fi.pod_attention(
                q_p, k_p, v_p, q_d, k_d, v_d, self._kv_indices, self._kv_indptr, self._kv_last_page_len, causal_p=causal_p,
                window_left_p=window_left_p, scale_p=sm_scale_p, window_left=settings.window_left, scale=scale,
            )  # fmt: skip
            return (out_p, lse_p) if return_lse_p else out_p, (out_d, lse_d) if return_lse_d else out_d
        prefill = single_prefill_with_kv_cache(
            q_p, k_p, v_p, custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p, causal=causal_p,
            kv_layout=kv_layout_p, pos_encoding_mode=pos_encoding_mode_p, sm_scale=sm_scale_p, window_left=window_left_p,
            rope_scale=rope_scale_p, rope_theta=rope_theta_p, return_lse=return_lse_p,
        )  # fmt: skip
        decode = super().run(
            q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse_d
        )
        return prefill, decode


class BatchPODWithPagedKVCacheWrapper:
    """Prefill of a batch and decode of a batch, each over a paged cache of its own or one for both.

    One op does both where that is possible: the caches are the same tensors, `plan` got its index tensors on the host, decoding
    requests have one query each, `run` gets no mask and no scales. Else there are two.

    Args:
        float_workspace_buffer: a tensor of any size on the device to work on; only its device is used.
        kv_layout: "NHD" or "HND", of both caches.

    Source: FlashInfer `BatchPODWithPagedKVCacheWrapper`.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._decode = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._both = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._rows: tuple[int, int] | None = None  # of prefill and decode, where _both is planned

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return False

    def plan(
        self,
        qo_indptr_p: torch.Tensor,
        kv_indptr_p: torch.Tensor,
        kv_indices_p: torch.Tensor,
        last_page_len_p: torch.Tensor,
        qo_indptr_d: torch.Tensor,
        kv_indptr_d: torch.Tensor,
        kv_indices_d: torch.Tensor,
        last_page_len_d: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
    ) -> None:
        """Plan the runs that follow: two batches; arguments as in `BatchPrefillWithPagedKVCacheWrapper.plan`.

        Args:
            data_type: as in `BatchDecodeWithPagedKVCacheWrapper.plan`.
        """
        q_data_type, kv_data_type = with_data_type(q_data_type, kv_data_type, data_type)
        options: dict[str, Any] = {
            "pos_encoding_mode": pos_encoding_mode, "window_left": window_left, "q_data_type": q_data_type,
            "kv_data_type": kv_data_type, "sm_scale": sm_scale, "rope_scale": rope_scale, "rope_theta": rope_theta,
            "non_blocking": non_blocking,
        }  # fmt: skip
        sizes = num_qo_heads, num_kv_heads, head_dim, page_size
        # Each run says whether prefill is causal: this plan fits if it is, else the op makes its own.
        prefill = (qo_indptr_p, kv_indptr_p, kv_indices_p, last_page_len_p)
        decode = (qo_indptr_d, kv_indptr_d, kv_indices_d, last_page_len_d)
        self._prefill.plan(*prefill, *sizes, causal=True, **options)
        self._decode.plan(*decode, *sizes, **options)
        self._rows, both = None, _joined(*prefill, *decode)
        if both is not None:
            self._both.plan(*both, *sizes, causal=True, **options)
            self._rows = int(qo_indptr_p[-1]), int(qo_indptr_d[-1])

    begin_forward = plan

    def run(
        self,
        q_p: torch.Tensor,
        paged_kv_cache_p: PagedKVCache,
        q_d: torch.Tensor,
        paged_kv_cache_d: PagedKVCache,
        custom_mask_p: torch.Tensor | None = None,
        packed_custom_mask_p: torch.Tensor | None = None,
        causal_p: bool = False,
        q_scale: float | torch.Tensor | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
        return_lse: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
    ) -> tuple:
        """Both attentions of a step.

        Args:
            q_p, paged_kv_cache_p, q_d, paged_kv_cache_d: `BatchPrefillWithPagedKVCacheWrapper.run`'s.
            custom_mask_p, packed_custom_mask_p, causal_p: prefill's, as in `BatchPrefillWithPagedKVCacheWrapper.plan`.
            q_scale, k_scale, v_scale: of decode (as in FlashInfer).
            return_lse: also return a pair of log-sum-exps.

        Returns:
            `(prefill's output, decode's output)`; with return_lse `((output, output), (LSE, LSE))`.
        """
        k_p, v_p = _as_nhd("BatchPODWithPagedKVCacheWrapper.run", paged_kv_cache_p, self._prefill._kv_layout)
        differing = (custom_mask_p, packed_custom_mask_p, q_scale, k_scale, v_scale)
        if (
            self._rows == (q_p.shape[0], q_d.shape[0])
            and _is_same(paged_kv_cache_p, paged_kv_cache_d)
            and all(option is None for option in differing)
        ):
            results = self._both._attend(torch.cat((q_p, q_d)), k_p, v_p, causal=causal_p, return_lse=return_lse)
            split = [t.split(self._rows) for t in (results if return_lse else (results,))]
            return tuple(split) if return_lse else split[0]
        prefill = self._prefill._attend(
            q_p, k_p, v_p, custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p, causal=causal_p,
            return_lse=return_lse,
        )  # fmt: skip
        decode = self._decode.run(
            q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse
        )
        return tuple(zip(prefill, decode, strict=True)) if return_lse else (prefill, decode)

    def end_forward(self) -> None:
        """Accepted and without effect, as FlashInfer's."""


def _joined(
    qo_p, kv_p, indices_p, last_p, qo_d, kv_d, indices_d, last_d
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Prefill's and decode's tables as one batch's, where the host knows them; None where it doesn't.

    None too where a decoding request has several queries, which would become causal with prefill's.
    """
    tables = (qo_p, kv_p, indices_p, last_p, qo_d, kv_d, indices_d, last_d)
    if not values_known(*tables) or int(qo_d[0]) or int(kv_d[0]) or bool((qo_d.diff() > 1).any()):
        return None
    return (
        torch.cat((qo_p, qo_d[1:] + qo_p[-1])),
        torch.cat((kv_p, kv_d[1:] + kv_p[-1])),
        torch.cat((indices_p[: int(kv_p[-1])], indices_d)),
        torch.cat((last_p, last_d)),
    )


def _is_same(a: PagedKVCache, b: PagedKVCache) -> bool:
    """Whether two caches are the same tensors."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    return a[0] is b[0] and a[1] is b[1]
