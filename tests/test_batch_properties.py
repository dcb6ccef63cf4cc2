"""Random batches, page tables and options, through the wrappers: against attention request by request over dense keys."""

from __future__ import annotations

import torch
from batch_cases import Batch, check, indptr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fi_ops

RELAXED = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LENGTHS = st.tuples(
    st.sampled_from([0, 1, 1, 2, 3, 7, 16, 17, 70]), st.sampled_from([0, 1, 4, 5, 16, 33, 64, 65, 130, 200])
)


@st.composite
def batches(draw):
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=6))
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4, 5]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return Batch(
        "cpu", [q for q, _ in lengths], [kv for _, kv in lengths], dtype=dtype, page_size=draw(st.integers(1, 20)),
        kv_dtype=draw(st.sampled_from([dtype, dtype, torch.float8_e4m3fn, torch.float8_e5m2])), heads=group * kv_heads,
        kv_heads=kv_heads, head_dim=draw(st.sampled_from([16, 64, 80])), index=draw(st.sampled_from([torch.int32, torch.int64])),
        layout=draw(st.sampled_from(["NHD", "HND"])), fused=draw(st.booleans()), shared=draw(st.booleans()),
    )  # fmt: skip


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(), "window_left": st.integers(-1, 90), "logits_soft_cap": st.sampled_from([0.0, 5.0]),
        "sm_scale": st.sampled_from([0.1, 1.0]),
    },
)  # fmt: skip


@RELAXED
@given(batches(), OPTIONS, st.booleans(), st.booleans(), st.sampled_from([None, 1, 9]))
def test_prefill(batch, options, masked, with_sinks, fixed_split_size):
    masks = batch.random_masks() if masked else None
    sinks = torch.randn(batch.sizes[0]) if with_sinks else None
    wrapper = fi_ops.BatchPrefillWithPagedKVCacheWrapper(torch.empty(0), batch.layout)
    wrapper.plan(
        batch.qo_indptr, *batch.table, *batch.sizes, batch.page_size, q_data_type=batch.dtype, kv_data_type=batch.kv_dtype,
        custom_mask=torch.cat([m.flatten() for m in masks]) if masked else None, fixed_split_size=fixed_split_size, **options,
    )  # fmt: skip
    expected = {**options, "causal": options.get("causal", False) and not masked}
    got = wrapper.run_return_lse(batch.q, batch.cache, sinks=sinks)
    check(got, batch.expect(masks, sinks=sinks, **expected))
    ragged = fi_ops.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(0))
    ragged.plan(
        batch.qo_indptr, indptr(batch.kv_lens), *batch.sizes, q_data_type=batch.dtype, kv_data_type=batch.kv_dtype,
        custom_mask=torch.cat([m.flatten() for m in masks]) if masked else None, **options,
    )  # fmt: skip
    keys = (torch.cat([t.view(torch.uint8) for t in ts]).view(batch.kv_dtype) for ts in (batch.keys, batch.values))
    check(ragged.run_return_lse(batch.q, *keys), batch.expect(masks, **expected))


@RELAXED
@given(batches(), st.integers(1, 3))
def test_cascade(batch, levels):
    """Each request's pages cut into levels, a level's keys its own: what it is over all levels is what it is over all keys."""
    counts = batch.kv_indptr.diff().tolist()
    tables = [], [], [], []
    for level in range(levels):
        parts, last = [], []
        for b, pages in enumerate(batch.kv_indices.split(counts)):
            begin, end = level * len(pages) // levels, (level + 1) * len(pages) // levels
            parts.append(pages[begin:end])
            ends_here = end == len(pages)
            full = batch.kv_last_page_len[b] if ends_here else batch.page_size
            last.append(int(full) if end > begin else 0)
        rows = (batch.qo_indptr, indptr([len(p) for p in parts]), torch.cat(parts), torch.tensor(last))
        for table, row in zip(tables, rows, strict=True):
            table.append(row)
    wrapper = fi_ops.MultiLevelCascadeAttentionWrapper(levels, torch.empty(0), batch.layout)
    wrapper.plan(*tables, *batch.sizes, batch.page_size, q_data_type=batch.dtype, kv_data_type=batch.kv_dtype)
    check([wrapper.run(batch.q, batch.cache)], batch.expect())
