"""Norms and gated activations beyond the sweep: extremes, and FlashInfer's argument conventions."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from fi_ops import activation, norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
def test_negative_tail_keeps_its_digits(name):
    """Far out on the negative side the value is tiny, and still right to a few float32 roundings relative to itself."""
    gate = torch.linspace(-9, 9, 4001)
    got = getattr(torch.ops.fi, name)(torch.cat((gate, torch.ones_like(gate)))[None])[0].double()
    x = gate.double()
    if name == "silu_and_mul":
        exact = x * torch.sigmoid(x)
    elif name == "gelu_and_mul":
        exact = x * 0.5 * torch.special.erfc(-x / 2**0.5)
    else:
        exact = x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))
    nonzero = exact != 0
    error = ((got - exact).abs() / exact.abs())[nonzero]
    # The exponent of e^u is rounded to float32 before the exponential: |u| <= 83 here, so |u| 2^-24 relative.
    assert error.max() < 2e-5
    assert error[(x > -3)[nonzero]].max() < 2e-6


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"])
def test_saturation_and_nan(name):
    gate = torch.tensor([0.0, -1e4, 1e4, 1e30, float("inf"), float("nan")])
    got = getattr(torch.ops.fi, name)(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    assert got[0] == 0 and got[1] == 0 and torch.equal(got[2:5], gate[2:5]) and got[5].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_flashinfer_norms(dtype):
    x, residual, w = torch.randn(7, 96).to(dtype), torch.randn(7, 96).to(dtype), torch.randn(96).to(dtype)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    plain = F.rms_norm(x.float(), (96,), w.float(), 1e-6).to(dtype)
    torch.testing.assert_close(norm.rmsnorm(x, w), plain, **tolerance)
    torch.testing.assert_close(
        norm.gemma_rmsnorm(x, w), F.rms_norm(x.float(), (96,), w.float() + 1, 1e-6).to(dtype), **tolerance
    )
    a, r = x.clone(), residual.clone()
    assert norm.fused_add_rmsnorm(a, r, w, 1e-5) is None
    total = x.float() + residual.float()
    assert torch.equal(r, total.to(dtype))
    torch.testing.assert_close(a, F.rms_norm(total, (96,), w.float(), 1e-5).to(dtype), **tolerance)
    a, r = x.clone(), residual.clone()
    norm.gemma_fused_add_rmsnorm(a, r, w)
    torch.testing.assert_close(a, F.rms_norm(total, (96,), w.float() + 1, 1e-6).to(dtype), **tolerance)
    gamma, beta = torch.randn(96), torch.randn(96)
    torch.testing.assert_close(
        norm.layernorm(x, gamma, beta), F.layer_norm(x.float(), (96,), gamma, beta, 1e-6).to(dtype), **tolerance
    )


@pytest.mark.parametrize("function", [norm.rmsnorm, norm.gemma_rmsnorm])
def test_norm_out(function):
    x, w = torch.randn(5, 64), torch.randn(64)
    expected = function(x, w)
    out = torch.empty(5, 64)
    assert function(x, w, out=out) is out and torch.equal(out, expected)
    with pytest.raises(RuntimeError, match=r"out must be \[5, 64\] of torch.float32 on cpu, got \[5, 63\]"):
        function(x, w, out=torch.empty(5, 63))
    with pytest.raises(RuntimeError, match="enable_pdl must be None or False, got True"):
        function(x, w, enable_pdl=True)
    assert function(x, w, 1e-6, x, False) is x and torch.equal(x, expected)


@pytest.mark.parametrize("name", activation.__all__)
def test_flashinfer_activations(name):
    function = getattr(activation, name)
    x = torch.randn(3, 2, 2 * 31)
    expected = getattr(torch.ops.fi, name)(x)
    out = torch.empty(3, 2, 31)
    assert torch.equal(function(x), expected)
    assert function(x, out) is out and torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="out must be"):
        function(x, torch.empty(3, 31))
    with pytest.raises(RuntimeError, match="enable_pdl must be None or False"):
        function(x, enable_pdl=True)


def test_flashinfer_signatures():
    def of(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    none = inspect.Parameter.empty
    for function in (norm.rmsnorm, norm.gemma_rmsnorm):
        assert list(of(function).items()) == [
            ("input", none),
            ("weight", none),
            ("eps", 1e-6),
            ("out", None),
            ("enable_pdl", None),
        ]
    for function in (norm.fused_add_rmsnorm, norm.gemma_fused_add_rmsnorm):
        assert list(of(function).items()) == [
            ("input", none),
            ("residual", none),
            ("weight", none),
            ("eps", 1e-6),
            ("enable_pdl", None),
        ]
    assert list(of(norm.layernorm).items()) == [("input", none), ("gemma", none), ("beta", none), ("eps", 1e-6)]
    for name in activation.__all__:
        assert list(of(getattr(activation, name)).items()) == [("input", none), ("out", None), ("enable_pdl", None)]


def test_functions_compile():
    x, w = torch.randn(4, 64), torch.randn(64)

    def call(x, w):
        a, r, out = x.clone(), x.clone(), torch.empty_like(x)
        norm.fused_add_rmsnorm(a, r, w)
        norm.gemma_fused_add_rmsnorm(r, a, w)
        norm.rmsnorm(x, w, out=out)
        gated = [getattr(activation, name)(x) for name in activation.__all__]
        return (a, r, out, norm.gemma_rmsnorm(x, w), norm.layernorm(x, w, w), *gated)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x, w)
    assert all(torch.equal(a, b) for a, b in zip(compiled, call(x, w), strict=True))
