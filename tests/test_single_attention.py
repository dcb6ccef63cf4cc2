"""FlashInfer's single-request API: its README example, its options against a plain formula, its refusals."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

import fi_ops
from fi_ops.testing import assert_within_budget

ROOT = Path(__file__).resolve().parent.parent
HEADS, KV_HEADS, DIM = 8, 2, 64


def plain(q, k, v, allowed=None, scale=None, cap=0.0, bias=None):
    """Attention from its definition, in q's dtype: q `[qo_len, heads, dim]`, k and v NHD -> (output, LSE base 2)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    if bias is not None:
        logits = logits + bias
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(logits, -1) * math.log2(math.e)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v), lse.T


def rope_formula(x, positions, scale=1.0, theta=1e4):
    """Rotate-half RoPE of `x [len, heads, dim]` in float64."""
    dim = x.shape[-1]
    angles = positions[:, None].double() / scale * theta ** (-torch.arange(0, dim, 2).double() / dim)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def make(qo_len, kv_len, dtype=torch.float32):
    return (
        torch.randn(qo_len, HEADS, DIM).to(dtype), torch.randn(kv_len, KV_HEADS, DIM).to(dtype),
        torch.randn(kv_len, KV_HEADS, DIM).to(dtype),
    )  # fmt: skip


def causal_mask(qo_len, kv_len, window=-1):
    i, j = torch.arange(qo_len)[:, None] + kv_len - qo_len, torch.arange(kv_len)
    return (j <= i) & ((j >= i - window) if window >= 0 else torch.ones(1, dtype=torch.bool))


def check(actual, q, k, v, **options):
    double = {
        n: (o.double() if isinstance(o, torch.Tensor) and o.is_floating_point() else o) for n, o in options.items()
    }
    expected = plain(q.double(), k.double(), v.double(), **double)
    same = plain(q, k, v, **options)
    for got, want, base in zip(actual, expected, same, strict=True):
        assert_within_budget(got, want, base)


def test_readme_example():
    """FlashInfer's README: decode, append of 128 on 2048, prefill, with and without in-kernel RoPE; only the import changed."""
    out = runpy.run_path(str(ROOT / "examples" / "readme_flashinfer.py"))["run"]("cpu")
    k, v = out["k"], out["v"]
    kv_len = k.shape[0]
    positions = torch.arange(kv_len)
    checked = 0
    for call in ("decode", "decode.rope", "append", "append.rope", "prefill", "prefill.full", "prefill.rope"):
        q = out[call.split(".")[0] + ".q"]
        got, q = (out[call][None], q[None]) if call.startswith("decode") else (out[call], q)
        rows = torch.arange(0, q.shape[0], 89)  # some query rows; each is checked against all of its keys
        at = kv_len - q.shape[0] + rows
        allowed = positions <= at[:, None] if call != "prefill.full" else None
        results = []
        for dtype in (torch.float64, torch.float32):
            qq, kk, vv = q[rows].to(dtype), k.to(dtype), v.to(dtype)
            if call.endswith("rope"):
                qq, kk = (
                    rope_formula(x, p).to(torch.float16 if dtype == torch.float32 else dtype).to(dtype)
                    for x, p in ((qq, at), (kk, positions))
                )
            results.append(plain(qq, kk, vv, allowed=allowed)[0])
        assert_within_budget(got[rows], results[0], results[1].half(), call)
        checked += 1
    assert checked == 7


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 300), (33, 130), (64, 64)])
def test_prefill_options(layout, qo_len, kv_len):
    q, k, v = make(qo_len, kv_len)
    kk, vv = (k, v) if layout == "NHD" else (k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous())
    run = lambda **o: fi_ops.single_prefill_with_kv_cache(q, kk, vv, kv_layout=layout, return_lse=True, **o)  # noqa: E731
    check(run(), q, k, v)
    check(run(causal=True), q, k, v, allowed=causal_mask(qo_len, kv_len))
    check(run(causal=True, window_left=20), q, k, v, allowed=causal_mask(qo_len, kv_len, 20))
    check(run(sm_scale=0.3, logits_soft_cap=5.0), q, k, v, scale=0.3, cap=5.0)
    mask = torch.rand(qo_len, kv_len) > 0.5
    mask[:, 0] = True
    check(run(custom_mask=mask, causal=True), q, k, v, allowed=mask)  # a custom mask replaces causal
    packed = fi_ops.packbits(mask.flatten(), bitorder="little")
    check(run(packed_custom_mask=packed), q, k, v, allowed=mask)
    distance = torch.arange(kv_len) - (torch.arange(qo_len)[:, None] + kv_len - qo_len)
    slopes = 2.0 ** -torch.arange(1, HEADS + 1)
    check(
        run(pos_encoding_mode="ALIBI", causal=True), q, k, v,
        allowed=causal_mask(qo_len, kv_len), bias=slopes[:, None, None] * distance,
    )  # fmt: skip


@pytest.mark.parametrize(("qo_len", "kv_len"), [(1, 200), (40, 100)])
def test_rope_in_the_kernel(qo_len, kv_len):
    q, k, v = make(qo_len, kv_len)
    options = {"rope_scale": 2.0, "rope_theta": 5e5}
    got = fi_ops.single_prefill_with_kv_cache(
        q, k, v, causal=True, pos_encoding_mode="ROPE_LLAMA", return_lse=True, **options
    )
    positions = torch.arange(kv_len)
    turn = lambda x, at: rope_formula(x, at, 2.0, 5e5)  # noqa: E731
    expected = plain(
        turn(q.double(), positions[kv_len - qo_len :]),
        turn(k.double(), positions),
        v.double(),
        allowed=causal_mask(qo_len, kv_len),
    )
    same = plain(turn(q, positions[kv_len - qo_len :]), turn(k, positions), v, allowed=causal_mask(qo_len, kv_len))
    for a, e, s in zip(got, expected, same, strict=True):
        assert_within_budget(a, e, s)


def test_decode_is_prefill_of_one():
    q, k, v = make(1, 257, torch.bfloat16)
    for options in (
        {},
        {"pos_encoding_mode": "ROPE_LLAMA"},
        {"window_left": 50},
        {"logits_soft_cap": 3.0, "sm_scale": 0.2},
    ):
        one, lse = fi_ops.single_decode_with_kv_cache(q[0], k, v, return_lse=True, **options)
        many, lses = fi_ops.single_prefill_with_kv_cache(q, k, v, return_lse=True, **options)
        assert torch.equal(one, many[0]) and torch.equal(lse, lses[0])
        alone = fi_ops.single_decode_with_kv_cache(q[0], k, v, **options)
        assert torch.equal(alone, fi_ops.single_prefill_with_kv_cache(q, k, v, **options)[0])
        # without the LSE bfloat16 weights take a cheaper exponential: the last bit may differ
        assert (alone.float() - one.float()).abs().max() <= torch.finfo(torch.bfloat16).eps * one.float().abs().max()


def test_scales_are_applied():
    q, k, v = make(3, 50)
    base = fi_ops.single_prefill_with_kv_cache(q * 0.5 * 2.0, k, v) * 3.0
    assert torch.allclose(
        fi_ops.single_prefill_with_kv_cache(q, k, v, scale_q=0.5, scale_k=2.0, scale_v=3.0), base, atol=1e-5
    )
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([1.5, 3.0])
    expected = fi_ops.single_prefill_with_kv_cache(q, k * k_scale[:, None], v * v_scale[:, None])
    assert torch.allclose(
        fi_ops.single_prefill_with_kv_cache(q, k, v, scale_k=k_scale, scale_v=v_scale), expected, atol=1e-5
    )
    assert fi_ops.single_prefill_with_kv_cache(q, k, v, o_dtype=torch.bfloat16).dtype == torch.bfloat16


def test_compiles_fullgraph():
    q, k, v = make(4, 60)

    def f(q, k, v):
        return fi_ops.single_prefill_with_kv_cache(q, k, v, causal=True, pos_encoding_mode="ROPE_LLAMA")

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), f(q, k, v))


def test_alibi_slopes():
    assert fi_ops.get_alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = fi_ops.get_alibi_slopes(12)
    assert twelve.shape == (12,) and twelve[8] == pytest.approx(2**-0.5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kv_layout": "HDN"}, r"kv_layout must be one of .*got 'HDN'"),
        ({"pos_encoding_mode": "YARN"}, r"pos_encoding_mode must be one of .*got 'YARN'"),
        (
            {"custom_mask": torch.ones(3, 51, dtype=torch.bool)},
            r"custom_mask must be bool \[qo_len, kv_len\] = \[3, 50\]",
        ),
        (
            {"packed_custom_mask": torch.ones(3, dtype=torch.uint8)},
            r"packed_custom_mask must be uint8 with at least 19 bytes",
        ),
        ({"window_left": -3}, r"window_left must be -1"),
        ({"backend": "fa9"}, r"backend must be one of"),
    ],
)
def test_refusals(change, match):
    q, k, v = make(3, 50)
    with pytest.raises(RuntimeError, match=match):
        fi_ops.single_prefill_with_kv_cache(q, k, v, **change)
