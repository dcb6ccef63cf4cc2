"""What the batch wrappers keep between `plan` and `run`: plans, buffers of captured graphs, nothing of the host; compilation."""

from __future__ import annotations

import pytest
import torch
from batch_cases import (
    DEVICES,
    MIXED,
    Batch,
    check,
    decode_batch,
    empty,
    graph_buffers,
    indptr,
    plan_decode,
    plan_prefill,
    prefill_buffers,
    ragged_keys,
)

import fi_ops


def test_a_plan_is_made_once_where_rows_are_known(monkeypatch):
    """One plan for all layers: `run` hands it to the op (which would make its own)."""
    batch = decode_batch("cpu")
    seen = []
    op = torch.ops.fi.paged_attention
    monkeypatch.setattr(torch.ops.fi, "paged_attention", lambda *a, **k: (seen.append(a[14]), op(*a, **k))[1])
    wrapper = plan_decode(batch)
    for _ in range(2):
        wrapper.run(batch.q, batch.cache)
    assert seen[0] is seen[1] and seen[0] is not None
    batch = Batch("cpu", *MIXED)
    wrapper = plan_prefill(batch, causal=True)
    wrapper.run(batch.q, batch.cache)
    assert seen[2] is not None
    wrapper.forward(batch.q, batch.cache, causal=False)  # another attention than planned for
    wrapper.run(torch.cat((batch.q, batch.q)), batch.cache)  # more rows
    assert seen[3] is None and seen[4] is None


def test_splits_are_in_pages():
    """FlashInfer counts pages, the ops keys in units of 64; what the plan's header says of a unit."""
    batch = decode_batch("cpu")
    unit_keys = lambda **options: int(plan_decode(batch, **options)._plan[3])  # noqa: E731
    assert unit_keys() == 64 and unit_keys(fixed_split_size=-1) == 64
    assert unit_keys(fixed_split_size=32) == 128 and unit_keys(fixed_split_size=33) == 192  # pages of 4
    assert unit_keys(disable_split_kv=True) > 1e9  # one unit, however long the request


def test_the_result_does_not_depend_on_the_batch_with_a_fixed_split():
    batch = Batch("cpu", [1, 1, 4], [300, 90, 200])
    whole = plan_prefill(batch, causal=True, fixed_split_size=16).run(batch.q, batch.cache)
    kv_indptr, kv_indices, last = batch.table
    alone = fi_ops.BatchPrefillWithPagedKVCacheWrapper(empty("cpu"))
    for b, rows in enumerate(batch.qo_indptr.tolist()[:-1]):
        qo_len = batch.qo_lens[b]
        table = (kv_indptr[b : b + 2] - kv_indptr[b], kv_indices[kv_indptr[b] : kv_indptr[b + 1]], last[b : b + 1])
        plan_prefill(batch, alone, qo_indptr=indptr([qo_len]), table=table, causal=True, fixed_split_size=16)
        part = slice(rows, rows + qo_len)
        assert torch.equal(alone.run(batch.q[part], batch.cache), whole[part])


@pytest.mark.parametrize("device", DEVICES)
def test_cuda_graph_mode_writes_into_the_buffers(device):
    buffers = graph_buffers(device, 5)
    wrapper = fi_ops.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(empty(device), *buffers.values())
    assert wrapper.is_cuda_graph_enabled
    plans = []
    for _ in range(2):
        batch = decode_batch(device, index=torch.int64)
        plan_decode(batch, wrapper, pos_encoding_mode="ROPE_LLAMA")
        plans.append((wrapper._plan.data_ptr(), wrapper._table.data_ptr(), wrapper._qo_indptr.data_ptr()))
        check(wrapper.run_return_lse(batch.q, batch.cache), batch.expect(rope=(1.0, 1e4)))
        kept = buffers["paged_kv_indices"][: batch.kv_indices.shape[0]]
        assert torch.equal(kept.cpu(), batch.kv_indices.int())
    assert plans[0] == plans[1]
    mask_buffers = {
        "custom_mask_buf": torch.zeros(9999, dtype=torch.uint8, device=device),
        "mask_indptr_buf": torch.zeros(6, dtype=torch.int32, device=device),
    }
    wrapper = fi_ops.BatchPrefillWithPagedKVCacheWrapper(
        empty(device), use_cuda_graph=True, **prefill_buffers(device, 5), **mask_buffers
    )
    for lengths in (MIXED, ([3, 1, 2, 0, 2], [9, 33, 40, 3, 2])):
        batch = Batch(device, *lengths)
        masks = batch.random_masks()
        plan_prefill(batch, wrapper, custom_mask=torch.cat([m.flatten() for m in masks]))
        assert wrapper._custom_mask is mask_buffers["custom_mask_buf"]
        q = torch.cat((batch.q, batch.q))[:18]  # the first plan's rows
        output, lse = wrapper.run_return_lse(q, batch.cache)
        rows = batch.q.shape[0]
        check((output[:rows], lse[:rows]), batch.expect(masks))
        assert (output[rows:] == 0).all()


def capture(function):
    """A CUDA graph of the function, and what it returned, which each replay writes anew."""
    function()  # what is made once is made now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


LENGTHS = [  # of a batch of 5, the first with the most queries
    ([1, 5, 0, 9, 3], [40, 5, 30, 33, 70]), ([9, 1, 3, 2, 3], [9, 80, 40, 2, 3]), ([0, 1, 0, 2, 3], [0, 1, 60, 70, 3]),
]  # fmt: skip
DECODE_LENGTHS = [[37, 1, 90, 16, 2], [1, 90, 2, 3, 100], [60, 0, 0, 60, 61]]


def fill(static, batch):
    """Copy a batch's queries and pages into a captured graph's."""
    q, *caches = static
    q[: batch.q.shape[0]].copy_(batch.q)
    for cache, pages in zip(caches, batch.cache, strict=True):
        cache[: pages.shape[0]].copy_(pages)


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("which", ["decode", "prefill"])
def test_a_captured_run_follows_later_plans(which, on_device):
    """Captured once; then other lengths and pages by `plan` alone, its tables on the host or on the device."""
    if which == "decode":
        batches = [Batch("cuda", [1] * 5, kv_lens) for kv_lens in DECODE_LENGTHS]
        buffers = graph_buffers("cuda", 5).values()
        wrapper, options = fi_ops.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(empty("cuda"), *buffers), {}
    else:
        batches, options = [Batch("cuda", *lengths) for lengths in LENGTHS], {"causal": True}
        buffers = prefill_buffers("cuda", 5)
        wrapper = fi_ops.BatchPrefillWithPagedKVCacheWrapper(empty("cuda"), use_cuda_graph=True, **buffers)

    def plan(batch):
        table = batch.table_on("cuda") if on_device else batch.table
        if which == "decode":
            plan_decode(batch, wrapper, table=table)
        else:
            plan_prefill(batch, wrapper, batch.qo_indptr.to("cuda" if on_device else "cpu"), table, **options)

    static = batches[0].q.clone(), *(torch.zeros(90, *c.shape[1:], device="cuda") for c in batches[0].cache)
    plan(batches[0])
    graph, results = capture(lambda: wrapper.run_return_lse(static[0], static[1:]))
    for batch in batches:
        fill(static, batch)
        plan(batch)
        graph.replay()
        check([t[: batch.q.shape[0]] for t in results], batch.expect(**options))


@pytest.mark.gpu
def test_plan_can_be_captured():
    """Index tensors of the device are all that a replay needs: `plan` and `run` in one graph."""
    batches = [Batch("cuda", *lengths) for lengths in LENGTHS]
    buffers = prefill_buffers("cuda", 5)
    wrapper = fi_ops.BatchPrefillWithPagedKVCacheWrapper(empty("cuda"), use_cuda_graph=True, **buffers)
    tables = [torch.zeros_like(t) for t in buffers.values()]  # kv_indptr, kv_indices, kv_last_page_len, qo_indptr
    static = batches[0].q.clone(), *(torch.zeros(90, *c.shape[1:], device="cuda") for c in batches[0].cache)

    def step():
        plan_prefill(batches[0], wrapper, tables[3], tables[:3], causal=True)
        return wrapper.run_return_lse(static[0], static[1:])

    def enter(batch):
        fill(static, batch)
        for mine, given in zip(tables, (*batch.table, batch.qo_indptr), strict=True):
            mine[: given.shape[0]].copy_(given)

    enter(batches[0])
    graph, results = capture(step)
    for batch in batches:
        enter(batch)
        graph.replay()
        check([t[: batch.q.shape[0]] for t in results], batch.expect(causal=True))


def test_nothing_needs_a_value_of_the_device():
    """On tensors of a device that have no values: what asked for one (`item`, a size that depends on data) would raise."""
    batch = Batch("cpu", *MIXED)
    q, cache = batch.q.to("meta"), tuple(c.to("meta") for c in batch.cache)
    table, qo_indptr = batch.table_on("meta"), batch.qo_indptr.to("meta")
    keys, kv_indptr = [t.to("meta") for t in ragged_keys(batch)], indptr(batch.kv_lens).to("meta")
    mask = torch.ones(700, dtype=torch.bool, device="meta")
    workspace, sizes = torch.empty(0, device="meta"), (*batch.sizes, batch.page_size)
    decode = fi_ops.BatchDecodeWithPagedKVCacheWrapper(workspace)
    prefill = fi_ops.BatchPrefillWithPagedKVCacheWrapper(workspace)
    ragged = fi_ops.BatchPrefillWithRaggedKVCacheWrapper(workspace)
    unified = fi_ops.BatchAttention("NHD", "meta")
    cascade = fi_ops.MultiLevelCascadeAttentionWrapper(2, workspace)
    for options in ({}, {"pos_encoding_mode": "ROPE_LLAMA"}, {"pos_encoding_mode": "ALIBI", "fixed_split_size": 4}):
        decode.plan(*table, *sizes, q_data_type="float32", **options)
        assert decode.run(q[:5], cache, k_scale=2.0, v_scale=q[0, :1, 0]).shape == (5, 4, 64)
        for extra in ({"causal": True}, {"custom_mask": mask}, {"packed_custom_mask": mask.view(torch.uint8)}):
            prefill.plan(qo_indptr, *table, *sizes, q_data_type="float32", **options, **extra)
            assert prefill.run(q, cache).shape == q.shape
            ragged.plan(qo_indptr, kv_indptr, *batch.sizes, q_data_type="float32", **options, **extra)
            assert ragged.run(q, *keys).shape == q.shape
    unified.plan(qo_indptr, *table, *batch.sizes, 64, batch.page_size, q_data_type=None, kv_data_type=None)
    assert unified.run(q, cache)[1].shape == q.shape[:2]
    levels = [[qo_indptr] * 2, *([t] * 2 for t in table)]
    cascade.plan(*levels, *sizes, q_data_type="float32")
    assert cascade.run(q, cache).shape == q.shape


@pytest.mark.gpu
def test_plan_and_run_do_not_sync():
    batch = Batch("cuda", *MIXED)
    mask = torch.cat([m.flatten() for m in batch.random_masks()])
    on_device = {"qo_indptr": batch.qo_indptr.to("cuda"), "table": batch.table_on("cuda")}
    wrapper = plan_prefill(batch, pos_encoding_mode="ALIBI", **on_device)  # the slopes are made once
    decode = decode_batch("cuda")
    table = decode.table_on("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({"causal": True}, {"custom_mask": mask}, {"pos_encoding_mode": "ROPE_LLAMA"}):
            plan_prefill(batch, wrapper, **on_device, **options)
            wrapper.run(batch.q, batch.cache, v_scale=2.0)
        plan_decode(decode, table=table).run(decode.q, decode.cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- torch.compile ----


@pytest.mark.parametrize("device", DEVICES)
def test_run_compiles_without_a_break_or_a_recompile(device):
    batch = decode_batch(device)
    wrapper = plan_decode(batch, pos_encoding_mode="ROPE_LLAMA")
    compiled = torch.compile(
        lambda q, cache: wrapper.run_return_lse(q, cache, k_scale=0.5, v_scale=2.0), fullgraph=True
    )
    expected = {"rope": (1.0, 1e4), "logits_scale": 0.5, "v_scale": 2.0}
    check(compiled(batch.q, batch.cache), batch.expect(**expected))
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            batch = decode_batch(device)
            plan_decode(batch, wrapper, pos_encoding_mode="ROPE_LLAMA")
            check(compiled(batch.q, batch.cache), batch.expect(**expected))


@pytest.mark.parametrize("device", DEVICES)
def test_prefill_compiles_for_all_lengths(device):
    batch = Batch(device, *MIXED)
    wrapper = plan_prefill(batch, causal=True)
    compiled = torch.compile(lambda q, cache: wrapper.run_return_lse(q, cache), fullgraph=True, dynamic=True)
    check(compiled(batch.q, batch.cache), batch.expect(causal=True))
    for lengths in (([7, 1, 3, 20], [60, 1, 33, 20]), ([9, 2], [60, 10])):  # sizes become symbols once
        batch = Batch(device, *lengths)
        plan_prefill(batch, wrapper, causal=True)
        check(compiled(batch.q, batch.cache), batch.expect(causal=True))
    with torch.compiler.set_stance("fail_on_recompile"):
        batch = Batch(device, [3, 4, 5, 2, 1, 1], [60, 10, 5, 2, 200, 17])
        plan_prefill(batch, wrapper, causal=True)
        check(compiled(batch.q, batch.cache), batch.expect(causal=True))


@pytest.mark.parametrize("device", DEVICES)
def test_plan_compiles_too(device):
    batch = decode_batch(device)
    wrapper = fi_ops.BatchDecodeWithPagedKVCacheWrapper(empty(device))

    @torch.compile(fullgraph=True)
    def step(q, cache, *table):
        plan_decode(batch, wrapper, table=table)
        return wrapper.run_return_lse(q, cache)

    check(step(batch.q, batch.cache, *batch.table_on(device)), batch.expect())
