"""Paged KV caches of 8 KV heads x 128, pages of 16 tokens: appends of a decode step and of a prefill, copies, index tensors.

Peers are what stock torch makes of the same table: gather the tokens' pages, then index_put; index_select into the copies.
The ceiling is what the ops' specs say: each token, or page, read once and written once. Calls go over copies beyond the caches
where a call moves much; a decode step's tokens have just been written, in a model too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from fi_ops.library import SPECS, Sample
from fi_ops.testing import clone_sample, outputs_of

from . import stock
from .harness import Candidate, Case, Options, copies_beyond_caches

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
BATCH, KV_LEN = 64, 500


def torch_append(append_key, append_value, batch_indices, positions, k_cache, v_cache, kv_indices, kv_indptr, last):
    pages, entries = kv_indices[kv_indptr[batch_indices] + positions // PAGE_SIZE], positions % PAGE_SIZE
    k_cache[pages, entries], v_cache[pages, entries] = append_key.to(k_cache.dtype), append_value.to(v_cache.dtype)
    return k_cache, v_cache


def torch_rope_append(query, append_key, append_value, cos_sin_cache, batch_indices, positions, *paged):
    cos, sin = (t.repeat(1, 2)[:, None] for t in cos_sin_cache[positions].chunk(2, -1))

    def rotated(x):
        low, high = x.float().chunk(2, -1)
        return (x.float() * cos + torch.cat((-high, low), -1) * sin).to(x.dtype)

    return rotated(query), *torch_append(rotated(append_key), append_value, batch_indices, positions, *paged)


def torch_copy_pages(k_cache, v_cache, src_pages, dst_pages):
    for cache in (k_cache, v_cache):
        cache[dst_pages] = cache[src_pages]
    return k_cache, v_cache


def torch_batch_indices_positions(append_indptr, seq_lens, nnz):
    tokens = torch.arange(nnz, device=append_indptr.device)
    batch_indices = torch.searchsorted(append_indptr, tokens, right=True) - 1
    return batch_indices, seq_lens[batch_indices] - (append_indptr[batch_indices + 1] - tokens)


def torch_seq_lens(kv_indptr, last, page_size):
    return (kv_indptr.diff() - 1).clamp(min=0) * page_size + last


def _append(appended: list[int], lengths: list[int], dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """The arguments of `append_paged_kv_cache`: the last `appended` of requests of `lengths`, pages scattered."""
    counts = [-(-n // PAGE_SIZE) for n in lengths]
    indptr, ends = (torch.tensor([0, *x]).cumsum(0).int() for x in (counts, appended))
    last = torch.tensor(lengths).int() - (indptr.diff() - 1) * PAGE_SIZE
    kv_indices = torch.randperm(sum(counts)).int()
    tokens = SPECS["get_batch_indices_positions"].reference(ends, torch.tensor(lengths), sum(appended))
    new = [torch.randn(sum(appended), NUM_KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2)]
    caches = [torch.zeros(sum(counts), PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM, dtype=dtype) for _ in range(2)]
    return tuple(t.to(device) for t in (*new, *tokens, *caches, kv_indices, indptr, last))


def jobs(options: Options, dtype: torch.dtype) -> Iterator[tuple[str, str, tuple, Callable, int]]:
    """(name, op, its arguments, stock torch's way, copies of the arguments at most)."""
    device, few = options.device, 2**20
    tokens = options.length or (8192 if device == "cuda" else 2048)
    batch = options.batch or BATCH
    yield (
        f"append, decode, B={batch}",
        "append_paged_kv_cache",
        _append([1] * batch, [KV_LEN] * batch, dtype, device),
        torch_append,
        8,
    )
    prefill = _append([tokens], [tokens], dtype, device)
    yield f"append, prefill of {tokens}", "append_paged_kv_cache", prefill, torch_append, few
    eight = (*prefill[:4], *(t.to(torch.float8_e4m3fn) for t in prefill[4:6]), *prefill[6:])
    yield f"append, prefill of {tokens}, float8_e4m3fn", "append_paged_kv_cache", eight, torch_append, few
    angles = torch.rand(tokens, HEAD_DIM // 2, device=device) * 6.3
    query = torch.randn(tokens, NUM_QO_HEADS, HEAD_DIM, device=device).to(dtype)
    rope = (query, *prefill[:2], torch.cat((angles.cos(), angles.sin()), -1), *prefill[2:])
    yield f"rope and append, prefill of {tokens}", "rope_append_paged_kv_cache", rope, torch_rope_append, few
    pages = tokens // PAGE_SIZE
    src, dst = torch.randperm(pages, device=device)[: pages // 2 * 2].int().chunk(2)
    yield f"copy of {len(src)} pages", "copy_pages", (*prefill[4:6], src, dst), torch_copy_pages, few
    ends = (torch.arange(batch + 1, device=device) * tokens // batch).int()
    lens = ends.diff() + KV_LEN
    tokens_of = (ends, lens, tokens)
    yield (
        f"{tokens} tokens of {batch} requests",
        "get_batch_indices_positions",
        tokens_of,
        torch_batch_indices_positions,
        8,
    )
    table = _append([0] * batch, [KV_LEN] * batch, dtype, device)[7:9]
    yield f"lengths of {batch} requests", "get_seq_lens", (*table, PAGE_SIZE), torch_seq_lens, 8


def ours(op: str, *args):
    """The op; what it wrote where it returns nothing, as the peers do."""
    return tuple(outputs_of(SPECS[op], SPECS[op].overload, Sample(args)).values())


def same_as(op: str, args: tuple) -> Callable[[object], str]:
    """Check against the reference on a copy: bit for bit; rotated rows by a rounding of their dtype."""
    spec = SPECS[op]
    expected = tuple(outputs_of(spec, spec.reference, clone_sample(Sample(args))).values())

    def check(output) -> str:
        got = output if isinstance(output, tuple) else (output,)
        for mine, theirs in zip(got, expected, strict=True):
            apart = (mine.double() - theirs.double()).abs().max().item()
            if apart > (0 if spec.exact else 2 * torch.finfo(mine.dtype).eps * theirs.double().abs().max().item()):
                return f"differs by {apart:.2g}"
        return "ok"

    return check


def cases(options: Options) -> Iterator[Case]:
    dtype = options.pick(torch.bfloat16)
    for name, op, args, peer, at_most in jobs(options, dtype):
        cost = SPECS[op].cost(*args)
        copies = copies_beyond_caches(args, cost.bytes, at_most=at_most)
        yield Case(
            f"{name}, {str(dtype).removeprefix('torch.')}",
            [
                *stock.eager_and_compiled("torch", peer, copies, options),
                Candidate("fi_ops", functools.partial(ours, op), ours=True, inputs=copies),
            ],
            cost,
            same_as(op, args),
            dtype,
        )
