"""Attention of 8-bit queries, keys and values (float8_e4m3fn): prompts, dense, ragged and paged, and decode over pages.

Outputs are bfloat16. Beside ours: ours in bfloat16, which shows what 8 bits gain; torch's SDPA of the tensors widened in the call;
FlashInfer where it is installed, its fp8 kernels for prompts, bfloat16 queries over the fp8 cache for decode. The share of the
GEMM ceiling is of bfloat16's, so it may be up to 200%.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch

from fi_ops.library import SPECS

from . import batches, stock
from .batches import PAGE_SIZE
from .bench_single_prefill import SPEC, Shape, some_rows
from .harness import NAN, Candidate, Case, Options, copies_beyond_caches, within_budget

FP8, WIDE = torch.float8_e4m3fn, torch.bfloat16
OPS = ("ragged_attention", "paged_attention")
TARGET_TFLOPS = {Shape(16384, False): 950}  # on an H100


def _wide(copies: list[tuple], count: int = 3) -> list[tuple]:
    """The same arguments with the first `count` of them, tensors of 8 bits, in bfloat16."""
    return [(*(t.to(WIDE) for t in arguments[:count]), *arguments[count:]) for arguments in copies]


# ---- dense prompts


def _ours(query, key, value, causal):
    return torch.ops.fi.attention(query, key, value, causal=causal)


def _widened_sdpa(query, key, value, causal):
    return stock.sdpa(*(t.to(WIDE) for t in (query, key, value)), causal)


def _check(query, key, value, causal: bool) -> Callable[[object], str]:
    """By the reference on some rows of every head, a KV head at a time."""
    rows = some_rows(query.shape[2]).to(query.device)
    seen = rows[:, None] >= torch.arange(key.shape[2], device=query.device) if causal else None
    some, group = query.to(WIDE)[:, :, rows].to(FP8), query.shape[1] // key.shape[1]
    exact, same = [], []
    for head in range(key.shape[1]):
        parts = some[:, head * group :][:, :group], key[:, head : head + 1], value[:, head : head + 1]
        exact.append(SPEC.reference(*(t.double() for t in parts), seen))
        same.append(SPEC.reference(*parts, seen))
    return within_budget(torch.cat(exact, 1), torch.cat(same, 1), lambda out: out[:, :, rows])


def dense(shape: Shape, options: Options) -> Case:
    def rand(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, heads, shape.length, width, device=options.device).to(FP8)

    tensors = (
        rand(shape.heads[0], shape.dims[0]),
        rand(shape.heads[1], shape.dims[0]),
        rand(shape.heads[1], shape.dims[1]),
    )
    cost = SPEC.cost(*tensors, causal=shape.causal)
    copies = copies_beyond_caches((*tensors, shape.causal), cost.bytes, at_most=4)
    peers = [Candidate("torch, widened + SDPA", _widened_sdpa, inputs=copies)]
    if options.device == "cuda" and stock.flashinfer():
        peers += stock.flashinfer_peers(copies, shape.causal)
    aimed_at = TARGET_TFLOPS.get(shape) if options.device == "cuda" else None
    return Case(
        f"dense, {shape.model}, n={shape.length} {shape.kind}",
        [
            *peers,
            Candidate("fi.* in bfloat16", _ours, inputs=_wide(copies)),
            Candidate("fi_ops", _ours, ours=True, inputs=copies),
        ],
        cost,
        _check(*tensors, shape.causal),
        WIDE,
        target_us=cost.flops / aimed_at * 1e-6 if aimed_at else NAN,
        series=f"dense, {shape.model}, {shape.kind}",
        length=shape.length,
    )


# ---- batches


def batch(op: str, name: str, qo_lens: list[int], kv_lens: list[int], options: Options, length: float = NAN) -> Case:
    """Prompts, chunks (causal) or, one query a request, decode."""
    paged, decode = op == "paged_attention", max(qo_lens) == 1
    arguments = (batches.paged if paged else batches.ragged)(qo_lens, kv_lens, FP8, options.device)
    causal = not decode
    cost = SPECS[op].cost(*arguments, causal=causal)
    copies = copies_beyond_caches((*arguments, batches.planned(arguments, causal)), cost.bytes, at_most=4)
    ours = batches.ours(op, causal)
    kind = op.partition("_")[0]
    return Case(
        f"{kind}, {name}",
        [
            batches.torch_peer(copies, qo_lens, kv_lens, causal),
            *batches.flashinfer_peers(_wide(copies, 1) if decode else copies, causal, decode),
            Candidate("fi.* in bfloat16", ours, inputs=_wide(copies)),
            Candidate("fi_ops", ours, ours=True, inputs=copies),
        ],
        cost,
        batches.check_requests(arguments, qo_lens, kv_lens, causal),
        WIDE,
        series=f"{kind}, B={len(qo_lens)}",
        length=length,
    )


def makers(options: Options) -> list[Callable[[], Case]]:
    appends: list[tuple[int, int, int]] = []
    if options.length:
        size = options.batch or 2
        shapes, equal = [Shape(options.length, causal) for causal in (True, False)], [(size, options.length)]
        decodes = [(size, options.length)]
    elif options.device == "cpu":
        lengths = (128,) if options.quick else (512, 2048)
        shapes = [Shape(n, causal) for n in lengths for causal in (True, False)]
        equal, decodes = (
            [(2, 128)] if options.quick else [(4, 512)],
            [(4, 512)] if options.quick else [(1, 4096), (8, 2048)],
        )
    else:
        shapes = [Shape(16384, False), Shape(4096, True), Shape(4096, False), Shape(1024, True), Shape(16384, True)]
        shapes += [Shape(n, True, dims=(64, 64)) for n in (4096, 16384)]
        equal, decodes = [(1, 4096), (16, 1024), (1, 16384)], [(16, 4096), (64, 8192), (1, 2048)]
        appends = [(8, 128, 8192)]
        if options.quick:
            shapes, equal, decodes, appends = shapes[:2], equal[:1], decodes[:1], []
    made: list[Callable[[], Case]] = [partial(dense, shape, options) for shape in shapes]
    for (size, n), op in itertools.product(equal, OPS):
        made.append(partial(batch, op, f"B={size} n={n} causal", [n] * size, [n] * size, options, n))
    for size, rows, n in appends:
        made.append(
            partial(batch, OPS[1], f"B={size}, the last {rows} of {n} tokens", [rows] * size, [n] * size, options)
        )
    for size, n in decodes:
        made.append(
            partial(batch, OPS[1], f"decode, B={size} n={n}, pages of {PAGE_SIZE}", [1] * size, [n] * size, options)
        )
    return made
