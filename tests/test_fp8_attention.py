"""Attention of queries, keys and values of 8 bits, against float64 of what they stand for.

Tensor cores take the weights in 8 bits too (e4m3: 3 bits of fraction, so each is off by 2^-5 at random): rms errors of 2 to 3%
of the output's, and of nothing else. LSE is of the weights as they were.
"""

from __future__ import annotations

import pytest
import torch

import fi_ops

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rows(device, heads, length, head_dim, dtype=E4M3, behind=0):
    """`[1, heads, length, head_dim]` by tokens; `behind` it lie as many tokens of NaN."""
    t = torch.randn(1, length + behind, heads, head_dim, device=device).to(dtype)
    if behind:
        t.view(torch.uint8)[:, length:] = 0x7F
    return t[:, :length].transpose(1, 2)


def expected(
    q, k, v, causal=False, window_left=-1, q_offset=None, scale=None, q_scale=None, k_scale=None, v_scale=None
):
    qo_len, kv_len, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    q, k, v = (
        t.double() * (1.0 if s is None else s.double().view(1, -1, 1, 1))
        for t, s in ((q, q_scale), (k, k_scale), (v, v_scale))
    )
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    logits = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    offset = kv_len - qo_len if q_offset is None else q_offset
    ahead = torch.arange(kv_len, device=q.device) - torch.arange(qo_len, device=q.device)[:, None] - offset
    if causal:
        logits = logits.masked_fill(ahead > 0, -torch.inf)
    if window_left >= 0:
        logits = logits.masked_fill(ahead < -window_left, -torch.inf)
    top = logits.amax(-1, keepdim=True).clamp_min(-1e300)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    return (weights @ v) / total.clamp_min(1e-300), (torch.log2(total) + top * 1.4426950408889634).squeeze(-1)


def check(q, k, v, rms=0.03, **options):
    out_dtype = options.pop("out_dtype", None)
    want, want_lse = expected(q, k, v, **options)
    got, lse = torch.ops.fi.attention_with_lse(q, k, v, out_dtype=out_dtype, **options)
    assert got.dtype == (out_dtype or torch.bfloat16)
    assert torch.isfinite(got).all()
    error = got.double() - want
    assert error.abs().max() < 0.06 * want.abs().max()
    assert error.pow(2).mean().sqrt() < rms * want.pow(2).mean().sqrt()
    seen = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    torch.testing.assert_close(lse.double()[seen], want_lse[seen], rtol=0, atol=0.02)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_head_dims_and_formats(device, dtype, head_dim, causal):
    check(*(rows(device, h, n, head_dim, dtype) for h, n in ((4, 300), (2, 517), (2, 517))), causal=causal)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {}, {"window_left": 70}, {"causal": True, "window_left": 33}, {"causal": True, "q_offset": 0}],
    ids=str,
)
@pytest.mark.parametrize("qo_len, kv_len", [(64, 32), (128, 128), (300, 517), (300, 200)])
def test_nan_behind_the_end(device, options, qo_len, kv_len):
    q, k, v = (rows(device, h, n, 128, behind=140) for h, n in ((4, qo_len), (2, kv_len), (2, kv_len)))
    check(q, k, v, **options)


@pytest.mark.parametrize("device", DEVICES)
def test_scales_of_either_sign(device):
    q, k, v = (rows(device, h, 260, 128) for h in (4, 2, 2))
    scales = {
        "q_scale": torch.tensor([0.5, 2.0, 1.0, -0.7], device=device),
        "k_scale": torch.tensor([-1.5, 0.25], device=device),
        "v_scale": torch.tensor([3.0, -0.1], device=device),
    }
    check(q, k, v, causal=True, out_dtype=torch.float32, **scales)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_output_dtypes(device, out_dtype):
    check(*(rows(device, 2, 200, 128) for _ in range(3)), scale=0.3, out_dtype=out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_long_sums(head_dim, mean):
    """Sums of weights that don't cancel: accumulators of 8-bit products alone lose half of them over 65,536 keys."""
    q, k = (rows("cuda", h, n, head_dim) for h, n in ((4, 128), (2, 65536)))
    v = (torch.randn(1, 2, 65536, head_dim, device="cuda") + mean).to(E4M3)
    check(q, k, v, rms=0.01 if mean else 0.03, out_dtype=torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_single_prefill_takes_them(device, as_tensors):
    q, k, v = (rows(device, h, 150, 128)[0].transpose(0, 1) for h in (4, 2, 2))
    factors = (0.5, 1.5, 2.0)
    scales = [torch.tensor([x], device=device) if as_tensors else x for x in factors]
    got = fi_ops.single_prefill_with_kv_cache(q, k, v, *scales, causal=True, o_dtype=torch.float32)
    tensors = {n: torch.tensor([x]).to(device) for n, x in zip(("q_scale", "k_scale", "v_scale"), factors, strict=True)}
    want, _ = expected(*(t.transpose(0, 1)[None] for t in (q, k, v)), causal=True, **tensors)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want[0].transpose(0, 1), rtol=0, atol=0.06 * want.abs().max().item())
