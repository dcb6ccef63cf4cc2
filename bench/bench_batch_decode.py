"""Decode of a batch over a paged cache: one new token a request, 32 query heads, 8 KV heads, head_dim 128.

Requests of one length, in pages of 16 (and 1, 64), with fp8 keys and values; of mixed lengths ("mixed": uniformly random, n on
average; "one long": one of 256 n among requests of n); a prefix that all share, read once ("shared prefix"); and the plan
itself, which a model makes once a step. The cost is one read of the requests' keys and values. "fi_ops" has its plan given,
as all layers of a step but the first have it. "fi.attention, same work": our dense op over as many keys and values, which lie
tokens first too, without pages, on requests of one length: what pages and lengths cost. (On a CPU heads first is faster by a
fifth, with pages and without.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fi_ops.library import SPECS, Cost

from . import batches
from .batches import HEAD_DIM, KV_HEADS, PAGE_SIZE, QUERY_HEADS
from .harness import NAN, Candidate, Case, Options, copies_beyond_caches

SPEC = SPECS["paged_attention"]
FP8 = torch.float8_e4m3fn
DTYPE = torch.bfloat16
# On an H100; those of decode are dense decode's.
PLAN_TARGET_US = 5.0
TARGET_US = {(1, 2048): 8.0, (1, 32768): 49.7, (16, 4096): 94.2, (128, 1024): 185.1, (64, 8192): 715.8}

# (batch, length, page size, dtype of the cache or None)
EQUAL_CPU = [(1, 4096, 16, None), (8, 2048, 16, None), (8, 2048, 1, None), (8, 2048, 16, FP8)]
EQUAL_CUDA = [
    *[(b, n, 16, None) for b, n in ((1, 2048), (1, 32768), (16, 4096), (128, 1024), (64, 8192))],
    *[(16, 4096, size, None) for size in (1, 64)],
    (64, 8192, 1, None),
    *[(b, n, 16, FP8) for b, n in ((16, 4096), (64, 8192))],
]
# (kind, batch, length)
MIXED_CPU = [("mixed", 16, 1024), ("one long", 32, 64)]
MIXED_CUDA = [("mixed", 64, 4096), ("mixed", 256, 1024), ("one long", 256, 512)]
# (batch, prefix, own tokens)
PREFIX_CPU, PREFIX_CUDA = [(16, 2048, 64)], [(64, 32768, 256)]


def equal_shapes(options: Options) -> list[tuple[int, int, int, torch.dtype | None]]:
    if options.batch or options.length:
        batch, length = options.batch or 16, options.length or 4096
        return [*((batch, length, size, None) for size in (16, 1)), (batch, length, 16, FP8)]
    shapes = EQUAL_CPU if options.device == "cpu" else EQUAL_CUDA
    return shapes[:2] if options.quick else shapes


def mixed_shapes(options: Options) -> list[tuple[str, int, int]]:
    if options.batch or options.length:
        batch, length = options.batch or 16, options.length or 512
        return [("mixed", batch, length), ("one long", batch, max(1, length // 16))]
    shapes = MIXED_CPU if options.device == "cpu" else MIXED_CUDA
    return shapes[-1:] if options.quick else shapes


def prefix_shapes(options: Options) -> list[tuple[int, int, int]]:
    if options.batch or options.length:
        return [(options.batch or 16, options.length or 4096, 64)]
    return PREFIX_CPU if options.device == "cpu" else PREFIX_CUDA


def lengths(kind: str, batch: int, length: int) -> list[int]:
    if kind == "one long":
        return [length] * (batch // 2) + [256 * length] + [length] * (batch - batch // 2 - 1)
    return torch.randint(1, 2 * length, (batch,)).tolist() if kind == "mixed" else [length] * batch


def _same_work(total: int, batch: int, dtype: torch.dtype, device: str) -> Candidate:
    """The dense op over `total` keys, as evenly as `batch` requests have them, and in the order that pages have."""
    query = torch.randn(batch, QUERY_HEADS, 1, HEAD_DIM, device=device, dtype=dtype)
    shape = (batch, max(1, round(total / batch)), KV_HEADS, HEAD_DIM)
    key, value = (torch.randn(*shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(2))
    return batches.same_work(copies_beyond_caches((query, key, value, False), key.nbytes + value.nbytes))


def attention(kind, kv_lens, page_size, kv_dtype, dtype, device) -> Case:
    batch, ones = len(kv_lens), [1] * len(kv_lens)
    arguments = batches.paged(ones, kv_lens, dtype, device, page_size, kv_dtype)
    cost = SPEC.cost(*arguments)
    copies = copies_beyond_caches((*arguments, batches.planned(arguments, causal=False)), cost.bytes)
    unplanned = [(*copy[:-1], None) for copy in copies]
    dense = [] if kv_dtype else [_same_work(sum(kv_lens), batch, dtype, device)]
    size = f"n={kv_lens[0]}" if kind == "decode" else f"{min(kv_lens)} to {max(kv_lens)} tokens"
    label = str(kv_dtype or dtype).removeprefix("torch.")
    op = batches.ours("paged_attention", causal=False)
    usual = kind == "decode" and page_size == PAGE_SIZE and not kv_dtype
    return Case(
        f"{kind}, B={batch} {size}, pages of {page_size}, {label}",
        [
            batches.torch_peer(copies, ones, kv_lens, causal=False),
            *batches.flashinfer_peers(copies, causal=False, decode=True),
            *dense,
            Candidate("fi_ops", op, ours=True, inputs=copies),
            Candidate("fi_ops, with the plan", op, ours=True, inputs=unplanned),
        ],
        cost,
        batches.check_requests(arguments, ones, kv_lens, causal=False),
        dtype,
        target_us=TARGET_US.get((batch, kv_lens[0]), NAN) if usual and device == "cuda" else NAN,
        series=f"{kind}, B={batch}" if usual else "",
        length=max(kv_lens),
    )


# ------------------------------------------------------------------------------------------------ a shared prefix


def cascade(query, k_cache, v_cache, level_0, level_1):
    """All queries over the prefix as one request's, each over its own pages, and the two merged."""
    op = torch.ops.fi.paged_attention_with_lse
    shared, own = (op(query, k_cache, v_cache, *level[:-1], plan=level[-1]) for level in (level_0, level_1))
    return torch.ops.fi.merge_state(*shared, *own)[0]


def _shared_prefix(batch: int, prefix: int, own: int, dtype: torch.dtype, device: str) -> Case:
    """Requests whose first `prefix` tokens lie in the same pages, and `own` more in pages of their own."""
    ones, size = [1] * batch, PAGE_SIZE
    shared_pages, own_pages = prefix // size, -(-own // size)
    query, k_cache, v_cache, qo_indptr, pages, _, _ = batches.paged(ones, [prefix] + [own] * batch, dtype, device)
    query, qo_indptr = query[:batch], qo_indptr[: batch + 1]
    common, rest = pages[:shared_pages], pages[shared_pages:].view(batch, own_pages)

    def table(rows: torch.Tensor, last: int, qo: torch.Tensor) -> list[torch.Tensor]:
        count, each = rows.shape
        lasts = torch.full((count,), last, dtype=torch.int32, device=device)
        return [qo, rows.flatten(), batches.indptr([each] * count, device), lasts]

    own_last = (own - 1) % size + 1
    flat = table(torch.cat([common.expand(batch, -1), rest], 1), own_last, qo_indptr)
    level_0 = table(common[None], size, batches.indptr([batch], device))
    level_1 = table(rest, own_last, qo_indptr)
    for level in (flat, level_0, level_1):
        level.append(batches.planned((query[: qo_indptr[-1]], k_cache, v_cache, *level), causal=False))
    keys = prefix + batch * own
    cost = Cost(
        bytes=2 * query.nbytes + 2 * keys * KV_HEADS * HEAD_DIM * k_cache.element_size(),
        flops=4 * batch * (prefix + own) * QUERY_HEADS * HEAD_DIM,
    )
    inputs = copies_beyond_caches((query, k_cache, v_cache), cost.bytes)
    arguments = (query, k_cache, v_cache, *flat[:-1])
    kv_lens = [prefix // size * size + own] * batch
    every = [(*tensors, *flat) for tensors in inputs]
    return Case(
        f"shared prefix of {prefix}, B={batch}, {own} own tokens, {str(dtype).removeprefix('torch.')}",
        [
            batches.torch_peer(every, ones, kv_lens, causal=False),
            *batches.flashinfer_peers(every, causal=False, decode=True),
            Candidate("fi.paged_attention, prefix read by each", batches.ours("paged_attention", False), inputs=every),
            Candidate("fi_ops", cascade, ours=True, inputs=[(*tensors, level_0, level_1) for tensors in inputs]),
        ],
        cost,
        batches.check_requests(arguments, ones, kv_lens, causal=False),
        dtype,
    )


# ------------------------------------------------------------------------------------------------ the plan


def _plan(kv_lens: list[int], dtype: torch.dtype, device: str) -> Case:
    """From the tensors of a step; nothing comes to the host."""
    arguments = batches.paged([1] * len(kv_lens), kv_lens, dtype, device)
    query, k_cache, _, qo_indptr, _, kv_indptr, last = arguments
    inputs = (qo_indptr, kv_indptr, last, query.shape[0], batches.GROUP, k_cache.shape[1])
    spec = SPECS["batch_attention_plan"]
    expected = spec.reference(*inputs)

    def check(plan) -> str:
        return "-" if plan is None else "ok" if torch.equal(plan, expected) else "is not the reference's plan"

    return Case(
        f"plan, B={len(kv_lens)}, {min(kv_lens)} to {max(kv_lens)} tokens",
        [
            *batches.flashinfer_plan(arguments, causal=False, decode=True),
            Candidate("fi_ops", spec.overload, ours=True, inputs=[inputs]),
        ],
        spec.cost(*inputs[:5]),
        check,
        dtype,
        target_us=PLAN_TARGET_US if device == "cuda" else NAN,
    )


def cases(options: Options) -> Iterator[Case]:
    dtype, device = options.pick(DTYPE), options.device
    for batch, length, page_size, kv_dtype in equal_shapes(options):
        yield attention("decode", [length] * batch, page_size, kv_dtype, dtype, device)
    for kind, batch, length in mixed_shapes(options):
        yield attention(kind, lengths(kind, batch, length), PAGE_SIZE, None, dtype, device)
    for batch, prefix, own in prefix_shapes(options):
        yield _shared_prefix(batch, prefix // PAGE_SIZE * PAGE_SIZE, own, dtype, device)
    for kind, batch, length in mixed_shapes(options)[-1:]:
        yield _plan([length], dtype, device)
        yield _plan(lengths(kind, batch, length), dtype, device)
