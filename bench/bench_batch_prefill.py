"""Prefill of a batch, ragged and paged: 32 query heads, 8 KV heads, head_dim 128, causal.

Prompts of one length, of mixed lengths (uniformly random, n on average), and a step of chunked prefill: decodes and one chunk
of a prompt in the same call. "fi.attention, same work": our dense op on as many queries that see as many keys: what the batch,
its pages and its lengths cost. Prompts under a custom mask, which spells what causal says: beside causal=True, what reading the
mask costs. The plan is given.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

import fi_ops
from fi_ops.library import SPECS

from . import batches
from .batches import HEAD_DIM, KV_HEADS, QUERY_HEADS
from .harness import NAN, Candidate, Case, Options, copies_beyond_caches

PAGED, RAGGED = SPECS["paged_attention"], SPECS["ragged_attention"]

# (batch, length)
EQUAL_CPU, EQUAL_CUDA = [(1, 512), (4, 512), (1, 2048)], [(1, 1024), (1, 4096), (1, 16384), (16, 1024), (4, 4096)]
MIXED_CPU, MIXED_CUDA = [(8, 256)], [(16, 1024), (64, 256)]
# (decodes, their length, tokens of the chunk, tokens before the chunk)
CHUNKED_CPU, CHUNKED_CUDA = [(15, 512, 256, 512)], [(63, 2048, 1024, 3072), (31, 4096, 8192, 0)]


def equal_shapes(options: Options) -> list[tuple[int, int]]:
    if options.batch or options.length:
        return [(options.batch or 1, options.length or 4096)]
    shapes = EQUAL_CPU if options.device == "cpu" else EQUAL_CUDA
    return shapes[:2] if options.quick else shapes


def mixed_shapes(options: Options) -> list[tuple[int, int]]:
    if options.batch or options.length:
        return [(options.batch or 8, options.length or 512)]
    return MIXED_CPU if options.device == "cpu" else MIXED_CUDA


def chunked_shapes(options: Options) -> list[tuple[int, int, int, int]]:
    if options.batch or options.length:
        length = options.length or 1024
        return [(options.batch or 15, length, length, length)]
    shapes = CHUNKED_CPU if options.device == "cpu" else CHUNKED_CUDA
    return shapes[:1] if options.quick else shapes


def _dense(batch: int, length: int, dtype: torch.dtype, device: str) -> Candidate:
    """The dense op on `batch` prompts of `length`, as they lie in memory: tokens first."""
    query = torch.randn(batch, length, QUERY_HEADS, HEAD_DIM, device=device, dtype=dtype)
    key, value = (torch.randn(batch, length, KV_HEADS, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    tensors = [t.transpose(1, 2) for t in (query, key, value)]
    return batches.same_work([(*tensors, True)])


def _case(
    op: str, name: str, qo_lens, kv_lens, dtype, device, peers: list[Candidate], series: str = "", length: float = NAN
) -> Case:
    make = batches.paged if op == "paged_attention" else batches.ragged
    arguments = make(qo_lens, kv_lens, dtype, device)
    cost = SPECS[op].cost(*arguments, causal=True)
    copies = copies_beyond_caches((*arguments, batches.planned(arguments, causal=True)), cost.bytes, at_most=4)
    return Case(
        f"{op.partition('_')[0]}, {name}, {str(dtype).removeprefix('torch.')}",
        [
            batches.torch_peer(copies, qo_lens, kv_lens, causal=True),
            *batches.flashinfer_peers(copies, causal=True, decode=False),
            *peers,
            Candidate("fi_ops", batches.ours(op, causal=True), ours=True, inputs=copies),
        ],
        cost,
        batches.check_requests(arguments, qo_lens, kv_lens, causal=True),
        dtype,
        series=series,
        length=length,
    )


def prompts(op: str, batch: int, length: int, options: Options) -> Case:
    """`batch` prompts of one length; beside it our dense op on the same work."""
    dtype, device, lens = options.pick(torch.bfloat16), options.device, [length] * batch
    series = f"{op.partition('_')[0]}, B={batch}"
    dense = [_dense(batch, length, dtype, device)]
    return _case(op, f"B={batch} n={length} causal", lens, lens, dtype, device, dense, series, length)


def mixed_prompts(op: str, batch: int, length: int, options: Options) -> Case:
    """Lengths at random, `length` on average."""
    dtype, device = options.pick(torch.bfloat16), options.device
    lens = torch.randint(1, 2 * length, (batch,), generator=torch.Generator().manual_seed(batch)).tolist()
    # prompts of the root mean square of the lengths have as many pairs of a query and a key
    even = round((sum(n * n for n in lens) / batch) ** 0.5)
    name = f"B={batch}, {min(lens)} to {max(lens)} tokens, causal"
    return _case(op, name, lens, lens, dtype, device, [_dense(batch, even, dtype, device)])


def masked_prompts(op: str, batch: int, length: int, options: Options) -> Case:
    """`batch` prompts of one length under a custom mask of bits, the causal one; beside it the causal call without."""
    dtype, device, lens = options.pick(torch.bfloat16), options.device, [length] * batch
    make = batches.paged if op == "paged_attention" else batches.ragged
    arguments = make(lens, lens, dtype, device)
    mask = batches.bottom_right(length, length, torch.device(device)).flatten()
    bits = fi_ops.packbits(mask, bitorder="little").repeat(batch)
    options_of_mask = {"custom_mask": bits, "mask_indptr": batches.indptr([len(bits) // batch] * batch, device)}
    cost = SPECS[op].cost(*arguments, causal=True)
    by_causal, by_mask = (
        copies_beyond_caches((*arguments, batches.planned(arguments, causal)), cost.bytes, at_most=4)
        for causal in (True, False)
    )
    call = getattr(torch.ops.fi, op).default
    return Case(
        f"{op.partition('_')[0]}, B={batch} n={length}, custom mask, {str(dtype).removeprefix('torch.')}",
        [
            Candidate("fi_ops, causal", batches.ours(op, causal=True), inputs=by_causal),
            Candidate("fi_ops", lambda *x: call(*x[:-1], plan=x[-1], **options_of_mask), ours=True, inputs=by_mask),
        ],
        cost,
        batches.check_requests(arguments, lens, lens, causal=True),
        dtype,
    )


def appended(op: str, batch: int, rows: int, length: int, options: Options) -> Case:
    """The last `rows` tokens of `length`, of each request."""
    dtype, device = options.pick(torch.bfloat16), options.device
    name = f"B={batch}, the last {rows} of {length} tokens"
    return _case(op, name, [rows] * batch, [length] * batch, dtype, device, [])


def chunked(decodes: int, length: int, chunk: int, before: int, options: Options) -> Case:
    """A step of chunked prefill."""
    dtype, device = options.pick(torch.bfloat16), options.device
    qo_lens, kv_lens = [1] * decodes + [chunk], [length] * decodes + [before + chunk]
    name = f"a chunk of {chunk} behind {before}, and {decodes} decodes of {length}"
    return _case("paged_attention", name, qo_lens, kv_lens, dtype, device, [])


def cases(options: Options) -> Iterator[Case]:
    ops = ("paged_attention", "ragged_attention")
    for batch, length in equal_shapes(options):
        for op in ops:
            yield prompts(op, batch, length, options)
    for batch, length in mixed_shapes(options):
        for op in ops:
            yield mixed_prompts(op, batch, length, options)
    for batch, length in equal_shapes(options):
        for op in ops:
            yield masked_prompts(op, batch, length, options)
    for shape in chunked_shapes(options):
        yield chunked(*shape, options)
