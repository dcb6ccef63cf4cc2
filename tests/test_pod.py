"""Prefill and decode in one call: one op where there is one for what is asked, or two."""

from __future__ import annotations

import pytest
import torch
from batch_cases import DEVICES, Batch, attend_dense, check, empty

import fi_ops


class Spy:
    """Counts the calls of ops, by default of attention over pages."""

    def __init__(self, monkeypatch, *names):
        self.calls = 0
        for name in names or ("paged_attention", "paged_attention_with_lse"):
            monkeypatch.setattr(torch.ops.fi, name, self._counting(getattr(torch.ops.fi, name)))

    def _counting(self, op):
        def call(*args, **kwargs):
            self.calls += 1
            return op(*args, **kwargs)

        return call

    def since(self) -> int:
        calls, self.calls = self.calls, 0
        return calls


def table(batch):
    return batch.qo_indptr, *batch.table


def prompt(device, dtype=torch.bfloat16):
    """q, k, v of a prompt with keys of its own, and what is expected of them."""
    qkv = tuple(torch.randn(n, h, 64, device=device).to(dtype) for n, h in ((9, 4), (33, 2), (33, 2)))
    return qkv, lambda **options: lambda convert: attend_dense(*(convert(t) for t in qkv), **options)


@pytest.mark.parametrize("device", DEVICES)
def test_one_prompt(device, monkeypatch):
    """A prompt with keys of its own and a decoding batch, in one op."""
    spy = Spy(monkeypatch, "pod_attention")
    decoding = Batch(device, [1] * 4, [1, 30, 9, 5], dtype=torch.bfloat16, layout="HND")
    qkv, expected = prompt(device)
    pod = fi_ops.PODWithPagedKVCacheWrapper(empty(device), "HND")
    pod.plan(*decoding.table, *decoding.sizes, decoding.page_size, data_type="bfloat16", sm_scale=0.2, window_left=7)
    args = (*qkv, decoding.q, decoding.cache)
    prefill, decode = pod.run(*args, causal_p=True, return_lse_p=True, return_lse_d=True, q_scale=2.0, k_scale=0.5)
    check(prefill, expected(causal=True))
    check(decode, decoding.expect(sm_scale=0.2, window_left=7))
    turned = qkv[0], *(t.transpose(0, 1).contiguous() for t in qkv[1:])
    prefill, decode = pod.run(*turned, *args[3:], kv_layout_p="HND", window_left_p=5, sm_scale_p=0.3, sm_scale_d=0.2)
    check([prefill], expected(window_left=5, sm_scale=0.3))
    check([decode], decoding.expect(sm_scale=0.2, window_left=7))
    assert spy.since() == 2


@pytest.mark.parametrize("device", DEVICES)
def test_one_prompt_in_two_ops(device, monkeypatch):
    """What the one op has no arguments for."""
    spy = Spy(monkeypatch, "pod_attention")
    decoding = Batch(device, [1] * 4, [1, 30, 9, 5])
    qkv, expected = prompt(device, torch.float32)
    pod = fi_ops.PODWithPagedKVCacheWrapper(empty(device))
    plan = lambda **o: pod.plan(*decoding.table, *decoding.sizes, 4, data_type="float32", **o)  # noqa: E731
    args = (*qkv, decoding.q, decoding.cache)
    plan()
    mask = torch.rand(9, 33, device=device) < 0.6
    heads = torch.tensor([0.5, 2.0], device=device)
    for given, prefill_options, decode_options in (
        ({"custom_mask_p": mask}, {"mask": mask}, {}),
        ({"pos_encoding_mode_p": "ROPE_LLAMA", "causal_p": True}, {"rope": (1.0, 1e4), "causal": True}, {}),
        ({"v_scale": 2.0}, {}, {"v_scale": 2.0}),
        ({"k_scale": heads}, {}, {"logits_scale": heads}),
    ):
        prefill, decode = pod.run(*args, **given, return_lse_p=True, return_lse_d=True)
        check(prefill, expected(**prefill_options))
        check(decode, decoding.expect(**decode_options))
    plan(pos_encoding_mode="ROPE_LLAMA")
    prefill, decode = pod.run(*args, pos_encoding_mode_d="ROPE_LLAMA")
    check([prefill], expected())
    check([decode], decoding.expect(rope=(1.0, 1e4)))
    assert spy.since() == 0


def test_refusals():
    decoding = Batch("cpu", [1] * 4, [1, 30, 9, 5], dtype=torch.bfloat16)
    (q, k, v), _ = prompt("cpu")
    pod = fi_ops.PODWithPagedKVCacheWrapper(empty("cpu"))
    args = (q, k, v, decoding.q, decoding.cache)

    def refused(match, *args, **options):
        with pytest.raises(RuntimeError, match=match):
            pod.run(*args, **options)

    refused(r"nothing is planned; call plan first", *args)
    pod.plan(*decoding.table, *decoding.sizes, 4, data_type="bfloat16")
    refused(r"window_left_d must be -1, as planned, got 5; pass it to plan", *args, window_left_d=5)
    refused(r"custom_mask_d and packed_custom_mask_d are not supported", *args, custom_mask_d=torch.ones(3))
    refused(r"kv_layout must be one of .* got 'NDH'", *args, kv_layout_p="NDH")
    refused(r"page_size must be 4, as planned, got 3", q, k, v, decoding.q, [t[:, :3] for t in decoding.cache])
    refused(r"q must be torch.bfloat16, as planned, got torch.float32", q, k, v, decoding.q.float(), decoding.cache)


@pytest.mark.parametrize("device", DEVICES)
def test_prompts_with_a_cache_of_their_own(device, monkeypatch):
    spy = Spy(monkeypatch)
    prompts = Batch(device, [40, 9], [40, 33], dtype=torch.bfloat16)
    decoding = Batch(device, [1] * 4, [1, 30, 9, 5], dtype=torch.bfloat16)
    pod = fi_ops.BatchPODWithPagedKVCacheWrapper(empty(device))
    pod.plan(*table(prompts), *table(decoding), *prompts.sizes, 4, data_type=torch.bfloat16)
    args = (prompts.q, prompts.cache, decoding.q, decoding.cache)
    for causal in (True, False):
        outputs, lses = pod.run(*args, causal_p=causal, v_scale=2.0, return_lse=True)
        check((outputs[0], lses[0]), prompts.expect(causal=causal))
        check((outputs[1], lses[1]), decoding.expect(v_scale=2.0))
        assert spy.since() == 2
    masks = prompts.random_masks()
    prefill, decode = pod.run(*args, custom_mask_p=torch.cat([m.flatten() for m in masks]), causal_p=True)
    check([prefill], prompts.expect(masks))
    check([decode], decoding.expect())


def in_one_cache(device, *, queries=1):
    """Prompts and decoding requests that are in one cache: (prompts, decoding)."""
    both = Batch(device, [40, 9, *[queries] * 4], [40, 33, 5, 30, 9, 6])
    prompts, decoding = Batch(device, [40, 9], [40, 33]), Batch(device, [queries] * 4, [5, 30, 9, 6])
    pages = int(both.kv_indptr[2])
    for batch, requests, entries in (
        (prompts, slice(0, 2), slice(0, pages)),
        (decoding, slice(2, 6), slice(pages, None)),
    ):
        batch.cache, batch.kv_indices = both.cache, both.kv_indices[entries]
        batch.kv_last_page_len = both.kv_last_page_len[requests]
        batch.keys, batch.values = both.keys[requests], both.values[requests]
    return prompts, decoding


@pytest.mark.parametrize("device", DEVICES)
def test_one_op_over_one_cache(device, monkeypatch):
    spy = Spy(monkeypatch)
    prompts, decoding = in_one_cache(device)
    pod = fi_ops.BatchPODWithPagedKVCacheWrapper(empty(device))
    longer = torch.cat((prompts.kv_indices, prompts.kv_indices[:3]))  # than kv_indptr says
    first = (prompts.qo_indptr, prompts.kv_indptr, longer, prompts.kv_last_page_len)
    plan = lambda *tables: pod.plan(*tables, *prompts.sizes, 4, q_data_type="float32", sm_scale=0.2)  # noqa: E731
    args = (prompts.q, prompts.cache, decoding.q, tuple(decoding.cache))
    expected = lambda batch, **o: batch.expect(sm_scale=0.2, **o)  # noqa: E731
    plan(*first, *table(decoding))
    for causal in (True, False):
        outputs, lses = pod.run(*args, causal_p=causal, return_lse=True)
        check((outputs[0], lses[0]), expected(prompts, causal=causal))
        check((outputs[1], lses[1]), expected(decoding))
        prefill, decode = pod.run(*args, causal_p=causal)
        check([prefill], expected(prompts, causal=causal))
        assert spy.since() == 2  # in two runs
        check([decode], expected(decoding))
    masks = prompts.random_masks()
    prefill, decode = pod.run(*args, custom_mask_p=torch.cat([m.flatten() for m in masks]))
    check([prefill], expected(prompts, masks=masks))
    check([decode], expected(decoding))
    _, decode = pod.run(*args, causal_p=True, k_scale=0.5)  # decode's alone
    check([decode], expected(decoding, logits_scale=0.5))
    assert spy.since() == 4
    plan(*first, *(t.to(device) for t in table(decoding)))
    prefill, decode = pod.run(*args, causal_p=True)
    check([prefill], expected(prompts, causal=True))
    check([decode], expected(decoding))
    assert spy.since() == (1 if device == "cpu" else 2)


def test_several_queries_of_decode_are_not_causal(monkeypatch):
    spy = Spy(monkeypatch)
    prompts, decoding = in_one_cache("cpu", queries=2)
    pod = fi_ops.BatchPODWithPagedKVCacheWrapper(empty("cpu"))
    pod.plan(*table(prompts), *table(decoding), *prompts.sizes, 4, q_data_type="float32")
    prefill, decode = pod.run(prompts.q, prompts.cache, decoding.q, decoding.cache, causal_p=True)
    check([prefill], prompts.expect(causal=True))
    check([decode], decoding.expect())
    assert spy.since() == 2


@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device):
    decoding = Batch(device, [1] * 4, [1, 30, 9, 5], dtype=torch.bfloat16)
    qkv, expected = prompt(device)
    one = fi_ops.PODWithPagedKVCacheWrapper(empty(device))
    one.plan(*decoding.table, *decoding.sizes, 4, data_type="bfloat16")
    compiled = torch.compile(lambda *t: one.run(*t, causal_p=True), fullgraph=True)
    prefill, decode = compiled(*qkv, decoding.q, decoding.cache)
    check([prefill], expected(causal=True))
    check([decode], decoding.expect())

    prompts, decoding = in_one_cache(device)
    pod = fi_ops.BatchPODWithPagedKVCacheWrapper(empty(device))
    pod.plan(*table(prompts), *table(decoding), *prompts.sizes, 4, q_data_type="float32")
    run = torch.compile(lambda q_p, q_d, cache: pod.run(q_p, cache, q_d, cache, causal_p=True), fullgraph=True)
    prefill, decode = run(prompts.q, decoding.q, prompts.cache)
    check([prefill], prompts.expect(causal=True))
    check([decode], decoding.expect())
