"""Batches for the benches of paged and ragged attention: their tensors, their checks, and who else does the job.

32 query heads, 8 KV heads, head_dim 128; pages scattered over the cache. Peers: torch SDPA, a call for each request, with the
gather of its pages that it needs, and FlashInfer's wrappers where they are installed, planned before the clock starts.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from fi_ops.library import SPECS

from . import stock
from .harness import Candidate, within_budget

QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
GROUP = QUERY_HEADS // KV_HEADS
DENSE = SPECS["attention"]
CHECKED_ROWS = 256


def indptr(counts: Sequence[int], device: str) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)


def _rand(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype).to(dtype)


def paged(qo_lens, kv_lens, dtype, device, page_size=PAGE_SIZE, kv_dtype=None) -> tuple[torch.Tensor, ...]:
    """The arguments of `paged_attention`, up to kv_last_page_len."""
    counts = [-(-n // page_size) for n in kv_lens]
    query = _rand(sum(qo_lens), QUERY_HEADS, HEAD_DIM, dtype=dtype, device=device)
    shape = (sum(counts), page_size, KV_HEADS, HEAD_DIM)
    caches = [_rand(*shape, dtype=kv_dtype or dtype, device=device) for _ in range(2)]
    pages = torch.randperm(sum(counts), device=device).int()
    last = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in kv_lens], dtype=torch.int32, device=device)
    return query, *caches, indptr(qo_lens, device), pages, indptr(counts, device), last


def ragged(qo_lens, kv_lens, dtype, device) -> tuple[torch.Tensor, ...]:
    """The arguments of `ragged_attention`, up to kv_indptr."""
    query = _rand(sum(qo_lens), QUERY_HEADS, HEAD_DIM, dtype=dtype, device=device)
    key, value = (_rand(sum(kv_lens), KV_HEADS, HEAD_DIM, dtype=dtype, device=device) for _ in range(2))
    return query, key, value, indptr(qo_lens, device), indptr(kv_lens, device)


def is_paged(arguments: tuple) -> bool:
    return arguments[1].dim() == 4


def planned(arguments: tuple, causal: bool) -> torch.Tensor:
    """The plan of `paged_attention(*arguments)` or `ragged_attention(*arguments)`."""
    query, key, _, qo_indptr, *table = arguments
    kv_indptr, last, page_size = (table[1], table[2], key.shape[1]) if is_paged(arguments) else (table[0], None, 1)
    return torch.ops.fi.batch_attention_plan(qo_indptr, kv_indptr, last, query.shape[0], GROUP, page_size, causal)


def ours(op: str, causal: bool) -> Callable:
    """The op over (its arguments, plan): plan None makes it inside."""
    call = getattr(torch.ops.fi, op).default
    return lambda *arguments: call(*arguments[:-1], plan=arguments[-1], causal=causal)


# ------------------------------------------------------------------------------------------------ requests one by one


def keys_of(arguments: tuple, b: int, kv_lens: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Keys and values of request b, `[kv_len, num_kv_heads, head_dim]`."""
    key, value = arguments[1:3]
    if not is_paged(arguments):
        begin = sum(kv_lens[:b])
        return key[begin : begin + kv_lens[b]], value[begin : begin + kv_lens[b]]
    size = key.shape[1]
    first = sum(-(-n // size) for n in kv_lens[:b])
    pages = arguments[4][first : first - (-kv_lens[b] // size)]
    return tuple(t.index_select(0, pages).flatten(0, 1)[: kv_lens[b]] for t in (key, value))


@functools.cache
def bottom_right(qo_len: int, kv_len: int, device: torch.device) -> torch.Tensor:
    """The mask of a chunk that sees all before it, made once."""
    return torch.ones(qo_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - qo_len)


def per_request(qo_lens: Sequence[int], kv_lens: Sequence[int], causal: bool) -> Callable:
    """torch SDPA for each request; its pages are gathered, fp8 widened to query's dtype, or bfloat16 where that is fp8, too."""

    def attend(*arguments):
        query, outputs = arguments[0], []
        dtype = query.dtype if query.dtype.itemsize > 1 else torch.bfloat16
        for b, qo_len in enumerate(qo_lens):
            begin = sum(qo_lens[:b])
            parts = (query[begin : begin + qo_len], *keys_of(arguments, b, kv_lens))
            q, k, v = (t.to(dtype).transpose(0, 1)[None] for t in parts)
            if query.device.type == "cpu":  # twice as fast there, copies counted
                k, v = k.contiguous(), v.contiguous()
            chunk = causal and 1 < qo_len < kv_lens[b]  # torch's causal is top-left
            mask = bottom_right(qo_len, kv_lens[b], q.device) if chunk else None
            top_left = causal and qo_len == kv_lens[b]
            out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=top_left, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend


def check_requests(arguments: tuple, qo_lens: Sequence[int], kv_lens: Sequence[int], causal: bool) -> Callable:
    """Of the first, the last and the longest request, the last group of heads, the first and the last rows: by the reference.

    float64 scores of all of a long prompt would not fit. A candidate of another job at the same cost returns None.
    """
    chosen = sorted({0, len(qo_lens) - 1, max(range(len(kv_lens)), key=kv_lens.__getitem__)})
    rows, wide, same = [], [], []
    for b in chosen:
        begin, qo_len, kv_len = sum(qo_lens[:b]), qo_lens[b], kv_lens[b]
        count = min(CHECKED_ROWS, qo_len)
        key, value = (t[:, -1:].to(arguments[0].dtype).transpose(0, 1)[None] for t in keys_of(arguments, b, kv_lens))
        for first in dict.fromkeys((0, qo_len - count)):
            seen = kv_len - (qo_len - first - count) if causal else kv_len
            rows.append(torch.arange(begin + first, begin + first + count))
            query = arguments[0][begin + first : begin + first + count, -GROUP:].transpose(0, 1)[None]
            parts = (query, key[:, :, :seen], value[:, :, :seen])
            for outputs, cast in ((wide, torch.Tensor.double), (same, lambda t: t)):
                outputs.append(DENSE.reference(*map(cast, parts), causal=causal)[0].transpose(0, 1))
    index = torch.cat(rows).to(arguments[0].device)
    within = within_budget(torch.cat(wide), torch.cat(same), lambda out: out[index, -GROUP:])
    return lambda out: "-" if out is None else within(out)


# ------------------------------------------------------------------------------------------------ peers


def torch_peer(copies: list[tuple], qo_lens, kv_lens, causal: bool) -> Candidate:
    name = "torch, gather + SDPA a request" if is_paged(copies[0]) else "torch SDPA a request"
    return Candidate(name, per_request(qo_lens, kv_lens, causal), inputs=copies)


def same_work(copies: list[tuple], name: str = "fi.attention, same work") -> Candidate:
    """Our dense op over (query, key, value, causal) that cost what the batch costs; its output is none of the batch's."""

    def attend(query, key, value, causal):
        torch.ops.fi.attention(query, key, value, causal=causal)

    return Candidate(name, attend, inputs=copies)


def flashinfer_peers(copies: list[tuple], causal: bool, decode: bool) -> list[Candidate]:
    """Its wrappers for the batch, planned in the first, untimed call; nothing where it is not installed."""
    library = stock.flashinfer()
    if library is None or copies[0][0].device.type != "cuda":
        return []

    def peer(name: str, backend: str) -> Candidate:
        planned = functools.cache(_flashinfer_planned(library, copies[0], causal, decode, backend))
        return Candidate(name, lambda *arguments: planned()(*arguments), inputs=copies)

    if decode:
        return [peer("FlashInfer", "auto")]
    backends = stock.flashinfer_backends()
    if copies[0][0].dtype.itemsize == 1:
        backends = backends[1:]  # FA2 has no kernels for fp8 queries
    return [peer(f"FlashInfer {backend.upper()}", backend) for backend in backends]


def flashinfer_plan(arguments: tuple, causal: bool, decode: bool) -> list[Candidate]:
    """What its plan, on the host, takes."""
    library = stock.flashinfer()
    if library is None or arguments[0].device.type != "cuda":
        return []

    def plan():
        made()  # (returns the call, which is not what is checked)

    made = _flashinfer_planned(library, arguments, causal, decode)
    return [Candidate("FlashInfer's plan()", plan, capture=False)]


def _flashinfer_planned(library, arguments: tuple, causal: bool, decode: bool, backend: str = "auto") -> Callable:
    """What plans, and returns the call over inputs like `arguments`."""
    query, key, _, qo_indptr, *table = arguments
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=query.device)
    sizes = (QUERY_HEADS, KV_HEADS, HEAD_DIM)
    dtypes, scales = dict(q_data_type=query.dtype, kv_data_type=key.dtype), ()
    if query.dtype.itemsize == 1:  # as its kernels want them: one a head, by position
        dtypes["o_data_type"] = torch.bfloat16
        scales = tuple(torch.ones(n, device=query.device) for n in (QUERY_HEADS, KV_HEADS, KV_HEADS))
    if not is_paged(arguments):
        wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend=backend)

        def plan():
            wrapper.plan(qo_indptr, table[0], *sizes, causal=causal, **dtypes)
            return lambda q, k, v, *_: wrapper.run(q, k, v, *scales)

        return plan
    pages, kv_indptr, last = table[:3]
    if decode:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)

        def plan():
            wrapper.plan(kv_indptr, pages, last, *sizes, key.shape[1], **dtypes)
            return lambda q, k, v, *_: wrapper.run(q, (k, v))

    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)

        def plan():
            wrapper.plan(qo_indptr, kv_indptr, pages, last, *sizes, key.shape[1], causal=causal, **dtypes)
            return lambda q, k, v, *_: wrapper.run(q, (k, v), *scales)

    return plan
