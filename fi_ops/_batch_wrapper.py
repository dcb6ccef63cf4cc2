"""What FlashInfer's batch wrappers share here: state is tensors on the device, `plan` makes them, `run` is one op.

- Nothing reads a tensor's value back from the device. Index tensors (int32 or int64) may be on the host: they are moved once, and
  what their values tell is used: `plan` then makes the work plan that serves every layer's `run`. Where the number of query
  tokens is known on the device alone (prefill's qo_indptr given there), each `run` plans for itself, in its op.
- With use_cuda_graph, `plan` copies into the buffers that the constructor got: a captured `run` replays with what the latest
  `plan` put there. `plan` with device tensors can be captured too. Numbers and modes stay as they were at capture.
- float_workspace_buffer says the device, by being there; it may be of any size, 0 too: scratch comes from torch's allocator.
  So `workspace_size` is (0, 0), and an int workspace is accepted and not used.
- Accepted, and without effect on results: backend, use_tensor_cores, use_fp16_qk_reduction (sums are float32), enable_pdl,
  seq_lens, block_tables and the maxima of lengths (all said by the page table). jit_args and what else would change results
  raises RuntimeError.
- q_data_type, kv_data_type: checked in `run`; None is any. Queries are float32, bfloat16, float16, float8_e4m3fn or
  float8_e5m2, keys and values of the same dtype or, where the query has more than 8 bits, of one of 8. o_data_type: the output
  is converted to it; by default it has the query's dtype or, where that has 8 bits, out's, bfloat16 without one.
- q_scale, k_scale, v_scale in `run`: numbers, or float32 tensors of one element or one a head; logits are multiplied by
  q_scale * k_scale, the output by v_scale. With fp8 queries the three may also be given by position.
- pos_encoding_mode "ROPE_LLAMA" rotates by a table of as many rows as the longest request has keys, where the index tensors are
  on the host; else as max_sequence_kv says, or as all pages together hold tokens (ragged: as `k` has rows, made in `run`).
- fixed_split_size is in pages, rounded up to 64 keys: a request's result does not depend, bit for bit, on the others.
  disable_split_kv: keys of a request are not split at all.
- A query that sees no key, and tokens beyond qo_indptr[-1]: 0, and -inf in the LSE, which is float32, base 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ._alibi import get_alibi_slopes
from ._arguments import refuse, require, return_in
from ._batch_masks import check_mask_length, pack_masks, packed_indptr
from ._batch_options import (
    Settings,
    check_backend,
    check_heads,
    check_kv_layout,
    cos_sin_table,
    dtypes_of,
    refuse_given,
    scales_of,
    settings_of,
)
from .library._spec import FP8
from .page import _as_nhd, get_seq_lens


def values_known(*tensors: torch.Tensor) -> bool:
    """Whether the host can look at their values without waiting for a device (a tensor being traced has none)."""
    return all(t.device.type == "cpu" for t in tensors) and not torch.compiler.is_compiling()


class BatchWrapper:
    """The state and the steps of the wrappers; see the module."""

    run: Callable[..., Any]

    def __init__(
        self, device, kv_layout: str = "NHD", use_cuda_graph: bool = False, backend: str = "auto", jit_args=None, jit_kwargs=None
    ) -> None:  # fmt: skip
        name = type(self).__name__
        check_kv_layout(name, kv_layout)
        check_backend(name, backend)
        refuse_given(name, "kernels are compiled ahead of time", jit_args=jit_args, jit_kwargs=jit_kwargs)
        self.device = torch.device(device)
        self._kv_layout, self._use_cuda_graph, self._backend = kv_layout, use_cuda_graph, backend
        self._fixed_batch_size: int | None = None
        self._buffers: dict[str, torch.Tensor] = {}  # attributes that a captured graph knows the addresses of
        self._qo_indptr: torch.Tensor | None = None
        self._kv_indptr: torch.Tensor | None = None
        self._kv_indices: torch.Tensor | None = None  # paged alone
        self._kv_last_page_len: torch.Tensor | None = None  # paged alone
        self._custom_mask: torch.Tensor | None = None
        self._mask_indptr: torch.Tensor | None = None
        self._settings: Settings | None = None  # None: not planned
        self._plan: torch.Tensor | None = None
        self._plan_rows: int | None = None  # query tokens that it is for; None: there is none
        self._planned_for: tuple | None = None  # causal, window_left, query tokens
        self._table: torch.Tensor | None = None
        self._table_key: tuple | None = None
        self._alibi_slopes: torch.Tensor | None = None

    # ---- what FlashInfer's wrappers have ----

    @property
    def is_cuda_graph_enabled(self) -> bool:
        return self._use_cuda_graph

    def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: torch.Tensor) -> None:
        """Accepted and without effect: no workspace is used."""

    def workspace_size(self, *args, **kwargs) -> tuple[int, int]:
        """Bytes of float and int workspace that `plan` with these arguments needs: none."""
        return 0, 0

    def end_forward(self) -> None:
        """Accepted and without effect, as FlashInfer's."""

    def run_return_lse(self, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """`run` with return_lse."""
        return self.run(*args, **kwargs, return_lse=True)  # no partialmethod: Dynamo doesn't trace it

    # ---- CUDA graphs ----

    def _use_buffers(self, batch_size: int, **buffers: torch.Tensor | None) -> None:
        """In CUDA graph mode: keep these attributes in these tensors. A mask's may be None, where there is to be none."""
        if not self._use_cuda_graph:
            return
        name = type(self).__name__
        for attribute, buffer in buffers.items():
            if buffer is None and attribute in ("_custom_mask", "_mask_indptr"):
                continue
            if not isinstance(buffer, torch.Tensor):
                refuse(
                    name,
                    f"use_cuda_graph needs a buffer for {attribute[1:]}, got {buffer}; pass the constructor's buffers",
                )
            sizes = dict.fromkeys(("_kv_last_page_len", "_kv_len_arr"), batch_size)
            sizes |= dict.fromkeys(("_kv_indices", "_custom_mask"), buffer.shape[0])
            want = sizes.get(attribute, batch_size + 1)
            require(
                name,
                buffer.shape[0] == want,
                f"the buffer for {attribute[1:]} must have {want} elements for a batch of {batch_size}, got {buffer.shape[0]}; "
                f"the batch is fixed in CUDA graph mode",
            )
            self._buffers[attribute] = buffer
        self._fixed_batch_size = batch_size

    def _check_fits(self, function: str, **tensors: torch.Tensor | None) -> None:
        """In CUDA graph mode: what is to be kept must fit into what a captured graph reads."""
        if not self._use_cuda_graph:
            return
        for attribute, tensor in tensors.items():
            buffer = self._buffers.get(attribute)
            if tensor is None or (buffer is None and "mask" not in attribute):
                continue
            if buffer is None:
                refuse(
                    function,
                    f"a custom mask needs a buffer for {attribute[1:]} in CUDA graph mode; pass it to the constructor",
                )
            may_be_shorter = attribute in ("_kv_indices", "_custom_mask")
            require(
                function,
                tensor.shape[0] == buffer.shape[0] or (may_be_shorter and tensor.shape[0] < buffer.shape[0]),
                f"{attribute[1:]} has {tensor.shape[0]} elements but its buffer has {buffer.shape[0]}; sizes are fixed in CUDA "
                f"graph mode, pass larger buffers to the constructor or make another wrapper",
            )

    def _keep(self, non_blocking: bool, **tensors: torch.Tensor | None) -> None:
        """Set attributes; in CUDA graph mode to their buffers, written (what has none becomes its own: the plan)."""
        for attribute, tensor in tensors.items():
            if self._use_cuda_graph and tensor is not None:
                buffer = self._buffers.setdefault(attribute, tensor)
                if buffer is not tensor:
                    buffer[: tensor.shape[0]].copy_(tensor, non_blocking=non_blocking)
                tensor = buffer
            setattr(self, attribute, tensor)

    # ---- plan ----

    def _plan_batch(
        self, *, qo_indptr, kv_indptr, kv_indices=None, kv_last_page_len=None, nnz_qo=None, num_qo_heads, num_kv_heads,
        head_dim_qk, head_dim_vo=None, page_size=1, custom_mask=None, packed_custom_mask=None, bits=None, bits_indptr=None,
        max_sequence_kv=None, q_data_type=None, kv_data_type=None, o_data_type=None, non_blocking=True, **settings,
    ) -> None:  # fmt: skip
        """`plan` of all wrappers.

        kv_indices, kv_last_page_len: none for ragged keys. nnz_qo: where the wrapper knows it. bits, bits_indptr: a mask as the op
        takes it, on the device, instead of a user's.
        """
        function = f"{type(self).__name__}.plan"
        new_settings = settings_of(function, **settings)
        self._check_settings(new_settings)
        dtypes = dtypes_of(function, q_data_type, kv_data_type, o_data_type, fp8_queries=True)
        check_heads(function, num_qo_heads, num_kv_heads)
        require(function, page_size >= 1, f"page_size must be 1 or more, got {page_size}; pass the cache's")
        batch = qo_indptr.shape[0] - 1
        self._check_batch(function, batch, kv_indptr=(kv_indptr, batch + 1), kv_last_page_len=(kv_last_page_len, batch))
        rows = self._query_rows(function, qo_indptr, nnz_qo)
        max_kv_len = self._longest_request(kv_indptr, kv_indices, kv_last_page_len, page_size, max_sequence_kv)

        def move(t):
            return None if t is None else t.to(self.device, non_blocking=non_blocking)

        qo, kv, indices, last = (move(t) for t in (qo_indptr, kv_indptr, kv_indices, kv_last_page_len))
        mask, mask_indptr = bits, bits_indptr
        if custom_mask is not None or packed_custom_mask is not None:
            mask, mask_indptr = self._masks(
                function, move(custom_mask), move(packed_custom_mask), qo, kv, last, page_size
            )
        self._check_fits(
            function, _qo_indptr=qo, _kv_indptr=kv, _kv_indices=indices, _kv_last_page_len=last, _custom_mask=mask,
            _mask_indptr=mask_indptr,
        )  # fmt: skip
        plan, is_causal = None, new_settings.causal and mask is None
        if rows is not None:
            plan = torch.ops.fi.batch_attention_plan(
                qo, kv, last, rows, num_qo_heads // num_kv_heads, page_size,
                causal=is_causal, window_left=new_settings.window_left,
                fixed_split_size=new_settings.fixed_split_size,
            )  # fmt: skip
            self._check_fits(function, _plan=plan)
        # Nothing has been changed so far.
        self._keep(non_blocking, _qo_indptr=qo, _kv_indptr=kv, _kv_indices=indices, _kv_last_page_len=last)
        self._keep(non_blocking, _custom_mask=mask, _mask_indptr=mask_indptr, _plan=plan)
        self._plan_rows, self._planned_for = rows, (is_causal, new_settings.window_left, rows)
        self._dtypes = dtypes
        self._heads = num_qo_heads, num_kv_heads
        self._head_dims = head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo
        self._page_size, self._max_kv_len = page_size, max_kv_len
        self._set(new_settings)

    def _check_batch(self, function: str, batch: int, **sized: tuple[torch.Tensor | None, int]) -> None:
        """RuntimeError unless the tensors have the sizes beside them and the batch is the fixed one, if any."""
        for name, (tensor, size) in sized.items():
            if tensor is not None:
                require(
                    function,
                    tensor.shape[0] == size,
                    f"{name} must have {size} elements for a batch of {batch}, got {tensor.shape[0]}; build it from the same batch",
                )
        if self._fixed_batch_size is not None:
            require(
                function,
                batch == self._fixed_batch_size,
                f"the batch is fixed in CUDA graph mode at {self._fixed_batch_size}, got {batch}; make another wrapper for it",
            )

    def _check_settings(self, settings: Settings) -> None:
        """RuntimeError for settings that a kind of wrapper can't have."""

    def _query_rows(self, function: str, qo_indptr: torch.Tensor, nnz_qo: int | None) -> int | None:
        """The number of query tokens to plan for, None where only the device knows it."""
        rows = int(qo_indptr[-1]) if nnz_qo is None and values_known(qo_indptr) else nnz_qo
        if not self._use_cuda_graph or self._plan_rows is None:
            return rows
        require(
            function,
            rows is None or rows <= self._plan_rows,
            f"the number of query tokens is fixed in CUDA graph mode, at most {self._plan_rows} (the first plan's), got {rows}; "
            f"plan the largest first",
        )
        return self._plan_rows

    def _longest_request(self, kv_indptr, kv_indices, kv_last_page_len, page_size, max_sequence_kv) -> int | None:
        """A bound of the keys of any request, for RoPE's table; None where only `run` can know one. Fixed in CUDA graph mode."""
        if self._use_cuda_graph:
            return max_sequence_kv or (
                None if kv_indices is None else self._buffers["_kv_indices"].shape[0] * page_size
            )
        if kv_last_page_len is None:
            return int(kv_indptr.diff().max()) if values_known(kv_indptr) and kv_indptr.shape[0] > 1 else None
        if values_known(kv_indptr, kv_last_page_len) and kv_last_page_len.shape[0]:
            return int(get_seq_lens(kv_indptr, kv_last_page_len, page_size).max())
        return max_sequence_kv or kv_indices.shape[0] * page_size

    def _masks(self, function, custom_mask, packed_custom_mask, qo_indptr, kv_indptr, kv_last_page_len, page_size):
        """(custom_mask, mask_indptr) for the op, of a bool mask or of one that is packed."""
        kv_lens = kv_indptr.diff() if kv_last_page_len is None else get_seq_lens(kv_indptr, kv_last_page_len, page_size)
        num_bits = qo_indptr.diff().long() * kv_lens
        if packed_custom_mask is not None:
            return packed_custom_mask, packed_indptr(num_bits)
        flat = custom_mask.reshape(-1)
        check_mask_length(function, flat, num_bits)
        return pack_masks(flat, num_bits)

    def _set(self, settings: Settings) -> None:
        """Take settings, and make the tables that they need."""
        mode, device = settings.pos_encoding_mode, self.device
        if mode == "ALIBI" and (self._alibi_slopes is None or self._alibi_slopes.shape[0] != self._heads[0]):
            self._alibi_slopes = get_alibi_slopes(self._heads[0], device)
        if mode == "ROPE_LLAMA" and self._max_kv_len is not None:
            key = (self._head_dims[0], settings.rope_scale, settings.rope_theta)
            if self._table is None or key != self._table_key or self._table.shape[0] < self._max_kv_len:
                length = -(-self._max_kv_len // 1024) * 1024  # so that it seldom grows
                self._table, self._table_key = cos_sin_table(length, *key, device), key
        self._settings = settings

    def _override(self, **settings) -> None:
        """What the deprecated `forward` does: its arguments replace those of `plan`."""
        function = f"{type(self).__name__}.forward"
        if self._settings is None:
            refuse(function, "nothing is planned; call plan first")
        new_settings = settings_of(function, fixed_split_size=self._settings.fixed_split_size, **settings)
        self._check_settings(new_settings)
        self._set(new_settings)

    def _override_but_causal(self, **settings) -> None:
        """`_override` where causal stays as planned."""
        self._override(causal=self._settings is not None and self._settings.causal, **settings)

    # ---- run ----

    def _check_call(self, function: str, q, k, v, page_size: int | None) -> None:
        """Whether what `run` got is what was planned for; the op checks everything else."""
        query_dtype, kv_dtype, _ = self._dtypes
        if query_dtype is not None and q.dtype != query_dtype:
            refuse(function, f"q must be {query_dtype}, as planned, got {q.dtype}; pass q_data_type to plan")
        if kv_dtype is not None and k.dtype != kv_dtype:
            refuse(
                function, f"keys and values must be {kv_dtype}, as planned, got {k.dtype}; pass kv_data_type to plan"
            )
        if q.dim() != 3 or k.dim() != (3 if page_size is None else 4) or v.dim() != k.dim():
            return  # the op says what is wrong
        (num_qo_heads, num_kv_heads), (head_dim_qk, head_dim_vo) = self._heads, self._head_dims
        given = {
            "num_qo_heads": (q.shape[1], num_qo_heads), "num_kv_heads": (k.shape[-2], num_kv_heads),
            "head_dim_qk": (q.shape[2], head_dim_qk), "head_dim_vo": (v.shape[-1], head_dim_vo),
            "page_size": (page_size, None if page_size is None else self._page_size),
        }  # fmt: skip
        for name, (got, want) in given.items():
            if got != want:
                refuse(function, f"{name} must be {want}, as planned, got {got}; plan for these tensors")

    def _run_paged(self, q, paged_kv_cache, *, kv_cache_sf=None, skip_softmax_threshold_scale_factor=None, **options):
        """`_attend` over a cache as users have it, with what all of FlashInfer's paged `run`s take and these refuse."""
        function = f"{type(self).__name__}.run"
        refuse_given(
            function, "it would change results", kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
        )  # fmt: skip
        k, v = _as_nhd(function, paged_kv_cache, self._kv_layout)
        return self._attend(q, k, v, **options)

    def _attend(
        self, q, k, v, *, q_scale=None, k_scale=None, v_scale=None, sinks=None, out=None, lse=None, return_lse=False,
        enable_pdl=None, window_left=None, logits_soft_cap=None, sm_scale=None, causal=None, custom_mask=None,
        packed_custom_mask=None,
    ):  # fmt: skip
        """`run` of all wrappers, of k and v in the layouts of the ops: the output, or (output, LSE).

        logits_soft_cap, sm_scale, causal, custom_mask, packed_custom_mask: instead of plan's.
        """
        function = f"{type(self).__name__}.run"
        settings = self._settings
        if settings is None:
            refuse(function, "nothing is planned; call plan first")
        paged = self._kv_indices is not None
        self._check_call(function, q, k, v, k.shape[1] if paged and k.dim() == 4 else None)
        if window_left is not None and window_left != settings.window_left:
            refuse(
                function, f"window_left must be {settings.window_left}, as planned, got {window_left}; pass it to plan"
            )
        if sm_scale is None:
            sm_scale = settings.sm_scale
        scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
        q, scale, query_scale, key_scale, value_scale = scales_of(
            function, q, self._heads[1], scale, q_scale, k_scale, v_scale
        )
        slopes = self._alibi_slopes if settings.pos_encoding_mode == "ALIBI" else None
        table = None
        if settings.pos_encoding_mode == "ROPE_LLAMA":
            table = self._table
            if self._max_kv_len is None:
                table = cos_sin_table(k.shape[0], q.shape[-1], settings.rope_scale, settings.rope_theta, q.device)
        mask, mask_indptr = self._custom_mask, self._mask_indptr
        if custom_mask is not None or packed_custom_mask is not None:
            table_of_keys = (self._qo_indptr, self._kv_indptr, self._kv_last_page_len, self._page_size)
            mask, mask_indptr = self._masks(function, custom_mask, packed_custom_mask, *table_of_keys)
        is_causal = (settings.causal if causal is None else causal) and mask is None
        fits = self._planned_for == (is_causal, settings.window_left, q.shape[0])
        options = {
            "causal": is_causal, "window_left": settings.window_left, "scale": scale,
            "logits_soft_cap": settings.logits_soft_cap if logits_soft_cap is None else logits_soft_cap,
            "fixed_split_size": settings.fixed_split_size,
        }  # fmt: skip
        output_dtype = self._dtypes[2]
        if q.dtype in FP8:
            if output_dtype is None and out is not None:
                output_dtype = out.dtype
            options |= {"q_scale": query_scale, "out_dtype": output_dtype}
        tensors = (
            mask, mask_indptr, key_scale, value_scale, slopes, None if sinks is None else sinks.float(), table,
            self._plan if fits else None,
        )  # fmt: skip
        ops, op = torch.ops.fi, "paged_attention" if paged else "ragged_attention"
        pages = (self._kv_indices, self._kv_indptr, self._kv_last_page_len) if paged else (self._kv_indptr,)
        with_lse = return_lse or lse is not None
        if with_lse:
            op += "_with_lse"
        result = getattr(ops, op)(q, k, v, self._qo_indptr, *pages, *tensors, **options)
        output, log_sum_exp = result if with_lse else (result, None)
        if output_dtype is not None:
            output = output.to(output_dtype)
        output = return_in(function, out, output)
        if log_sum_exp is None:
            return output
        log_sum_exp = return_in(function, lse, log_sum_exp, "lse")
        return (output, log_sum_exp) if return_lse else output
