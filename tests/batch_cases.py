"""Batches of requests for the tests of the batch wrappers: their pages, and attention request by request over dense keys."""

from __future__ import annotations

import itertools

import pytest
import torch

import fi_ops
from fi_ops.library._reference import attend, rotate
from fi_ops.testing import assert_within_budget

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MIXED = [1, 5, 0, 9, 3], [40, 5, 30, 33, 70]  # decode, prefill, no query, append


def indptr(counts, dtype=torch.int32, device="cpu") -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=dtype, device=device)


def turned(x: torch.Tensor, positions: torch.Tensor, scale: float, theta: float) -> torch.Tensor:
    """Rotate-half RoPE of `x [len, heads, dim]`, angles in float64."""
    dim = x.shape[-1]
    angles = positions[:, None].double() / scale * theta ** (-torch.arange(0, dim, 2, device=x.device).double() / dim)
    return rotate(x.transpose(0, 1)[None], angles.cos()[None], angles.sin()[None], False, dim)[0].transpose(0, 1)


def attend_dense(
    q, k, v, *, causal=False, mask=None, window_left=-1, sm_scale=None, logits_soft_cap=0.0, alibi_slopes=None, sinks=None,
    rope=None, logits_scale=1.0, v_scale=1.0,
):  # fmt: skip
    """Attention from its definition: q `[qo_len, heads, dim]`, k and v `[kv_len, kv_heads, dim]` -> (output, LSE).

    rope: (scale, theta). logits_scale, v_scale: numbers, or a tensor of one a KV head.
    """
    qo_len, kv_len = q.shape[0], k.shape[0]
    positions = torch.arange(qo_len, device=q.device) + kv_len - qo_len
    if rope is not None:
        q, k = turned(q, positions, *rope), turned(k, torch.arange(kv_len, device=q.device), *rope)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    per_head = lambda s: s.to(wide)[:, None] if isinstance(s, torch.Tensor) else s  # noqa: E731
    key, value = k.to(wide) * per_head(logits_scale), v.to(wide) * per_head(v_scale)
    q4, k4, v4 = (t.transpose(0, 1)[None] for t in (q, key, value))
    mask = None if mask is None else mask[None, None]
    output, lse = attend(
        q4, k4, v4, mask, positions[None], causal, window_left, sm_scale, logits_soft_cap, alibi_slopes, sinks
    )
    return output[0].transpose(0, 1), lse[0].T


def per_request(function, *requests):
    """`function(q_b, k_b, v_b, ...)` of each request, joined: (output, LSE)."""
    results = [function(*parts) for parts in zip(*requests, strict=True)]
    return tuple(torch.cat([r[i] for r in results]) for i in range(2))


def check(actual, expect, what=""):
    """`actual`: (output, LSE); `expect(convert)`: the same of inputs converted; within the error budget."""
    exact, same = expect(torch.Tensor.double), expect(lambda t: t)
    for got, want, base, name in zip(actual, exact, same, ("output", "lse"), strict=False):
        base = base.to(got.dtype) if base.dtype != got.dtype else base
        assert_within_budget(got, want, base, f"{what} {name}")


class Batch:
    """Random requests, dense and in the pages of a cache, in either layout, as a pair or as one tensor.

    shared: pages are in several requests, and several times in one.
    """

    def __init__(
        self, device, qo_lens, kv_lens, *, dtype=torch.float32, kv_dtype=None, page_size=4, heads=4, kv_heads=2, head_dim=64,
        head_dim_vo=None, index=torch.int32, layout="NHD", fused=False, spare_pages=3, shared=False,
    ):  # fmt: skip
        head_dim_vo = head_dim_vo or head_dim
        self.qo_lens, self.kv_lens, self.page_size, self.layout = qo_lens, kv_lens, page_size, layout
        self.device, self.dtype, self.kv_dtype = device, dtype, kv_dtype or dtype
        self.sizes = heads, kv_heads, head_dim
        self.head_dim_vo = head_dim_vo
        counts = [-(-n // page_size) for n in kv_lens]
        num_pages = sum(counts) + spare_pages
        pages = torch.randperm(num_pages)[: sum(counts)]
        if shared:  # between requests and within one
            num_pages = max(num_pages // 2, 1)
            pages = torch.randint(0, num_pages, (sum(counts),))
        self.qo_indptr, self.kv_indptr = indptr(qo_lens, index), indptr(counts, index)
        self.kv_indices = pages.to(index)
        self.kv_last_page_len = torch.tensor([(n - 1) % page_size + 1 if n else 0 for n in kv_lens], dtype=index)
        self.q = torch.randn(sum(qo_lens), heads, head_dim, device=device).to(dtype)
        k, v = (
            torch.randn(num_pages, page_size, kv_heads, d, device=device).to(self.kv_dtype)
            for d in (head_dim, head_dim_vo)
        )
        self.queries = list(self.q.split(qo_lens))
        # float8 tensors can't be indexed on every device: through their bytes
        take = lambda cache, ids: cache.view(torch.uint8)[ids.to(device)].view(cache.dtype).flatten(0, 1)  # noqa: E731
        parts = list(pages.split(counts))
        self.keys, self.values = ([take(c, p)[:n] for p, n in zip(parts, kv_lens, strict=True)] for c in (k, v))
        if layout == "HND":
            k, v = k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()
        self.cache = torch.stack((k.view(torch.uint8), v.view(torch.uint8)), 1).view(k.dtype) if fused else (k, v)

    @property
    def table(self):
        return self.kv_indptr, self.kv_indices, self.kv_last_page_len

    def table_on(self, device):
        return tuple(t.to(device) for t in self.table)

    def expect(self, masks=None, out_dtype=torch.bfloat16, **options):
        """For `check`: attention of every request with these options, over inputs converted; out_dtype: of 8-bit queries."""
        masks = masks or [None] * len(self.qo_lens)

        def run(convert):
            def one(q, k, v, mask):
                k, v = (convert(t.float() if t.dtype.itemsize == 1 else t) for t in (k, v))
                q = q.to(out_dtype) if q.dtype.itemsize == 1 else q
                return attend_dense(convert(q), k, v, mask=mask, **options)

            return per_request(one, self.queries, self.keys, self.values, masks)

        return run

    def expect_scaled(self, q_scale, out_dtype, **options):
        """`expect` of 8-bit queries times q_scale `[heads]`, which are rounded to out_dtype unless they are converted."""
        heads, queries = q_scale[:, None], self.queries

        def run(convert):
            wide = (q.to(convert(torch.ones(1)).dtype) * heads for q in queries)
            self.queries = [q if q.dtype == torch.float64 else q.to(out_dtype) for q in wide]
            try:
                return self.expect(**options)(convert)
            finally:
                self.queries = queries

        return run

    def random_masks(self, share=0.6):
        return [torch.rand(q, kv, device=self.device) < share for q, kv in zip(self.qo_lens, self.kv_lens, strict=True)]


# ---- wrappers that are planned for a batch ----


def decode_batch(device, kv_lens=(37, 1, 90, 16, 0), **options):
    return Batch(device, [1] * len(kv_lens), list(kv_lens), **options)


def empty(device):
    return torch.empty(0, dtype=torch.uint8, device=device)


def plan_decode(batch, wrapper=None, table=None, **options):
    wrapper = wrapper or fi_ops.BatchDecodeWithPagedKVCacheWrapper(empty(batch.device), batch.layout)
    wrapper.plan(
        *(table or batch.table), *batch.sizes, batch.page_size, q_data_type=batch.dtype, kv_data_type=batch.kv_dtype, **options
    )  # fmt: skip
    return wrapper


def plan_prefill(batch, wrapper=None, qo_indptr=None, table=None, **options):
    wrapper = wrapper or fi_ops.BatchPrefillWithPagedKVCacheWrapper(empty(batch.device), batch.layout)
    wrapper.plan(
        batch.qo_indptr if qo_indptr is None else qo_indptr, *(table or batch.table), *batch.sizes, batch.page_size,
        head_dim_vo=batch.head_dim_vo, q_data_type=batch.dtype, kv_data_type=batch.kv_dtype, **options,
    )  # fmt: skip
    return wrapper


def plan_ragged(batch, **options):
    wrapper = fi_ops.BatchPrefillWithRaggedKVCacheWrapper(empty(batch.device))
    wrapper.plan(
        batch.qo_indptr, indptr(batch.kv_lens), *batch.sizes, head_dim_vo=batch.head_dim_vo, q_data_type=batch.dtype,
        kv_data_type=batch.kv_dtype, **options,
    )  # fmt: skip
    return wrapper


def ragged_keys(batch):
    return (torch.cat([t.view(torch.uint8) for t in ts]).view(ts[0].dtype) for ts in (batch.keys, batch.values))


def graph_buffers(device, batch, pages=80):
    ints = {"dtype": torch.int32, "device": device}
    return {
        "paged_kv_indptr": torch.zeros(batch + 1, **ints), "paged_kv_indices": torch.zeros(pages, **ints),
        "paged_kv_last_page_len": torch.zeros(batch, **ints),
    }  # fmt: skip


def prefill_buffers(device, batch):
    buffers = {f"{name}_buf": t for name, t in graph_buffers(device, batch).items()}
    return buffers | {"qo_indptr_buf": torch.zeros(batch + 1, dtype=torch.int32, device=device)}
