"""A grid of shapes: `fi::attention` against stock torch's kernels, to find where stock is faster.

The rule that leaves a site to stock is read off this bench's CSV. A case's name is its shape, `key=value` with blanks between:
kind (full; causal: query and key alike long; masked: a bool mask `[batch, 1, qo_len, kv_len]`, causal over half of the
slots), batch, heads (query/KV), head_dim, qo_len, kv_len. Not part of `all`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from fi_ops.library import SPECS

from . import stock
from .harness import Candidate, Case, Options, copies_beyond_caches, within_budget

SPEC = SPECS["attention"]
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
KEYS = (256, 1024, 4096, 16384)


@dataclass(frozen=True)
class Shape:
    kind: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    qo_len: int
    kv_len: int

    def __str__(self) -> str:
        return (
            f"kind={self.kind} batch={self.batch} heads={self.heads}/{self.kv_heads} head_dim={self.head_dim} "
            f"qo_len={self.qo_len} kv_len={self.kv_len}"
        )


def grid(options: Options) -> list[Shape]:
    """Few query rows in small steps, then every axis around the commonest model shape (32/8 heads of 128)."""
    if options.quick:
        return [Shape(kind, 1, 8, 2, 64, 64, 64) for kind in ("full", "causal", "masked")]
    pairs = [(q, k) for q in ROWS for k in KEYS if q <= k]
    shapes = [Shape("full", 1, 32, 8, 128, q, k) for q, k in pairs]
    shapes += [Shape("full", 1, 32, 32, 128, q, k) for q, k in pairs if q in (1, 256, 4096)]
    shapes += [Shape("full", 1, 32, 8, d, q, k) for d in (64, 256) for q, k in pairs if q in (1, 16, 256, 4096)]
    shapes += [
        Shape("full", 16, 32, kv_heads, 128, q, k) for kv_heads in (8, 32) for q in (1, 16) for k in (1024, 4096)
    ]
    shapes += [Shape("causal", 1, 32, 8, d, n, n) for d in (64, 128, 256) for n in KEYS]
    shapes += [Shape("causal", 1, 32, 32, 128, n, n) for n in KEYS]
    shapes += [Shape("causal", 8, 32, 8, 128, n, n) for n in (256, 1024, 4096)]
    shapes += [Shape("masked", 1, 32, 8, 128, q, k) for q, k in pairs if q in (1, 16, 256, 1024, 4096) and k > 256]
    shapes += [Shape("masked", 1, 32, 8, d, q, 4096) for d in (64, 256) for q in (1, 256, 4096)]
    shapes += [Shape("masked", 16, 32, 8, 128, q, 4096) for q in (1, 16)]
    return shapes


def _mask(shape: Shape, device: str) -> torch.Tensor:
    """Query rows end where the live half of the slots (or as much as the rows need) ends; the rest is empty."""
    live = max(shape.kv_len // 2, shape.qo_len)
    position = torch.arange(live - shape.qo_len, live, device=device)[:, None]
    mask = torch.arange(shape.kv_len, device=device) <= position
    return mask[None, None].expand(shape.batch, 1, -1, -1).contiguous()


def _check(query, key, value, *rest, causal: bool):
    """By the reference on the last sequence and KV head, up to 256 last query rows."""
    group, rows = query.shape[1] // key.shape[1], min(256, query.shape[2])
    some = [query[-1:, -group:, -rows:], key[-1:, -1:], value[-1:, -1:]]
    mask = rest[0][-1:, :, -rows:] if rest else None
    expected = SPEC.reference(*(t.double() for t in some), mask, causal=causal)
    same = SPEC.reference(*some, mask, causal=causal)
    return within_budget(expected, same, lambda out: out[-1:, -group:, -rows:])


def _causal(query, key, value):
    return stock.sdpa(query, key, value, True)


def _ours_causal(query, key, value):
    return torch.ops.fi.attention(query, key, value, causal=True)


def cases(options: Options) -> Iterator[Case]:
    dtype, device = options.pick(torch.bfloat16), options.device
    for shape in grid(options):
        query = torch.randn(shape.batch, shape.heads, shape.qo_len, shape.head_dim, device=device, dtype=dtype)
        key, value = (
            torch.randn(shape.batch, shape.kv_heads, shape.kv_len, shape.head_dim, device=device, dtype=dtype)
            for _ in range(2)
        )
        inputs: tuple = (query, key, value)
        theirs, ours = stock.sdpa, torch.ops.fi.attention.default
        if shape.kind == "causal":
            theirs, ours = _causal, _ours_causal
        if shape.kind == "masked":
            inputs, theirs = (*inputs, _mask(shape, device)), stock.sdpa_masked
        copies = copies_beyond_caches(inputs, key.nbytes + value.nbytes, beyond=2**27, at_most=24)
        peers = [stock.eager("torch", stock.sdpa_repeat_kv if shape.kind == "masked" else theirs, copies)]
        if device == "cuda":
            if shape.kind != "masked":
                held = stock.with_backend(SDPBackend.FLASH_ATTENTION, theirs)
                peers.append(stock.eager("torch flash", held, copies))
            held = stock.with_backend(SDPBackend.CUDNN_ATTENTION, theirs)
            peers.append(stock.eager("torch cuDNN", held, copies))
        yield Case(
            str(shape),
            [*peers, Candidate("fi_ops", ours, ours=True, inputs=copies)],
            SPEC.cost(query, key, value, causal=shape.kind == "causal"),
            _check(*inputs, causal=shape.kind == "causal"),
            dtype,
            brief=True,
        )
