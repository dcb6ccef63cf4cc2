"""FlashInfer's wrappers for decode, prefill and append of a batch: options against attention by request, refusals."""

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
    plan_ragged,
    prefill_buffers,
    ragged_keys,
)

import fi_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

SETTINGS = {
    "plain": ({}, {}),
    "scale and soft cap": (s := {"sm_scale": 0.3, "logits_soft_cap": 6.0}, s),
    "window": ({"window_left": 11}, {"window_left": 11}),
    "RoPE": ({"pos_encoding_mode": "ROPE_LLAMA"}, {"rope": (1.0, 1e4)}),
    "RoPE, scaled": (
        {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 5e5}, {"rope": (2.0, 5e5)},
    ),
    "fixed split": ({"fixed_split_size": 3}, {}),
    "no split": ({"disable_split_kv": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(device, name):
    """What `plan` takes, in all three wrappers; prefill causal and not."""
    given, options = SETTINGS[name]
    batch = decode_batch(device)
    check(plan_decode(batch, **given).run_return_lse(batch.q, batch.cache), batch.expect(**options))
    batch = Batch(device, *MIXED)
    for causal in (False, True):
        expected = batch.expect(causal=causal, **options)
        wrapper = plan_prefill(batch, causal=causal, **given)
        check(wrapper.run_return_lse(batch.q, batch.cache), expected)
        check(plan_ragged(batch, causal=causal, **given).run_return_lse(batch.q, *ragged_keys(batch)), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_alibi(device):
    slopes = fi_ops.get_alibi_slopes(4, device)
    batch = decode_batch(device)
    wrapper = plan_decode(batch, pos_encoding_mode="ALIBI")
    check(wrapper.run_return_lse(batch.q, batch.cache), batch.expect(alibi_slopes=slopes))
    batch = Batch(device, *MIXED)
    wrapper = plan_prefill(batch, pos_encoding_mode="ALIBI", causal=True)
    check(wrapper.run_return_lse(batch.q, batch.cache), batch.expect(alibi_slopes=slopes, causal=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("fused", [False, True])
def test_caches(device, dtype, layout, fused):
    """Layouts, one tensor or a pair, dtypes, int64 tables, any page size."""
    options = {"dtype": dtype, "layout": layout, "fused": fused, "index": torch.int64, "page_size": 5}
    batch = decode_batch(device, **options)
    check(plan_decode(batch).run_return_lse(batch.q, batch.cache), batch.expect())
    batch = Batch(device, *MIXED, **options)
    wrapper = plan_prefill(batch, causal=True)
    check(wrapper.run_return_lse(batch.q, batch.cache), batch.expect(causal=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_caches_and_scales(device, kv_dtype):
    batch = decode_batch(device, dtype=torch.bfloat16, kv_dtype=kv_dtype)
    wrapper = plan_decode(batch)
    check(wrapper.run_return_lse(batch.q, batch.cache), batch.expect())
    got = wrapper.run_return_lse(batch.q, batch.cache, q_scale=0.5, k_scale=1.5, v_scale=2.5)
    check(got, batch.expect(logits_scale=0.75, v_scale=2.5))
    heads = torch.tensor([0.5, 1.5], device=device)
    one = torch.tensor(2.0, device=device)
    got = wrapper.run_return_lse(batch.q, batch.cache, q_scale=one, k_scale=heads, v_scale=heads)
    check(got, batch.expect(logits_scale=2 * heads, v_scale=heads))
    batch = Batch(device, *MIXED, dtype=torch.float16, kv_dtype=kv_dtype)
    got = plan_prefill(batch, causal=True).run_return_lse(batch.q, batch.cache, k_scale=one, v_scale=0.5)
    check(got, batch.expect(causal=True, logits_scale=2.0, v_scale=0.5))
    got = plan_ragged(batch).run_return_lse(batch.q, *ragged_keys(batch), k_scale=heads)
    check(got, batch.expect(logits_scale=heads))


@pytest.mark.parametrize("device", DEVICES)
def test_a_scale_for_each_query_head(device):
    batch = decode_batch(device)
    scale = torch.rand(4, device=device) + 0.5
    got = plan_decode(batch).run_return_lse(batch.q, batch.cache, q_scale=scale)
    batch.queries = [q * scale[:, None] for q in batch.queries]
    check(got, batch.expect())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [MIXED, ([3, 1, 130], [4, 33, 200])])
def test_custom_masks(device, lengths):
    """Bools, and bits each request's from a byte on; they replace causal."""
    batch = Batch(device, *lengths)
    masks = batch.random_masks()
    flat = torch.cat([m.flatten() for m in masks])
    packed, _ = fi_ops.segment_packbits(flat, indptr([m.numel() for m in masks], device=device), bitorder="little")
    expected = batch.expect(masks)
    for given in ({"custom_mask": flat, "causal": True}, {"custom_mask": flat.cpu()}, {"packed_custom_mask": packed}):
        check(plan_prefill(batch, **given).run_return_lse(batch.q, batch.cache), expected)
        check(plan_ragged(batch, **given).run_return_lse(batch.q, *ragged_keys(batch)), expected)
    on_device = {"qo_indptr": batch.qo_indptr.to(device), "table": batch.table_on(device)}
    check(plan_prefill(batch, custom_mask=flat, **on_device).run_return_lse(batch.q, batch.cache), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_sinks(device):
    sinks = torch.randn(4, device=device)
    batch = decode_batch(device)
    check(plan_decode(batch).run_return_lse(batch.q, batch.cache, sinks=sinks), batch.expect(sinks=sinks))
    batch = Batch(device, *MIXED, dtype=torch.bfloat16)
    expected = batch.expect(sinks=sinks, causal=True, sm_scale=0.2)
    got = plan_prefill(batch, causal=True, sm_scale=0.2).run_return_lse(batch.q, batch.cache, sinks=sinks)
    check(got, expected)
    wrapper = fi_ops.BatchAttentionWithAttentionSinkWrapper(empty(device), head_dim_qk=64, head_dim_vo=64)
    plan_prefill(batch, wrapper, causal=True)
    check(wrapper.run(batch.q, batch.cache, sinks, 0.2, return_lse=True), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_head_dims_that_differ(device):
    batch = Batch(device, *MIXED, head_dim=192, head_dim_vo=128, dtype=torch.bfloat16)
    wrapper = plan_prefill(batch, causal=True)
    check(wrapper.run_return_lse(batch.q, batch.cache), batch.expect(causal=True))
    wrapper = plan_ragged(batch, causal=True)
    check(wrapper.run_return_lse(batch.q, *ragged_keys(batch)), batch.expect(causal=True))


@pytest.mark.parametrize("device", DEVICES)
def test_ragged_hnd(device):
    batch = Batch(device, *MIXED)
    wrapper = fi_ops.BatchPrefillWithRaggedKVCacheWrapper(empty(device), "HND")
    wrapper.plan(batch.qo_indptr, indptr(batch.kv_lens), *batch.sizes, q_data_type=batch.dtype)
    keys = (t.transpose(0, 1).contiguous() for t in ragged_keys(batch))
    check(wrapper.run_return_lse(batch.q, *keys), batch.expect())


@pytest.mark.parametrize("device", DEVICES)
def test_several_queries_a_request(device):
    batch = Batch(device, [3] * 4, [37, 3, 90, 16])
    wrapper = plan_decode(batch, q_len_per_req=3)
    check(wrapper.run_return_lse(batch.q, batch.cache), batch.expect(causal=True))


@pytest.mark.parametrize("device", DEVICES)
def test_padding_is_zero(device):
    """More rows of q than qo_indptr says: 0 and -inf, with a plan that was made for fewer."""
    batch = Batch(device, *MIXED)
    wrapper = plan_prefill(batch, causal=True)
    q = torch.cat((batch.q, torch.randn_like(batch.q[:3])))
    output, lse = wrapper.run_return_lse(q, batch.cache)
    check((output[:-3], lse[:-3]), batch.expect(causal=True))
    assert (output[-3:] == 0).all() and (lse[-3:] == -torch.inf).all()


@pytest.mark.parametrize("device", DEVICES)
def test_outputs_given_and_dtypes(device):
    batch = decode_batch(device, dtype=torch.bfloat16)
    wrapper = plan_decode(batch)
    want, want_lse = wrapper.run_return_lse(batch.q, batch.cache)
    out, lse = torch.empty_like(want), torch.empty_like(want_lse)
    got = wrapper.run(batch.q, batch.cache, out=out, lse=lse)
    assert got is out and torch.equal(out, want) and torch.equal(lse, want_lse)
    got = wrapper.run(batch.q, batch.cache, out=out.zero_(), lse=lse.zero_(), return_lse=True)
    assert got[0] is out and got[1] is lse and torch.equal(out, want) and torch.equal(lse, want_lse)
    plan_decode(batch, wrapper, o_data_type="float32")
    wide, _ = wrapper.run_return_lse(batch.q, batch.cache)
    assert wide.dtype == torch.float32 and torch.equal(wide, want.float())
    with pytest.raises(RuntimeError, match=r"run: out must be .* of torch.float32 .* got .* of torch.bfloat16"):
        wrapper.run(batch.q, batch.cache, out=out)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_replaces_what_was_planned(device):
    batch = Batch(device, *MIXED)
    wrapper = plan_prefill(batch, causal=True)
    check(wrapper.forward_return_lse(batch.q, batch.cache, sm_scale=0.2), batch.expect(sm_scale=0.2))
    got = wrapper.forward_return_lse(batch.q, batch.cache, causal=True, pos_encoding_mode="ROPE_LLAMA", window_left=9)
    check(got, batch.expect(causal=True, rope=(1.0, 1e4), window_left=9))
    batch = decode_batch(device)
    wrapper = plan_decode(batch, window_left=3)
    check([wrapper.forward(batch.q, batch.cache, k_scale=2.0)], batch.expect(logits_scale=2.0))
    check(wrapper.forward_return_lse(batch.q, batch.cache, window_left=5), batch.expect(window_left=5))
    batch = Batch(device, *MIXED)
    wrapper = plan_ragged(batch, causal=True)
    check([wrapper.forward(batch.q, *ragged_keys(batch), logits_soft_cap=5.0)], batch.expect(logits_soft_cap=5.0))


@pytest.mark.parametrize("device", DEVICES)
def test_tables_on_the_device(device):
    """All that plan needs from index tensors on the device; the plan's rows and RoPE's table are then known in `run` alone."""
    batch = Batch(device, *MIXED)
    options = {"pos_encoding_mode": "ROPE_LLAMA", "causal": True}
    wrapper = plan_prefill(batch, qo_indptr=batch.qo_indptr.to(device), table=batch.table_on(device), **options)
    check(wrapper.run_return_lse(batch.q, batch.cache), batch.expect(rope=(1.0, 1e4), causal=True))


@pytest.mark.parametrize("device", DEVICES)
def test_batch_attention(device):
    batch = Batch(device, *MIXED, dtype=torch.bfloat16)
    wrapper = fi_ops.BatchAttention("NHD", device)
    lengths = torch.tensor(batch.kv_lens, dtype=torch.int32)
    sizes = (*batch.sizes, batch.head_dim_vo, batch.page_size)
    wrapper.plan(batch.qo_indptr, batch.kv_indptr, batch.kv_indices, lengths, *sizes, causal=True)
    check(wrapper.run(batch.q, batch.cache), batch.expect(causal=True))
    got = wrapper.run(batch.q, batch.cache, k_scale=0.5, v_scale=2.0, logits_soft_cap=4.0)
    check(got, batch.expect(causal=True, logits_scale=0.5, v_scale=2.0, logits_soft_cap=4.0))
    wrapper.plan(batch.qo_indptr, batch.kv_indptr, batch.kv_indices, lengths, *sizes, logits_soft_cap=3.0, sm_scale=0.2)
    check(wrapper.run(batch.q, batch.cache), batch.expect(logits_soft_cap=3.0, sm_scale=0.2))


@pytest.mark.parametrize("device", DEVICES)
def test_plain_functions(device):
    batch = Batch(device, *MIXED, layout="HND")
    qo_indptr, (kv_indptr, kv_indices, last) = batch.qo_indptr.to(device), batch.table_on(device)
    plan = fi_ops.batch_attention_plan(qo_indptr, kv_indptr, last, batch.q.shape[0], 2, batch.page_size, causal=True)
    table = (qo_indptr, kv_indices, kv_indptr, last)
    options = {"causal": True, "sm_scale": 0.2, "return_lse": True}
    got = fi_ops.paged_attention(batch.q, batch.cache, *table, kv_layout="HND", plan=plan, **options)
    check(got, batch.expect(causal=True, sm_scale=0.2))
    got = fi_ops.ragged_attention(
        batch.q, *ragged_keys(batch), qo_indptr, indptr(batch.kv_lens, device=device), **options
    )
    check(got, batch.expect(causal=True, sm_scale=0.2))


# ---- refusals ----


def test_refusals():
    batch = decode_batch("cpu")
    wrapper = fi_ops.BatchDecodeWithPagedKVCacheWrapper(empty("cpu"))

    def refused(match, call):
        with pytest.raises(RuntimeError, match=match):
            call()

    run = lambda **o: wrapper.run(batch.q, batch.cache, **o)  # noqa: E731
    refused(r"BatchDecodeWithPagedKVCacheWrapper.run: nothing is planned; call plan first", run)
    refused(r"kv_layout must be one of .* got 'DNH'", lambda: fi_ops.BatchDecodeWithPagedKVCacheWrapper(batch.q, "DNH"))
    make = lambda **o: fi_ops.BatchPrefillWithPagedKVCacheWrapper(batch.q, **o)  # noqa: E731
    refused(r"backend must be one of .* got 'fa9'", lambda: make(backend="fa9"))
    refused(r"jit_args is not supported: kernels are compiled ahead of time", lambda: make(jit_args=[1]))
    refused(r"use_cuda_graph needs a buffer for qo_indptr, got None", lambda: make(use_cuda_graph=True))
    buffers = prefill_buffers("cpu", 5)
    shorter = buffers | {"paged_kv_last_page_len_buf": torch.zeros(4, dtype=torch.int32)}
    refused(r"the buffer for kv_last_page_len must have 5 .* got 4", lambda: make(use_cuda_graph=True, **shorter))

    plan = lambda **o: plan_decode(batch, wrapper, **o)  # noqa: E731
    refused(r"pos_encoding_mode must be one of .* got 'ROPE'; rotate", lambda: plan(pos_encoding_mode="ROPE"))
    refused(r"window_left must be -1 \(no window\) or more, got -5", lambda: plan(window_left=-5))
    refused(r"fixed_split_size must be a number of pages, .* got 0", lambda: plan(fixed_split_size=0))
    refused(r"q_len_per_req must be 1 or more, got 0", lambda: plan(q_len_per_req=0))
    refused(r"o_data_type must be one of float32, .* got float8_e4m3fn", lambda: plan(o_data_type="float8_e4m3fn"))
    sizes = (*batch.sizes, batch.page_size)
    refused(r"q_data_type must be .* got float64", lambda: wrapper.plan(*batch.table, *sizes, q_data_type="float64"))
    refused(
        r"num_qo_heads must be a multiple of num_kv_heads, got 4 and 3", lambda: wrapper.plan(*batch.table, 4, 3, 64, 4)
    )
    short = (batch.kv_indptr[:-1], batch.kv_indices, batch.kv_last_page_len)
    refused(r"kv_indptr must have 6 elements for a batch of 5, got 5", lambda: wrapper.plan(*short, *sizes))
    item = torch.zeros(1)
    refused(r"prefix_len_ptr is not supported: multi-item scoring", lambda: plan_prefill(batch, prefix_len_ptr=item))
    refused(r"token_pos_in_items_len is not supported", lambda: plan_prefill(batch, token_pos_in_items_len=4))
    refused(
        r"custom_mask must have sum\(qo_len \* kv_len\) = 144 elements, got 3; flatten",
        lambda: plan_prefill(batch, custom_mask=torch.ones(3, dtype=torch.bool)),
    )
    assert wrapper._settings is None  # nothing is planned by what was refused
    wrapper.plan(*batch.table, *sizes)
    refused(r"q must be torch.float16, as planned, got torch.float32; pass q_data_type", run)
    plan()
    refused(r"q must have batch \* q_len_per_req = 5 rows, got 4", lambda: wrapper.run(batch.q[:4], batch.cache))
    refused(r"page_size must be 4, as planned, got 3", lambda: wrapper.run(batch.q, [t[:, :3] for t in batch.cache]))
    refused(r"num_qo_heads must be 4, as planned, got 2", lambda: wrapper.run(batch.q[:, :2], batch.cache))
    refused(
        r"head_dim_vo must be 64, as planned, got 8",
        lambda: wrapper.run(batch.q, (batch.cache[0], batch.cache[1][..., :8])),
    )
    refused(r"window_left must be -1, as planned, got 7", lambda: run(window_left=7))
    refused(r"q_len_per_req must be 1, as planned, got 2", lambda: run(q_len_per_req=2))
    refused(r"kv_cache_sf is not supported", lambda: run(kv_cache_sf=item))
    refused(
        r"skip_softmax_threshold_scale_factor is not supported", lambda: run(skip_softmax_threshold_scale_factor=1.0)
    )
    refused(r"k_scale must be a number or a tensor of 1 or 2 elements, got 3", lambda: run(k_scale=torch.ones(3)))
    refused(r"got 1 positional arguments too many", lambda: wrapper.run(batch.q, batch.cache, 1.0))
    refused(r"lse must be \[5, 4\] of torch.float32", lambda: run(lse=torch.zeros(3)))
    wrong = (batch.kv_indptr, batch.kv_indices + 99, batch.kv_last_page_len)
    plan(table=wrong)
    refused(r"fi::paged_attention: kv_indices must be pages of the cache", run)


def test_refusals_in_cuda_graph_mode():
    batch = decode_batch("cpu")
    wrapper = fi_ops.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(empty("cpu"), *graph_buffers("cpu", 5, 40).values())
    plan_decode(batch, wrapper)
    before = [t.clone() for t in (wrapper._kv_indptr, wrapper._kv_indices, wrapper._kv_last_page_len)]
    larger, other = Batch("cpu", [1] * 5, [90] * 5), Batch("cpu", [1] * 4, [9] * 4)
    with pytest.raises(RuntimeError, match=r"kv_indices has 115 elements but its buffer has 40; sizes are fixed"):
        plan_decode(larger, wrapper)
    with pytest.raises(RuntimeError, match=r"the batch is fixed in CUDA graph mode at 5, got 4"):
        plan_decode(other, wrapper)
    with pytest.raises(RuntimeError, match=r"q_len_per_req is fixed in CUDA graph mode at 1, got 2"):
        plan_decode(batch, wrapper, q_len_per_req=2)
    after = (wrapper._kv_indptr, wrapper._kv_indices, wrapper._kv_last_page_len)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    prefill = fi_ops.BatchPrefillWithPagedKVCacheWrapper(empty("cpu"), use_cuda_graph=True, **prefill_buffers("cpu", 5))
    batch = Batch("cpu", *MIXED)
    mask = torch.cat([m.flatten() for m in batch.random_masks()])
    with pytest.raises(RuntimeError, match=r"a custom mask needs a buffer for custom_mask in CUDA graph mode"):
        plan_prefill(batch, prefill, custom_mask=mask)
    plan_prefill(batch, prefill)
    more = Batch("cpu", [9] * 5, [9] * 5)
    with pytest.raises(RuntimeError, match=r"query tokens is fixed in CUDA graph mode, at most 18 .* got 45"):
        plan_prefill(more, prefill)


def test_workspaces_of_any_size():
    for buffer in (torch.empty(0), torch.empty(1 << 20, dtype=torch.uint8)):
        batch = decode_batch("cpu")
        wrapper = fi_ops.BatchDecodeWithPagedKVCacheWrapper(buffer)
        assert wrapper.workspace_size(*batch.table, *batch.sizes, batch.page_size) == (0, 0)
        wrapper.reset_workspace_buffer(torch.empty(0), torch.empty(0))
        check(plan_decode(batch, wrapper).run_return_lse(batch.q, batch.cache), batch.expect())
        wrapper.end_forward()
