"""MLA decode (DeepSeek-V2, V3): weights absorbed, a paged cache of 512 + 64 numbers a token that all heads read.

Query heads 16 to 128, 1 to 4 rows a request (several: speculative decoding, causal), pages of 64, and fp8 caches. The cost is one
read of the requests' rows of the cache for all heads. Peers: torch on the gathered pages, all requests at once, by SDPA (keys 576
wide, values their first 512) and by two products and a softmax; FlashInfer's MLA wrapper with both of its templates where it is
installed, planned in the first, untimed call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fi_ops.library import SPECS

from . import stock
from .batches import indptr
from .harness import NAN, Candidate, Case, Options, copies_beyond_caches, within_budget

SPEC, DENSE = SPECS["mla_paged_attention"], SPECS["attention"]
CKV, KPE, PAGE_SIZE = 512, 64, 64
SCALE = (128 + 64) ** -0.5  # of the heads before absorption
FP8 = torch.float8_e4m3fn
CHECKED_REQUESTS = 2


@dataclass(frozen=True)
class Shape:
    batch: int
    length: int
    heads: int
    rows: int = 1
    fp8: bool = False


CPU = [Shape(1, 2048, 16), Shape(4, 1024, 128), Shape(4, 1024, 16, rows=2)]
CUDA = [
    Shape(64, 4096, 128), Shape(64, 4096, 16), Shape(16, 8192, 128), Shape(1, 8192, 128), Shape(128, 1024, 128),
    Shape(64, 4096, 64), Shape(64, 4096, 32), Shape(16, 8192, 16), Shape(64, 1024, 128), Shape(64, 16384, 128),
    Shape(64, 4096, 128, rows=2), Shape(64, 4096, 16, rows=4), Shape(64, 4096, 128, fp8=True), Shape(64, 4096, 16, fp8=True),
]  # fmt: skip
# On an H100: TFLOP/s, or GB/s.
TARGET_TFLOPS = {Shape(64, 4096, 128): 580, Shape(16, 8192, 128): 550}
TARGET_GB_S = {Shape(64, 4096, 16): 2850}


def shapes(options: Options) -> list[Shape]:
    if options.batch or options.length:
        return [Shape(options.batch or 4, options.length or 1024, heads) for heads in (16, 128)]
    found = CPU if options.device == "cpu" else CUDA
    return found[:3] if options.quick else found


def _arguments(shape: Shape, dtype: torch.dtype, device: str) -> tuple:
    """Of `mla_paged_attention`, up to scale; both caches are views of one tensor, pages scattered over it."""
    pages = -(-shape.length // PAGE_SIZE)
    query = torch.randn(shape.batch * shape.rows, shape.heads, CKV + KPE, device=device).to(dtype)
    cache = torch.randn(shape.batch * pages, PAGE_SIZE, CKV + KPE, device=device).to(dtype)
    cache = cache.to(FP8) if shape.fp8 else cache
    indices = torch.randperm(shape.batch * pages, device=device).int()
    last = torch.full((shape.batch,), (shape.length - 1) % PAGE_SIZE + 1, dtype=torch.int32, device=device)
    tables = indptr([shape.rows] * shape.batch, device), indices, indptr([pages] * shape.batch, device), last
    return query[..., :CKV], query[..., CKV:], cache[..., :CKV], cache[..., CKV:], *tables, SCALE


def _whole(nope: torch.Tensor, pe: torch.Tensor) -> torch.Tensor:
    """Both parts side by side, as they lie in memory."""
    return nope.as_strided((*nope.shape[:2], CKV + KPE), nope.stride(), nope.storage_offset())


def _copies(arguments: tuple, nbytes: int) -> list[tuple]:
    tensors = _whole(*arguments[:2]), _whole(*arguments[2:4])
    return [
        (query[..., :CKV], query[..., CKV:], cache[..., :CKV], cache[..., CKV:], *arguments[4:])
        for query, cache in copies_beyond_caches(tensors, nbytes)
    ]


def _dense(arguments: tuple, shape: Shape, requests: slice = slice(None)) -> tuple[torch.Tensor, ...]:
    """Query, key, value of some requests as SDPA has them: one KV head, pages gathered, fp8 widened."""
    query, cache, indices = _whole(*arguments[:2]), _whole(*arguments[2:4]), arguments[5]
    rows = cache.view(torch.uint8) if shape.fp8 else cache  # torch gathers no 8-bit floats
    gathered = rows[indices.view(shape.batch, -1)[requests]].view(cache.dtype).flatten(1, 2)[:, : shape.length]
    key = gathered.to(query.dtype)[:, None]
    query = query.unflatten(0, (shape.batch, shape.rows))[requests].transpose(1, 2)
    return query, key, key[..., :CKV]


def _mask(shape: Shape, device: torch.device) -> torch.Tensor | None:
    """bool `[rows, length]`: each row sees all before it."""
    if shape.rows == 1:
        return None
    seen = torch.ones(shape.rows, shape.length, dtype=torch.bool, device=device)
    return seen.tril(shape.length - shape.rows)


def _sdpa(shape: Shape, device: str) -> Callable:
    mask = _mask(shape, torch.device(device))

    def attend(*arguments):
        query, key, value = _dense(arguments, shape)
        out = F.scaled_dot_product_attention(query, key, value, mask, scale=SCALE, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def _wide_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """In float32: scores of 16 bits cost more than the error budget. (On a CPU torch has no product with a wider output.)"""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())


def _products(shape: Shape, device: str) -> Callable:
    """Two products of matrices, all heads of a request at once, and a softmax between them."""
    mask = _mask(shape, torch.device(device))

    def attend(*arguments):
        query, key, value = _dense(arguments, shape)
        scores = _wide_bmm(query.flatten(1, 2), key[:, 0].transpose(1, 2)).unflatten(1, query.shape[1:3])
        scores = scores.mul_(SCALE) if mask is None else scores.mul_(SCALE).masked_fill_(~mask, -float("inf"))
        out = torch.bmm(scores.softmax(-1).to(query.dtype).flatten(1, 2), value[:, 0])
        return out.unflatten(1, query.shape[1:3]).transpose(1, 2).flatten(0, 1)

    return attend


def _check(arguments: tuple, shape: Shape) -> Callable[[object], str]:
    """All heads and rows of the first requests and the last, by the dense reference."""
    mask, wide, same = _mask(shape, arguments[0].device), [], []
    ends = [slice(0, CHECKED_REQUESTS), slice(shape.batch - CHECKED_REQUESTS, None)]
    chosen = ends if shape.batch > 2 * CHECKED_REQUESTS else [slice(None)]
    for requests in chosen:
        tensors = _dense(arguments, shape, requests)
        for outputs, cast in ((wide, torch.Tensor.double), (same, lambda t: t)):
            out = DENSE.reference(*map(cast, tensors), mask, scale=SCALE)
            outputs.append(out.transpose(1, 2))
    return within_budget(
        torch.cat(wide),
        torch.cat(same),
        lambda out: torch.cat([out.unflatten(0, (shape.batch, shape.rows))[requests] for requests in chosen]),
    )


def _flashinfer(copies: list[tuple], shape: Shape) -> list[Candidate]:
    library = stock.flashinfer()
    if library is None or copies[0][0].device.type != "cuda" or shape.fp8:
        return []

    def peer(backend: str) -> Candidate:
        @functools.cache
        def planned():
            q_nope, _, ckv, _, qo_indptr, indices, kv_indptr, *_ = copies[0]
            workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=q_nope.device)
            wrapper = library.mla.BatchMLAPagedAttentionWrapper(workspace, backend=backend)
            lengths = torch.full((shape.batch,), shape.length, dtype=torch.int32, device=q_nope.device)
            sizes = (shape.heads, CKV, KPE, PAGE_SIZE, shape.rows > 1, SCALE, q_nope.dtype, ckv.dtype)
            wrapper.plan(qo_indptr, kv_indptr, indices, lengths, *sizes)
            return wrapper

        return Candidate(f"FlashInfer {backend.upper()}", lambda *a: planned().run(*a[:4]), inputs=copies)

    return [peer(backend) for backend in stock.flashinfer_backends()]


def _target(shape: Shape, cost) -> float:
    if shape in TARGET_TFLOPS:
        return cost.flops / TARGET_TFLOPS[shape] * 1e-6
    return cost.bytes / TARGET_GB_S[shape] * 1e-3 if shape in TARGET_GB_S else NAN


def case(shape: Shape, options: Options) -> Case:
    dtype, device, causal = options.pick(torch.bfloat16), options.device, shape.rows > 1
    arguments = _arguments(shape, dtype, device)
    cost = SPEC.cost(*arguments, causal=causal)
    copies = _copies(arguments, cost.bytes)
    rows = f", {shape.rows} rows" if causal else ""
    return Case(
        f"h={shape.heads}, B={shape.batch} n={shape.length}{rows}, {str(FP8 if shape.fp8 else dtype).removeprefix('torch.')}",
        [
            Candidate("torch, gather + SDPA", _sdpa(shape, device), inputs=copies),
            Candidate("torch, gather + products", _products(shape, device), inputs=copies),
            *_flashinfer(copies, shape),
            Candidate("fi_ops", functools.partial(SPEC.overload, causal=causal), ours=True, inputs=copies),
        ],
        cost,
        _check(arguments, shape),
        dtype,
        target_us=_target(shape, cost) if device == "cuda" and dtype == torch.bfloat16 else NAN,
        series=f"h={shape.heads}, B={shape.batch}{rows}" if not shape.fp8 else "",
        length=shape.length,
    )


def cases(options: Options) -> Iterator[Case]:
    for shape in shapes(options):
        yield case(shape, options)
