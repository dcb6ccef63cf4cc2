"""Block-sparse attention with FlashInfer's names, arguments and defaults (`flashinfer.sparse`), as attention over pages.

A matrix of queries by keys in blocks, of which some are there: a row of blocks is a request, the blocks that are there are its
pages, in the order given. Nothing is gathered: k and v are read where they lie. `fi_ops/_batch_wrapper.py` says what wrappers
share.
"""

from __future__ import annotations

import math

import torch

from ._arguments import refuse, require, return_in
from ._batch_masks import indptr_of, pack_masks, packed_indptr
from ._batch_options import Settings, check_heads
from ._batch_wrapper import BatchWrapper, values_known

__all__ = ["BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper", "convert_bsr_mask_layout"]

LONG_REQUEST = 128  # rows that fill a tile of the kernels for many rows


def convert_bsr_mask_layout(mask: torch.Tensor, indptr: torch.Tensor) -> torch.Tensor:
    """The masks of blocks, in the order in which attention reads them: each row of blocks row by row, over all of its blocks.

    Args:
        mask: `[nnz, R, C]`, any dtype: of each block that is there.
        indptr: int32 or int64 `[MB + 1]`, on mask's device.

    Returns:
        `[nnz * R * C]`; row i of blocks is `[R, (indptr[i + 1] - indptr[i]) * C]` from `indptr[i] * R * C` on. No sync.

    Source: FlashInfer `convert_bsr_mask_layout`.
    """
    nnz, rows, columns = mask.shape
    ends = indptr.long()
    block = torch.arange(nnz, device=mask.device)
    row_of_blocks = torch.searchsorted(ends[1:], block, right=True).clamp(max=max(indptr.shape[0] - 2, 0))
    begin, width = ends[row_of_blocks], ends.diff()[row_of_blocks] * columns
    first = begin * rows * columns + (block - begin) * columns  # of each block's first element
    place = first[:, None, None] + width[:, None, None] * torch.arange(rows, device=mask.device)[:, None]
    place = place + torch.arange(columns, device=mask.device)
    return torch.empty_like(mask).view(-1).scatter_(0, place.flatten(), mask.flatten())


class BlockSparseAttentionWrapper(BatchWrapper):
    """Attention under a block-sparse matrix in BSR form (scipy's `bsr_matrix`), blocks of any size `(R, C)`, one for all heads.

    Args:
        float_workspace_buffer: a tensor of any size on the device to work on; only its device is used.
        backend: see `fi_ops._batch_wrapper`.

    Source: FlashInfer `BlockSparseAttentionWrapper`.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer.device, backend=backend)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: torch.Tensor | None = None,
        packed_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = "float16",
        non_blocking: bool = True,
    ) -> None:
        """Plan the runs that follow: the blocks that are there, and what attention is. No sync.

        Args:
            indptr: int32 or int64 `[ceil(M / R) + 1]`: row i of blocks has the blocks `indices[indptr[i]:indptr[i + 1]]`.
            indices: int32 or int64 `[nnz]`: the columns of blocks, 0 to N / C - 1.
            M, N: rows (queries) and columns (keys). M is any number: the last row of blocks is shorter; N is a multiple of C.
            R, C: rows and columns of a block.
            mask: bool `[nnz, R, C]`, True = attend, of each block that is there; None: they are full. Replaces causal.
            packed_mask: the same as bits, uint8: `convert_bsr_mask_layout(mask, indptr)`, each row of blocks from a byte of its
                own on (`segment_packbits`, "little"); instead of mask.
            causal, pos_encoding_mode: count the keys of a row of blocks in the order of its blocks, the last of which ends at
                its last query, as FlashInfer does.
            logits_soft_cap, sm_scale, rope_scale, rope_theta: as in `BatchPrefillWithPagedKVCacheWrapper.plan`.
            o_data_type: of the output; None: q's.

        Raises:
            RuntimeError: sizes, dtypes or options that don't fit; values are checked in `run`, on the CPU.
        """
        function = "BlockSparseAttentionWrapper.plan"
        require(function, R >= 1 and C >= 1, f"R and C must be 1 or more, got {R} and {C}; pass the sizes of a block")
        require(
            function, N % C == 0, f"N must be a multiple of C, got {N} and {C}; pad k and v, and mask what is added"
        )
        num_rows = -(-M // R)
        require(
            function,
            indptr.shape[0] == num_rows + 1,
            f"indptr must have ceil(M / R) + 1 = {num_rows + 1} elements, got {indptr.shape[0]}; pass one row of blocks for each",
        )
        indptr = indptr.to(self.device, non_blocking=non_blocking)
        indices = indices.to(self.device, non_blocking=non_blocking)
        blocks = indptr.diff()
        qo_indptr = (R * torch.arange(num_rows + 1, dtype=torch.int32, device=self.device)).clamp(max=M)
        bits, bits_indptr = None, None
        if mask is not None or packed_mask is not None:
            num_bits = qo_indptr.diff().long() * blocks * C
            if packed_mask is not None:
                bits, bits_indptr = packed_mask.to(self.device, non_blocking=non_blocking), packed_indptr(num_bits)
            elif mask is not None:
                want = (indices.shape[0], R, C)
                require(
                    function,
                    tuple(mask.shape) == want,
                    f"mask must be [nnz, R, C] = {list(want)}, got {list(mask.shape)}; pass a mask a block",
                )
                mask = mask.to(self.device, non_blocking=non_blocking)
                bits, bits_indptr = pack_masks(convert_bsr_mask_layout(mask, indptr), num_bits)
        self._plan_batch(
            qo_indptr=qo_indptr, kv_indptr=indptr, kv_indices=indices, kv_last_page_len=torch.where(blocks > 0, C, 0),
            nnz_qo=M, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim, page_size=C,
            bits=bits, bits_indptr=bits_indptr, q_data_type=q_data_type, kv_data_type=kv_data_type, o_data_type=o_data_type,
            non_blocking=non_blocking, causal=causal, pos_encoding_mode=pos_encoding_mode, logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        self._sizes = M, N, C

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: float | torch.Tensor | None = None,
        scale_k: float | torch.Tensor | None = None,
        scale_v: float | torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of q over the blocks that are there. One op, no sync; can be compiled and captured.

        Args:
            q: `[M, num_qo_heads, head_dim]`.
            k, v: `[N, num_kv_heads, head_dim]`.
            scale_q, scale_k, scale_v: q_scale, k_scale, v_scale of `fi_ops._batch_wrapper`.
            out, lse: written and returned, of the output's shape and dtype.
            return_lse: also return the log-sum-exp.

        Returns:
            `[M, num_qo_heads, head_dim]`, and with return_lse float32 `[M, num_qo_heads]`; 0 and -inf in rows without blocks.
        """
        function = "BlockSparseAttentionWrapper.run"
        if self._settings is None:
            refuse(function, "nothing is planned; call plan first")
        rows, columns, block_columns = self._sizes
        for name, t, length in (("q", q, rows), ("k", k, columns), ("v", v, columns)):
            if t.dim() != 3 or t.shape[0] != length:
                refuse(
                    function,
                    f"{name} must be [{length}, heads, head_dim], as planned, got {list(t.shape)}; plan for this size",
                )
        k, v = (t.unflatten(0, (columns // block_columns, block_columns)) for t in (k, v))
        return self._attend(
            q, k, v, q_scale=scale_q, k_scale=scale_k, v_scale=scale_v, out=out, lse=lse, return_lse=return_lse,
            enable_pdl=enable_pdl,
        )  # fmt: skip

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale_q: float | torch.Tensor | None = None,
        scale_k: float | torch.Tensor | None = None,
        scale_v: float | torch.Tensor | None = None,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ):
        """`run` with these arguments in place of `plan`'s, defaults too (FlashInfer's deprecated form)."""
        self._override_but_causal(
            pos_encoding_mode=pos_encoding_mode, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale, rope_scale=rope_scale,
            rope_theta=rope_theta,
        )  # fmt: skip
        return self.run(q, k, v, scale_q, scale_k, scale_v)


class VariableBlockSparseAttentionWrapper(BatchWrapper):
    """Attention under a block mask of blocks of any sizes, another for each KV head.

    Each row of blocks of each KV head is a request of one KV head, over pages as large as the columns of blocks allow: tables of
    sizes on the host, multiples of 16 or more, are the fast ones.

    Args:
        float_workspace_buffer: a tensor of any size on the device to work on; only its device is used.
        backend: see `fi_ops._batch_wrapper`.

    Source: FlashInfer `VariableBlockSparseAttentionWrapper`.
    """

    def __init__(self, float_workspace_buffer: torch.Tensor, backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer.device, backend=backend)

    def _check_settings(self, settings: Settings) -> None:
        require(
            "VariableBlockSparseAttentionWrapper.plan",
            settings.pos_encoding_mode != "ALIBI",
            "pos_encoding_mode must be 'NONE' or 'ROPE_LLAMA', got 'ALIBI': heads have no slopes of their own here",
        )

    def plan(
        self,
        block_mask_map: torch.Tensor,
        block_row_sz: torch.Tensor,
        block_col_sz: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        max_nnz: int | None = None,
    ) -> None:
        """Plan the runs that follow: the blocks that are there, and what attention is.

        Args:
            block_mask_map: bool `[num_kv_heads, MB, NB]`: the blocks that are there.
            block_row_sz: integers `[num_kv_heads, MB]`: rows of each row of blocks; each head's sum is qo_len.
            block_col_sz: integers `[num_kv_heads, NB]`: columns of each column of blocks; each head's sum is kv_len.
            causal: counts the keys of a row of blocks in the order of its blocks, the last of which ends at its last query, as
                FlashInfer does.
            pos_encoding_mode: "NONE", or "ROPE_LLAMA" with positions counted like causal's; "ALIBI" is refused.
            logits_soft_cap, sm_scale, rope_scale, rope_theta: as in `BatchPrefillWithPagedKVCacheWrapper.plan`.
            max_nnz: the most keys that all rows of blocks of all heads can have together, up to 4 bytes each. Without it, they are
                counted: free where the three tensors are on the host; on the device one number is read back.

        Raises:
            RuntimeError: sizes, dtypes or options that don't fit; values are checked in `run`, on the CPU.
        """
        function = "VariableBlockSparseAttentionWrapper.plan"
        require(
            function,
            block_mask_map.dim() == 3 and block_mask_map.shape[0] == num_kv_heads,
            f"block_mask_map must be [num_kv_heads = {num_kv_heads}, MB, NB], got {list(block_mask_map.shape)}; pass one a KV head",
        )
        for name, sizes, dim in (("block_row_sz", block_row_sz, 1), ("block_col_sz", block_col_sz, 2)):
            want = (num_kv_heads, block_mask_map.shape[dim])
            require(
                function,
                tuple(sizes.shape) == want,
                f"{name} must be {list(want)}, as block_mask_map is {list(block_mask_map.shape)}, got {list(sizes.shape)}",
            )
        check_heads(function, num_qo_heads, num_kv_heads)
        if block_mask_map.device != block_col_sz.device:
            block_mask_map, block_col_sz = (
                t.to(self.device, non_blocking=non_blocking) for t in (block_mask_map, block_col_sz)
            )
        # What every column of blocks is a multiple of is a page: the copy engine brings it whole.
        page_size = max(math.gcd(*block_col_sz.flatten().tolist()), 1) if values_known(block_col_sz) else 1
        columns = block_col_sz.long() // page_size
        lengths = torch.where(block_mask_map.bool(), columns[:, None, :], 0)
        max_pages = int(lengths.sum()) if max_nnz is None else max_nnz // page_size
        nnz_qo = int(block_row_sz.sum()) if values_known(block_row_sz) else None
        # Query heads that share a KV head are rows of one request, which q must be copied for, or requests of their own where
        # those are long enough by themselves and the table doesn't get longer than one of keys.
        group_size = num_qo_heads // num_kv_heads
        long_requests = nnz_qo is not None and nnz_qo >= LONG_REQUEST * block_row_sz.numel()
        repeats = group_size if long_requests and group_size <= page_size else 1
        columns, lengths, rows = (
            t.to(self.device, non_blocking=non_blocking) for t in (columns, lengths, block_row_sz)
        )
        qo_indptr = indptr_of(rows.repeat_interleave(repeats, 0).flatten(), torch.int32)
        kv_indptr = indptr_of(lengths.sum(-1).repeat_interleave(repeats, 0).flatten(), torch.int32)
        self._plan_batch(
            qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_indices=_expanded(lengths, columns, repeats, repeats * max_pages),
            kv_last_page_len=torch.where(kv_indptr.diff() > 0, page_size, 0), nnz_qo=None if nnz_qo is None else nnz_qo * repeats,
            num_qo_heads=group_size // repeats, num_kv_heads=1,
            head_dim_qk=head_dim, page_size=page_size, q_data_type=q_data_type, kv_data_type=kv_data_type,
            non_blocking=non_blocking, causal=causal, pos_encoding_mode=pos_encoding_mode, logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale, rope_scale=rope_scale, rope_theta=rope_theta,
        )  # fmt: skip
        self._num_kv_heads, self._repeats = num_kv_heads, repeats

    begin_forward = plan

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of q over the blocks that are there. No sync; can be compiled and captured.

        Args:
            q: `[num_qo_heads, qo_len, head_dim]` (copied where rows of blocks are short and a KV head has several query heads).
            k, v: `[num_kv_heads, kv_len, head_dim]` (copied where not contiguous).
            out, lse: written and returned, of the output's shape and dtype.
            return_lse: also return the log-sum-exp.

        Returns:
            `[num_qo_heads, qo_len, head_dim]`, and with return_lse float32 `[num_qo_heads, qo_len]`.
        """
        function = "VariableBlockSparseAttentionWrapper.run"
        if self._settings is None:
            refuse(function, "nothing is planned; call plan first")
        heads = self._num_kv_heads
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.dim() != 3 or t.shape[0] % heads != 0 or (name != "q" and t.shape[0] != heads):
                refuse(
                    function,
                    f"{name} must be [heads, len, head_dim] of {heads} KV heads, got {list(t.shape)}; see the docstring",
                )
        qo_len = q.shape[1]
        requests = heads * self._repeats  # of each row of blocks
        rows = q.unflatten(0, (requests, -1)).transpose(1, 2).flatten(0, 1)
        keys, values = (t.reshape(-1, self._page_size, 1, t.shape[-1]) for t in (k, v))
        result = self._attend(rows, keys, values, return_lse=return_lse or lse is not None)
        output, log_sum_exp = result if isinstance(result, tuple) else (result, None)
        output = return_in(function, out, output.unflatten(0, (requests, qo_len)).transpose(1, 2).flatten(0, 1))
        if log_sum_exp is None:
            return output
        log_sum_exp = log_sum_exp.unflatten(0, (requests, qo_len)).transpose(1, 2).flatten(0, 1)
        log_sum_exp = return_in(function, lse, log_sum_exp, "lse")
        return (output, log_sum_exp) if return_lse else output

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ):
        """`run` with these arguments in place of `plan`'s, defaults too (FlashInfer's deprecated form)."""
        self._override_but_causal(
            pos_encoding_mode=pos_encoding_mode, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale, rope_scale=rope_scale,
            rope_theta=rope_theta,
        )  # fmt: skip
        return self.run(q, k, v)


def _expanded(lengths: torch.Tensor, columns: torch.Tensor, repeats: int, max_nnz: int) -> torch.Tensor:
    """The pages of all rows of blocks, `repeats` times for each head, int32 `[max_nnz]`. No sync.

    lengths: `[num_kv_heads, MB, NB]`, pages of each block, 0 where it is not there; columns: `[num_kv_heads, NB]`, of each column.
    The pages of all heads are counted through.
    """
    blocks = lengths[0].numel() or 1  # of a head
    num_columns = lengths.shape[2]
    repeated = lengths.repeat_interleave(repeats, 0).flatten()
    ends = repeated.cumsum(0)
    entry = torch.arange(max_nnz, device=lengths.device)
    block = torch.searchsorted(ends, entry, right=True).clamp(max=max(ends.shape[0] - 1, 0))
    head, column = block // (repeats * blocks), block % (num_columns or 1)
    first_page = (columns.flatten().cumsum(0) - columns.flatten()).view_as(columns)
    within = entry - (ends - repeated)[block]
    return (first_page[head, column] + within).to(torch.int32)
