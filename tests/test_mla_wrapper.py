"""FlashInfer's wrapper for latent attention: against the formula over each request's own rows, its state, refusals, compilation."""

from __future__ import annotations

import math

import pytest
import torch
from batch_cases import DEVICES, check, empty, indptr, per_request

import fi_ops

HEADS, CKV, KPE, SCALE = 16, 512, 64, 192**-0.5
MIXED = [1, 5, 0, 9, 2, 3], [40, 5, 30, 33, 70, 2]  # decode, prefill, no query, append, verify, queries that see no key
DECODE = [1] * 5, [37, 1, 90, 16, 0]


def attend(q_nope, q_pe, ckv, kpe, causal, scale):
    """One request: `softmax((q_nope . ckv + q_pe . kpe) * scale) ckv`, and the base-2 log-sum-exp; float64 of float64."""
    wide = torch.float64 if q_nope.dtype == torch.float64 else torch.float32
    q_nope, q_pe, ckv, kpe = (t.to(wide) for t in (q_nope, q_pe, ckv, kpe))
    logits = (torch.einsum("qhc,kc->qhk", q_nope, ckv) + torch.einsum("qhp,kp->qhk", q_pe, kpe)) * scale
    if causal:
        qo_len, kv_len = logits.shape[0], logits.shape[2]
        sees = torch.ones(qo_len, kv_len, dtype=torch.bool, device=logits.device).tril(kv_len - qo_len)
        logits = logits.masked_fill(~sees[:, None], -math.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)  # a row that sees nothing gives 0
    return torch.einsum("qhk,kc->qhc", weights, ckv), logits.logsumexp(-1) / math.log(2)


class Latent:
    """Random requests, dense and in the pages of two caches that are views of one tensor."""

    def __init__(
        self, device, qo_lens, kv_lens, *, dtype=torch.float32, kv_dtype=None, page_size=4, index=torch.int32, num_pages=None
    ):  # fmt: skip
        self.device, self.dtype, self.kv_dtype, self.page_size = device, dtype, kv_dtype or dtype, page_size
        self.qo_lens, self.kv_lens = qo_lens, kv_lens
        counts = [-(-n // page_size) for n in kv_lens]
        pages = torch.randperm(num_pages or sum(counts) + 3)
        cache = torch.randn(len(pages), page_size, CKV + KPE, device=device).to(self.kv_dtype)
        self.caches = cache[..., :CKV], cache[..., CKV:]
        self.table = (
            indptr(qo_lens, index), indptr(counts, index), pages[: sum(counts)].to(index), torch.tensor(kv_lens, dtype=index),
        )  # fmt: skip
        self.queries = tuple(torch.randn(sum(qo_lens), HEADS, d, device=device).to(dtype) / 2 for d in (CKV, KPE))
        rows = [
            cache.float()[p.to(device)].flatten(0, 1)[:n]
            for p, n in zip(pages[: sum(counts)].split(counts), kv_lens, strict=True)
        ]
        self.rows = [r.to(dtype) for r in rows]  # exact: 8-bit floats are among 16-bit floats

    @property
    def arguments(self):
        return *self.queries, *self.caches

    def expect(self, causal=True, scale=SCALE, kv_scale=1.0):
        def run(convert):
            def one(q_nope, q_pe, row):
                row = convert(row)
                output, lse = attend(
                    convert(q_nope), convert(q_pe), row[:, :CKV], row[:, CKV:], causal, scale * kv_scale
                )
                return output * kv_scale, lse

            return per_request(one, *(q.split(self.qo_lens) for q in self.queries), self.rows)

        return run


def plan(batch, wrapper=None, *, causal=True, scale=SCALE, on_device=False):
    wrapper = wrapper or fi_ops.BatchMLAPagedAttentionWrapper(empty(batch.device))
    table = [t.to(batch.device) for t in batch.table] if on_device else batch.table
    wrapper.plan(*table, HEADS, CKV, KPE, batch.page_size, causal, scale, batch.dtype, batch.kv_dtype)
    return wrapper


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [DECODE, MIXED])
def test_runs(device, dtype, lengths):
    for causal in (False, True):
        batch = Latent(device, *lengths, dtype=dtype)
        wrapper = plan(batch, causal=causal, scale=0.1)
        expected = batch.expect(causal, 0.1)
        check(wrapper.run(*batch.arguments, return_lse=True), expected)
        check(wrapper.run_return_lse(*batch.arguments), expected)
        check([wrapper.run(*batch.arguments)], expected)  # alone


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("on_device", [False, True])
def test_two_rows_a_request(device, page_size, on_device):
    """What a speculative step verifies: each request's last two tokens, causal; index tensors of int64, anywhere."""
    batch = Latent(device, [2] * 4, [130, 64, 65, 2], page_size=page_size, dtype=torch.bfloat16, index=torch.int64)
    check(plan(batch, on_device=on_device).run(*batch.arguments, return_lse=True), batch.expect())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_caches(device, kv_dtype):
    batch = Latent(device, *MIXED, dtype=torch.bfloat16, kv_dtype=kv_dtype)
    wrapper = plan(batch)
    check(wrapper.run(*batch.arguments, return_lse=True), batch.expect())
    for kv_scale in (1.5, torch.tensor(1.5, device=device)):
        check(wrapper.run(*batch.arguments, return_lse=True, kv_scale=kv_scale), batch.expect(kv_scale=1.5))


@pytest.mark.parametrize("device", DEVICES)
def test_out_and_lse(device):
    batch = Latent(device, *MIXED, dtype=torch.float16)
    wrapper = plan(batch)
    output, lse = wrapper.run(*batch.arguments, return_lse=True)
    out, out_lse = torch.zeros_like(output), torch.zeros_like(lse)
    got = wrapper.run(*batch.arguments, out, out_lse, True)
    assert got[0] is out and got[1] is out_lse and torch.equal(out, output) and torch.equal(out_lse, lse)
    out_lse.zero_()
    assert wrapper.run(*batch.arguments, lse=out_lse).shape == output.shape  # alone: written, not returned
    assert torch.equal(out_lse, lse)
    natural = wrapper.run(*batch.arguments, return_lse=True, return_lse_base_on_e=True)[1]
    torch.testing.assert_close(natural, lse * math.log(2))
    assert (natural != lse).any()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_beyond_the_requests_are_padding(device):
    batch = Latent(device, *MIXED)
    longer = [torch.cat((q, q[:3])) for q in batch.queries]
    rows = batch.queries[0].shape[0]
    output, lse = plan(batch).run(*longer, *batch.caches, return_lse=True)
    check((output[:rows], lse[:rows]), batch.expect())
    assert (output[rows:] == 0).all() and (lse[rows:] == -math.inf).all()


# ---- state ----


def graph_buffers(device, batch, pages=60):
    sizes = {"qo_indptr": batch + 1, "kv_indptr": batch + 1, "kv_indices": pages, "kv_len_arr": batch}
    return {name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in sizes.items()}


LENGTHS = [MIXED, ([2] * 6, [9, 80, 40, 2, 3, 70]), ([0, 1, 0, 2, 3, 1], [0, 1, 60, 70, 3, 0])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("on_device", [False, True])
def test_cuda_graph_mode_writes_into_the_buffers(device, on_device):
    buffers = graph_buffers(device, 6)
    wrapper = fi_ops.BatchMLAPagedAttentionWrapper(empty(device), True, *buffers.values())
    assert wrapper.is_cuda_graph_enabled
    addresses = set()
    for lengths in LENGTHS:
        batch = Latent(device, *lengths, index=torch.int64)
        plan(batch, wrapper, on_device=on_device)
        for buffer, given in zip(buffers.values(), batch.table, strict=True):
            assert torch.equal(buffer[: given.shape[0]].cpu(), given.int())
        used = wrapper._qo_indptr, wrapper._kv_indptr, wrapper._kv_indices, wrapper._kv_last_page_len
        addresses.add(tuple(t.data_ptr() for t in used))
        check(wrapper.run(*batch.arguments, return_lse=True), batch.expect())
    assert len(addresses) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [False, True])
def test_a_captured_run_follows_later_plans(on_device):
    wrapper = fi_ops.BatchMLAPagedAttentionWrapper(empty("cuda"), True, *graph_buffers("cuda", 6).values())
    batches = [Latent("cuda", *lengths, dtype=torch.bfloat16, num_pages=70) for lengths in LENGTHS]
    static = [t.clone() for t in batches[0].arguments]

    def run():
        return wrapper.run(*static, return_lse=True)

    plan(batches[0], wrapper)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for batch in batches:
        for mine, given in zip(static, batch.arguments, strict=True):
            mine[: given.shape[0]].copy_(given)
        plan(batch, wrapper, on_device=on_device)
        graph.replay()
        check([t[: batch.queries[0].shape[0]] for t in results], batch.expect())


def test_nothing_needs_a_value_of_the_device():
    """On tensors of a device that have no values: what asked for one would raise."""
    batch = Latent("cpu", *MIXED)
    wrapper = fi_ops.BatchMLAPagedAttentionWrapper(torch.empty(0, device="meta"))
    table = [t.to("meta") for t in batch.table]
    wrapper.plan(*table, HEADS, CKV, KPE, batch.page_size, True, SCALE, batch.dtype, batch.kv_dtype)
    output, lse = wrapper.run(*(t.to("meta") for t in batch.arguments), return_lse=True, kv_scale=2.0)
    assert output.shape == batch.queries[0].shape and lse.shape == output.shape[:2]


# ---- torch.compile ----


@pytest.mark.parametrize("device", DEVICES)
def test_run_compiles_without_a_break_or_a_recompile(device):
    batch = Latent(device, *DECODE, num_pages=60)
    wrapper = plan(batch)
    compiled = torch.compile(lambda *tensors: wrapper.run(*tensors, return_lse=True, kv_scale=0.5), fullgraph=True)
    check(compiled(*batch.arguments), batch.expect(kv_scale=0.5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for kv_lens in ([38, 2, 91, 13, 0], [100, 3, 4, 37, 1]):  # as many pages
            batch = Latent(device, [1] * 5, kv_lens, num_pages=60)
            plan(batch, wrapper)
            check(compiled(*batch.arguments), batch.expect(kv_scale=0.5))


@pytest.mark.parametrize("device", DEVICES)
def test_plan_compiles_too(device):
    batch = Latent(device, *MIXED)
    wrapper = fi_ops.BatchMLAPagedAttentionWrapper(empty(device))

    @torch.compile(fullgraph=True)
    def step(tensors, table):
        wrapper.plan(*table, HEADS, CKV, KPE, batch.page_size, True, SCALE, batch.dtype, batch.kv_dtype)
        return wrapper.run(*tensors, return_lse=True)

    check(step(batch.arguments, [t.to(device) for t in batch.table]), batch.expect())


# ---- refusals ----


def test_refusals():
    batch = Latent("cpu", *MIXED)
    wrapper = fi_ops.BatchMLAPagedAttentionWrapper(empty("cpu"))
    q_nope, q_pe, ckv, kpe = batch.arguments
    given = dict(
        zip(("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"), batch.table, strict=True),
        num_heads=HEADS, head_dim_ckv=CKV, head_dim_kpe=KPE, page_size=4, causal=True, sm_scale=SCALE,
        q_data_type="float32", kv_data_type="float32",
    )  # fmt: skip

    def refused(match, call, **changed):
        with pytest.raises(RuntimeError, match=match):
            call(**changed)

    plan_with = lambda **changed: wrapper.plan(**(given | changed))  # noqa: E731
    run = lambda **changed: wrapper.run(*batch.arguments, **changed)  # noqa: E731
    refused(r"BatchMLAPagedAttentionWrapper.run: nothing is planned; call plan first", run)
    make = lambda **o: fi_ops.BatchMLAPagedAttentionWrapper(empty("cpu"), **o)  # noqa: E731
    refused(r"backend must be one of .* got 'fa9'", make, backend="fa9")
    refused(r"use_cuda_graph needs a buffer for kv_len_arr, got None", make, use_cuda_graph=True)
    buffers = graph_buffers("cpu", 6) | {"qo_indptr": torch.zeros(6, dtype=torch.int32)}
    refused(r"the buffer for qo_indptr must have 7 elements .* got 6", make, use_cuda_graph=True, **buffers)
    refused(r"plan: use_profiler is not supported; leave it out", plan_with, use_profiler=True)
    refused(r"plan: sm_scale must be a number, got None; pass 1/sqrt of the head_dim", plan_with, sm_scale=None)
    refused(r"plan: sm_scale must be a number, got nan", plan_with, sm_scale=math.nan)
    refused(r"plan: page_size must be 1 or more, got 0; pass the model's", plan_with, page_size=0)
    refused(r"plan: kv_indptr must have 7 elements .* got 5", plan_with, kv_indptr=batch.table[1][:5])
    refused(r"plan: kv_len_arr must have 6 elements .* got 5", plan_with, kv_len_arr=batch.table[3][:5])
    refused(r"plan: q_data_type must be .* got float8_e5m2; convert", plan_with, q_data_type="float8_e5m2")
    assert wrapper._settings is None  # nothing is planned by what was refused
    plan_with(q_data_type="float16")
    refused(r"run: q_nope must be torch.float16, as planned, got torch.float32; pass q_data_type", run)
    plan_with(kv_data_type="float8_e5m2")
    refused(r"run: ckv_cache must be torch.float8_e5m2, as planned, got torch.float32; pass kv_data_type", run)
    plan_with()
    refused(r"num_heads must be 16, as planned, got 2", lambda: wrapper.run(q_nope[:, :2], q_pe[:, :2], ckv, kpe))
    refused(r"head_dim_ckv must be 512, as planned, got 8", lambda: wrapper.run(q_nope[..., :8], q_pe, ckv, kpe))
    refused(r"head_dim_kpe must be 64, as planned, got 8", lambda: wrapper.run(q_nope, q_pe[..., :8], ckv, kpe))
    refused(r"page_size must be 4, as planned, got 3", lambda: wrapper.run(q_nope, q_pe, ckv[:, :3], kpe))
    refused(r"profiler_buffer is not supported: it is not there", run, profiler_buffer=q_pe)
    refused(r"kv_len is not supported: lengths and pages are plan's; leave it out", run, kv_len=q_pe)
    refused(r"page_table is not supported: lengths and pages are plan's", run, page_table=q_pe)
    refused(r"out must be \[20, 16, 512\] of torch.float32", run, out=q_pe)
    refused(r"lse must be \[20, 16\] of torch.float32", run, lse=q_pe)
    refused(r"fi::mla_paged_attention: kpe_cache must be", lambda: wrapper.run(q_nope, q_pe, ckv, kpe[1:]))
    refused(r"kv_scale must be \[1\] = \[1\], got \[2\]", run, kv_scale=torch.ones(2))
    plan_with(kv_len_arr=batch.table[3] - 4)  # lengths that end in another page than the table
    refused(r"fi::mla_paged_attention: kv_last_page_len must be 1 to page_size 4", run)


def test_refusals_in_cuda_graph_mode():
    wrapper = fi_ops.BatchMLAPagedAttentionWrapper(empty("cpu"), True, *graph_buffers("cpu", 6).values())
    plan(Latent("cpu", *MIXED), wrapper)
    before = [t.clone() for t in wrapper._buffers.values()]
    with pytest.raises(RuntimeError, match=r"kv_indices has 138 elements but its buffer has 60; sizes are fixed"):
        plan(Latent("cpu", [1] * 6, [90] * 6), wrapper)
    with pytest.raises(RuntimeError, match=r"the batch is fixed in CUDA graph mode at 6, got 4"):
        plan(Latent("cpu", [1] * 4, [9] * 4), wrapper)
    assert all(torch.equal(a, b) for a, b in zip(before, wrapper._buffers.values(), strict=True))
