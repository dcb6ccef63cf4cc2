"""Block-sparse attention: 32 query heads, 8 KV heads, head_dim 128, as many keys as queries, a quarter of the blocks.

Blocks of R x C at random places, the same number in each row of blocks; C = 1 is vector-sparse; "by head": another pattern for
each KV head. "fi.attention, same work": our dense op over as many keys as each query sees. The plan is made beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

import fi_ops
from fi_ops.library import Cost

from . import batches, stock
from .batches import DENSE, GROUP, HEAD_DIM, KV_HEADS, QUERY_HEADS
from .harness import Candidate, Case, Options, copies_beyond_caches, within_budget

SIZES = (QUERY_HEADS, KV_HEADS, HEAD_DIM)
SHARE = 4  # one block in
CHECKED_ROWS = 64
LONGEST_DENSE = 8192  # a longer mask makes torch materialise scores of many gigabytes

# (length, R, C)
CPU = [(1024, 64, 64), (1024, 64, 1)]
CUDA = [(8192, 128, 128), (8192, 64, 64), (8192, 16, 16), (8192, 128, 1), (32768, 128, 128)]
BY_HEAD_CPU, BY_HEAD_CUDA = [(1024, 64)], [(8192, 128)]


def shapes(options: Options) -> list[tuple[int, int, int]]:
    if options.length:
        length = -(-options.length // 64) * 64
        return [(length, 64, 16), (length, 64, 1)]
    found = CPU if options.device == "cpu" else CUDA
    return found[:2] if options.quick else found


def shapes_by_head(options: Options) -> list[tuple[int, int]]:
    if options.length:
        return [(-(-options.length // 64) * 64, 16)]
    return BY_HEAD_CPU if options.device == "cpu" else BY_HEAD_CUDA


def random_blocks(rows: int, columns: int) -> torch.Tensor:
    """bool `[rows, columns]`, in each row one in SHARE."""
    order = torch.rand(rows, columns).argsort(1)
    return torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, order[:, : columns // SHARE], True)


def _cost(length: int, seen: int, dtype: torch.dtype) -> Cost:
    """q, k, v and the output once, and the products of what is seen."""
    elements = length * HEAD_DIM * 2 * (QUERY_HEADS + KV_HEADS)
    return Cost(bytes=elements * dtype.itemsize, flops=4 * length * seen * QUERY_HEADS * HEAD_DIM)


def _tensors(length: int, dtype: torch.dtype, device: str, seen: int) -> tuple[list[tuple], list[tuple]]:
    """Inputs `[length, heads, head_dim]`, and those of the dense op that costs the same, `[1, heads, len, head_dim]`."""

    def rand(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, HEAD_DIM, device=device, dtype=dtype)

    qkv = rand(length, QUERY_HEADS), rand(length, KV_HEADS), rand(length, KV_HEADS)
    dense = (t.transpose(0, 1)[None] for t in (qkv[0], rand(seen, KV_HEADS), rand(seen, KV_HEADS)))
    copies = copies_beyond_caches(qkv, _cost(length, seen, dtype).bytes, at_most=4)
    return copies, [(*dense, False)]


def _check(qkv: tuple, mask: torch.Tensor, rows_of):
    """The last group of heads, the first and the last rows, by the reference under the dense mask; other jobs return None."""
    length = qkv[0].shape[0]
    rows = torch.cat((torch.arange(CHECKED_ROWS), torch.arange(length - CHECKED_ROWS, length))).to(qkv[0].device)
    parts = [qkv[0][rows, -GROUP:], qkv[1][:, -1:], qkv[2][:, -1:]]
    results = []
    for cast in (torch.Tensor.double, lambda t: t):
        q, k, v = (cast(t).transpose(0, 1)[None] for t in parts)
        results.append(DENSE.reference(q, k, v, mask.to(rows.device)[rows][None, None])[0].transpose(0, 1))
    within = within_budget(*results, lambda out: rows_of(out)[rows, -GROUP:])
    return lambda out: "-" if out is None else within(out)


def _sdpa(mask: torch.Tensor, copies: list[tuple]) -> Candidate:
    def attend(q, k, v):
        parts = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(*parts, mask, enable_gqa=True)[0].transpose(0, 1)

    return Candidate("torch SDPA, dense mask", attend, inputs=copies)


def _blocks(length: int, rows: int, columns: int, options: Options, dtype: torch.dtype) -> Case:
    device, there = options.device, random_blocks(length // rows, length // columns)
    seen = length // columns // SHARE * columns
    copies, dense = _tensors(length, dtype, device, seen)
    indptr = batches.indptr(there.sum(1).tolist(), device)
    table = indptr, there.nonzero()[:, 1].int().to(device)
    mask = there.repeat_interleave(rows, 0).repeat_interleave(columns, 1)

    def planned(library, workspace: int) -> Candidate:
        wrapper = library.BlockSparseAttentionWrapper(torch.empty(workspace, dtype=torch.uint8, device=device))
        wrapper.plan(*table, length, length, rows, columns, *SIZES, q_data_type=dtype, o_data_type=dtype)
        return Candidate("fi_ops" if library is fi_ops else "FlashInfer", wrapper.run, library is fi_ops, copies)

    peers = [batches.same_work(dense)]
    if length <= LONGEST_DENSE:
        peers.append(_sdpa(mask.to(device), copies))
    if device == "cuda" and (library := stock.flashinfer()) is not None:
        peers.append(planned(library, 256 * 2**20))
    return Case(
        f"n={length}, blocks of {rows} x {columns}, one in {SHARE}, {str(dtype).removeprefix('torch.')}",
        [*peers, planned(fi_ops, 0)],
        _cost(length, seen, dtype),
        _check(copies[0], mask, lambda out: out),
        dtype,
    )


def _by_head(length: int, size: int, options: Options, dtype: torch.dtype) -> Case:
    device, count = options.device, length // size
    there = torch.stack([random_blocks(count, count) for _ in range(KV_HEADS)])
    seen = count // SHARE * size
    copies, dense = _tensors(length, dtype, device, seen)
    heads_first = [tuple(t.transpose(0, 1).contiguous() for t in copy) for copy in copies]
    sizes = torch.full((KV_HEADS, count), size, dtype=torch.int32)
    wrapper = fi_ops.VariableBlockSparseAttentionWrapper(torch.empty(0, device=device))
    wrapper.plan(there, sizes, sizes, *SIZES, q_data_type=dtype)
    return Case(
        f"by head, n={length}, blocks of {size} x {size}, one in {SHARE}, {str(dtype).removeprefix('torch.')}",
        [batches.same_work(dense), Candidate("fi_ops", wrapper.run, ours=True, inputs=heads_first)],
        _cost(length, seen, dtype),
        _check(
            copies[0], there[-1].repeat_interleave(size, 0).repeat_interleave(size, 1), lambda out: out.transpose(0, 1)
        ),
        dtype,
    )


def cases(options: Options) -> Iterator[Case]:
    dtype = options.pick(torch.bfloat16)
    for length, rows, columns in shapes(options):
        yield _blocks(length, rows, columns, options, dtype)
    for length, size in shapes_by_head(options):
        yield _by_head(length, size, options, dtype)
