"""Attention of queries, keys and values of 8 bits: many rows, for products of 8 bits where a device has them, and few.

Everything is compared with float64 of what the stored values stand for. Devices that widen the tensors are held to the common
budget. Where weights meet the values in float8_e4m3fn, a weight is off by up to 2^-4 of itself, 2% to 3% as a rule, and outputs
by as much of what they are as a rule; the sum that divides has the weights as they were.
"""

from __future__ import annotations

import math

import pytest
import torch

import fi_ops
from fi_ops.library import SPECS
from fi_ops.testing import assert_within_budget, upcast

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

TYPICAL_ERROR = 0.035  # root mean square, of that of the outputs
LARGEST_ERROR = 2**-4  # of the largest output
# Of the largest LSE, besides what rounding values times scales to the output's dtype costs: products of 8 bits are summed to
# about 14 bits.
LSE_ERROR = 1e-3


def tensors(device, sizes, dtype=E4M3, behind=0, by_token=True, wider=0):
    """query, key, value of `sizes` (batch, heads, KV heads, qo_len, kv_len, head_dim), parts of larger tensors of NaN.

    `behind`: rows behind the last one; `wider`: columns behind the last one.
    """
    batch, heads, kv_heads, qo_len, kv_len, dim = sizes

    def one(num_heads, length):
        shape = (batch, length + behind, num_heads, dim + wider)
        if not by_token:
            shape = (batch, num_heads, length + behind, dim + wider)
        buffer = torch.full(shape, math.nan, device=device).to(dtype)
        part = buffer.transpose(1, 2) if by_token else buffer
        part = part[:, :, :length, :dim]
        part.view(torch.uint8).copy_(torch.randn(part.shape, device=device).to(dtype).view(torch.uint8))
        return part

    return one(heads, qo_len), one(kv_heads, kv_len), one(kv_heads, kv_len)


def scales(count, device):
    return torch.rand(count, device=device) + 0.3


REFERENCE = SPECS["attention_with_lse"].reference


def exact(args, options):
    """(output, LSE) in float64 of the values that the 8-bit ones stand for."""
    options = {name: upcast(t) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    return REFERENCE(*(upcast(t) for t in args), **options)


def check(args, typical=TYPICAL_ERROR, **options):
    """The op on `args`, with LSE and without, is what it is in float64, by the budget of weights of 8 bits."""
    output, lse = torch.ops.fi.attention_with_lse(*args, **options)
    want, want_lse = exact(args, options)
    seen = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), seen), "rows that see nothing"
    assert torch.all(lse[~seen] == -math.inf)
    rounding = (REFERENCE(*args, **options)[1].double() - want_lse)[seen].abs().max()
    error = (lse.double() - want_lse)[seen].abs().max()
    limit = 2 * rounding + LSE_ERROR * max(1.0, want_lse[seen].abs().max().item())
    assert error <= limit, f"LSE off by {error:.2e}, budget {limit:.2e}"
    for result in (output, torch.ops.fi.attention(*args, **options)):
        assert result.dtype == options.get("out_dtype", torch.bfloat16)
        assert not result[~seen].any()
        error = (result.double() - want).abs()
        worst = error.max() / want.abs().max()
        assert worst <= LARGEST_ERROR, f"off by {worst:.3f} of the largest, at {int(error.argmax())}"
        share = (error.square().mean() / want.square().mean()).sqrt()
        assert share <= typical, f"off by {share:.4f} as a rule"


def names_of(cases):
    return {"argvalues": list(cases.values()), "ids": list(cases)}


# Tiles have 128 queries of a head and 128 keys; the values are transposed 32 keys at a time.
SIZES = {
    "one tile": (1, 1, 1, 128, 128),
    "half a tile, 32 keys": (1, 1, 1, 64, 32),
    "ragged": (2, 4, 2, 300, 517),
    "one key": (1, 2, 1, 70, 1),
    "33 keys, a group of 7": (1, 7, 1, 65, 33),
    "more blocks than the GPU has": (3, 32, 8, 257, 129),
}
VARIANTS = {
    "all keys": {},
    "causal": {"causal": True},
    "causal, top-left": {"causal": True, "q_offset": 0},
    "causal, ahead of the keys": {"causal": True, "q_offset": -40},
    "window": {"causal": True, "window_left": 70},
    "window alone": {"window_left": 3},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("options", **names_of(VARIANTS))
@pytest.mark.parametrize("sizes", **names_of(SIZES))
def test_sizes_and_what_rows_see(sizes, options, dim, device):
    torch.manual_seed(0)
    check(tensors(device, (*sizes, dim)), **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("dim", [64, 128, 256, 80])
@pytest.mark.parametrize("causal", [False, True])
def test_nan_behind_the_end(causal, dim, dtype, device):
    """What lies behind the last key in memory is in the last tile, too, and of no key."""
    torch.manual_seed(0)
    check(tensors(device, (2, 4, 2, 300, 517, dim), dtype, behind=140), causal=causal)
    check(tensors(device, (1, 4, 2, 100, 200, dim), dtype, behind=1, by_token=False), causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_nan_in_keys_that_no_row_sees(dim):
    """In tiles that have keys which some row sees: a weight of 0 doesn't remove a NaN, so Hopper's kernel clears them."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("elsewhere values that a window leaves out have to be numbers")
    torch.manual_seed(0)
    args = tensors("cuda", (1, 4, 2, 100, 517, dim))
    options = {"causal": True, "window_left": 70, "q_offset": 250}
    unseen = torch.ones(517, dtype=torch.bool, device="cuda")
    unseen[250 - 70 : 250 + 100] = False
    wrong = [t.clone() for t in args]
    for t in wrong[1:]:
        t.view(torch.uint8)[:, :, unseen] = 0x7F
    for got, want in zip(
        torch.ops.fi.attention_with_lse(*wrong, **options),
        torch.ops.fi.attention_with_lse(*args, **options),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
def test_scales(sign, dim, out_dtype, device):
    """One a head and one for all; below 0, and 0: an ordinary mean."""
    torch.manual_seed(0)
    args = tensors(device, (1, 4, 2, 200, 700, dim))
    signs = torch.tensor([1.0, sign, 1.0, 1.0], device=device)
    each = {"q_scale": scales(4, device) * signs, "k_scale": scales(2, device), "v_scale": -scales(2, device)}
    check(args, causal=True, out_dtype=out_dtype, **each)
    every = {name: t[1:2] for name, t in each.items()}
    check(args, out_dtype=out_dtype, **every)
    check(args, out_dtype=out_dtype, scale=0.2, q_scale=each["q_scale"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_sinks(dim, device):
    torch.manual_seed(0)
    sinks = torch.tensor([4.0, -3.0, -math.inf, 9.0], device=device)
    check(tensors(device, (2, 4, 2, 130, 300, dim)), causal=True, sinks=sinks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_long_keys_of_a_mean(dim, device):
    """Sums of 65536 keys that don't cancel: in the precision of one product after the other a half would be lost."""
    torch.manual_seed(0)
    query, key, value = tensors(device, (1, 2, 1, 64, 65536, dim))
    around_one = (value.float() + 1).to(E4M3)
    check((query, key, around_one), typical=0.01)
    check((query, key, torch.ones_like(value.float()).to(E4M3)), typical=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_many_sizes(device):
    """Scores far apart, the largest last, first or anywhere: the origin of weights moves, and the small ones count."""
    torch.manual_seed(0)
    query, key, value = tensors(device, (1, 2, 1, 128, 2000, 128))
    for order in (slice(None), torch.arange(2000, device=device), torch.arange(2000, device=device).flip(0)):
        scores = (query.float() @ key.float().transpose(-1, -2)).mean((0, 1, 2)).argsort()[order]
        sorted_key = key.view(torch.uint8)[:, :, scores].view(E4M3)
        check((query, sorted_key, value), scale=0.3)
    check((query, key, value), scale=0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wider", [3, 8, 16])
def test_rows_apart(wider, device):
    """Rows that don't start at multiples of 16 bytes are read too, another way."""
    torch.manual_seed(0)
    check(tensors(device, (2, 4, 2, 90, 150, 128), wider=wider), causal=True)
    query, key, value = tensors(device, (1, 4, 1, 90, 150, 64))
    check((query, key.expand(-1, 2, -1, -1), value.expand(-1, 2, -1, -1)), causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_variants_that_are_widened(device):
    torch.manual_seed(0)
    args = tensors(device, (2, 4, 2, 100, 200, 128))
    mask = torch.rand(2, 1, 100, 200, device=device) > 0.4
    options = {"q_scale": scales(4, device), "k_scale": scales(1, device), "v_scale": scales(2, device)}
    check((*args, mask), **options)
    check((*args, torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)), **options)
    check(args, causal=True, alibi_slopes=torch.rand(4, device=device), logits_soft_cap=20.0, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("qo_len", [1, 5, 63])
def test_few_rows_are_as_exact_as_wide_ones(qo_len, batch, dtype, device):
    """Their weights are not rounded to 8 bits."""
    torch.manual_seed(0)
    args = tensors(device, (batch, 8, 2, qo_len, 400, 128), dtype)
    options = {"causal": True, "q_scale": scales(8, device), "k_scale": scales(2, device), "v_scale": scales(1, device)}
    output = torch.ops.fi.attention(*args, out_dtype=torch.bfloat16, **options)
    want, _ = exact(args, options)
    assert_within_budget(output, want, want.bfloat16(), "few rows")


@pytest.mark.parametrize("sizes", [(1, 4, 2, 100, 300, 128), (2, 2, 1, 70, 90, 64)])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cpu_is_as_exact_as_it_is_with_wide_tensors(sizes, out_dtype):
    torch.manual_seed(0)
    args = tensors("cpu", sizes)
    output, lse = torch.ops.fi.attention_with_lse(*args, causal=True, out_dtype=out_dtype)
    same = torch.ops.fi.attention_with_lse(*(t.to(out_dtype) for t in args), causal=True)
    assert torch.equal(output, same[0]) and torch.equal(lse, same[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("as_tensors", [False, True])
def test_single_prefill_takes_them(as_tensors, device):
    torch.manual_seed(0)
    args = tensors(device, (1, 4, 2, 150, 150, 128))
    factors = {"q_scale": 0.5, "k_scale": 1.5, "v_scale": 2.0}
    options = {name: torch.tensor([factor], device=device) for name, factor in factors.items()}
    given = options.values() if as_tensors else factors.values()
    by_token = (t[0].transpose(0, 1) for t in args)
    output = fi_ops.single_prefill_with_kv_cache(*by_token, *given, causal=True, o_dtype=torch.float32)
    want, _ = exact(args, options | {"causal": True})
    assert output.dtype == torch.float32
    error = (output.transpose(0, 1)[None].double() - want).abs().max()
    assert error <= LARGEST_ERROR * want.abs().max()
