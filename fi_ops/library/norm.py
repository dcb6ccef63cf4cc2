"""RMSNorm (plain, with residual add, Gemma's weight + 1) and LayerNorm.

Shapes: input `[..., hidden_size]` (last dim contiguous, other strides free), weight and bias `[hidden_size]` in input's
dtype or float32. Statistics in float32. The functions of FlashInfer's `norm` module.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ._checks import (
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_writable,
)
from ._reference import accumulate_dtype
from ._spec import FLOATS, Cost, ErrorSample, Sample, op


def _check_input(name: str, x: torch.Tensor, arg: str = "input") -> None:
    check_dtype(name, arg, x, FLOATS)
    check(name, x.dim() >= 1, lambda: f"{arg} must be [..., hidden_size], got a 0-d tensor; add a dimension")
    check_last_dim_contiguous(name, arg, x)


def _check_weight(name: str, x: torch.Tensor, weight: torch.Tensor, arg: str = "weight") -> None:
    check_same_device(name, arg, weight, "input", x)
    check_dtype(name, arg, weight, tuple(dict.fromkeys((x.dtype, torch.float32))))
    check_shape(name, arg, weight, (x.shape[-1],), "[hidden_size]")
    check_last_dim_contiguous(name, arg, weight)


def _check_eps(name: str, eps: float) -> None:
    check(name, eps >= 0, lambda: f"eps must be 0 or more, got {eps:g}; pass the model's epsilon")


def _rms_fake(name: str):
    def fake(input, weight, eps=1e-6):
        _check_input(name, input)
        _check_weight(name, input, weight)
        _check_eps(name, eps)
        return torch.empty(input.shape, dtype=input.dtype, device=input.device)

    return fake


def _fused_fake(name: str):
    def fake(input, residual, weight, eps=1e-6):
        _check_input(name, input)
        check_same_device(name, "residual", residual, "input", input)
        check_same_dtype(name, "residual", residual, "input", input)
        check_shape(name, "residual", residual, input.shape, "input's shape")
        check_last_dim_contiguous(name, "residual", residual)
        _check_weight(name, input, weight)
        check_writable(name, "input", input)
        check_writable(name, "residual", residual)
        _check_eps(name, eps)

    return fake


def _layernorm_fake(input, weight, bias, eps=1e-6):
    _check_input("layernorm", input)
    _check_weight("layernorm", input, weight)
    _check_weight("layernorm", input, bias, "bias")
    _check_eps("layernorm", eps)
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


def _inputs(device, dtype, *, count: int):
    """Tensors of the shapes that matter: a typical one, odd sizes, strided rows, a single row, none."""

    def rand(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    yield "typical", [rand(5, 256) for _ in range(count)], 256
    yield "3-d odd hidden_size", [rand(2, 3, 97) for _ in range(count)], 97
    yield "strided rows", [rand(6, 4, 128)[::2, 1:3, :64] for _ in range(count)], 64
    yield "one long row", [rand(8193) for _ in range(count)], 8193
    yield "no rows", [rand(0, 64) for _ in range(count)], 64


def _samples(device, dtype):
    for name, (x,), hidden in _inputs(device, dtype, count=1):
        yield Sample((x, torch.randn(hidden, device=device).to(dtype)), name=name)
    x = torch.randn(3, 80, device=device).to(dtype)
    yield Sample((x * 100, torch.randn(80, device=device)), {"eps": 1e-5}, name="float32 weight, large values")


def _fused_samples(device, dtype):
    for name, (x, residual), hidden in _inputs(device, dtype, count=2):
        yield Sample((x, residual, torch.randn(hidden, device=device).to(dtype)), name=name)


def _layernorm_samples(device, dtype):
    for name, (x,), hidden in _inputs(device, dtype, count=1):
        weight, bias = (torch.randn(hidden, device=device).to(dtype) for _ in range(2))
        yield Sample((x + 1, weight, bias), name=name)


def _errors(device):
    x, w = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    yield ErrorSample((x, w[:7]), r"weight must be \[hidden_size\] = \[8\], got \[7\]; check")
    yield ErrorSample((x.double(), w), r"input must be float32, bfloat16 or float16, got float64; convert")
    yield ErrorSample((x, w), r"eps must be 0 or more, got nan; pass", {"eps": math.nan})
    yield ErrorSample((x, w), r"eps must be 0 or more, got -1; pass", {"eps": -1.0})
    yield ErrorSample((x, w.half()), r"weight must be float32, got float16; convert")
    yield ErrorSample((x.t(), w[:2]), r"input must have a contiguous last dimension, got strides \[1, 8\]; call")
    yield ErrorSample(
        (x, w.clone().requires_grad_()), r"has no backward, got an input that requires grad; call it under"
    )


def _fused_errors(device):
    x, w = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    yield ErrorSample((x, x.half(), w), r"residual must have input's dtype float32, got float16; convert")
    yield ErrorSample((x, x[:1].clone(), w), r"residual must be input's shape = \[2, 8\], got \[1, 8\]; check")
    yield ErrorSample((x, x.clone(), w), r"eps must be 0 or more, got nan; pass", {"eps": math.nan})
    yield ErrorSample((x, x.clone(), w[:7]), r"weight must be \[hidden_size\] = \[8\], got \[7\]; check")
    text = r"is written and must not be expanded, got strides \[0, 1\]; call"
    yield ErrorSample((x[:1].expand(2, 8), x.clone(), w), f"input {text}")
    yield ErrorSample((x, x[:1].expand(2, 8), w), f"residual {text}")


def _layernorm_errors(device):
    x, w = torch.randn(2, 8, device=device), torch.randn(8, device=device)
    yield ErrorSample((x, w, w[:3]), r"bias must be \[hidden_size\] = \[8\], got \[3\]; check")


def _cost(input, *rest, eps=1e-6):
    return Cost(bytes=2 * input.nbytes, flops=4 * input.numel())


def _fused_cost(input, residual, weight, eps=1e-6):
    return Cost(bytes=4 * input.nbytes, flops=5 * input.numel())


def _accumulate(x: torch.Tensor) -> torch.Tensor:
    return x.to(accumulate_dtype(x))


def _normalize(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


_RMS: dict[str, Any] = dict(samples=_samples, errors=_errors, cost=_cost)
_FUSED: dict[str, Any] = dict(samples=_fused_samples, errors=_fused_errors, cost=_fused_cost)


@op("(Tensor input, Tensor weight, float eps=1e-6) -> Tensor", fake=_rms_fake("rmsnorm"), **_RMS)
def rmsnorm(input, weight, eps=1e-6):
    """`input / sqrt(mean(input^2) + eps) * weight`, over the last dimension."""
    return _normalize(_accumulate(input), _accumulate(weight), eps, input.dtype)


@op("(Tensor input, Tensor weight, float eps=1e-6) -> Tensor", fake=_rms_fake("gemma_rmsnorm"), **_RMS)
def gemma_rmsnorm(input, weight, eps=1e-6):
    """`rmsnorm` with `weight + 1` (Gemma)."""
    return _normalize(_accumulate(input), _accumulate(weight) + 1, eps, input.dtype)


def _add_norm(input, residual, weight, eps):
    total = _accumulate(input) + _accumulate(residual)
    residual.copy_(total)
    input.copy_(_normalize(total, weight, eps, input.dtype))


@op(
    "(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps=1e-6) -> ()",
    fake=_fused_fake("fused_add_rmsnorm"),
    **_FUSED,
)
def fused_add_rmsnorm(input, residual, weight, eps=1e-6):
    """In place: `residual += input`, then `input = rmsnorm(residual)` (of the sum before it is rounded)."""
    _add_norm(input, residual, _accumulate(weight), eps)


@op(
    "(Tensor(a!) input, Tensor(b!) residual, Tensor weight, float eps=1e-6) -> ()",
    fake=_fused_fake("gemma_fused_add_rmsnorm"),
    **_FUSED,
)
def gemma_fused_add_rmsnorm(input, residual, weight, eps=1e-6):
    """`fused_add_rmsnorm` with `weight + 1` (Gemma)."""
    _add_norm(input, residual, _accumulate(weight) + 1, eps)


@op(
    "(Tensor input, Tensor weight, Tensor bias, float eps=1e-6) -> Tensor",
    fake=_layernorm_fake,
    samples=_layernorm_samples,
    errors=_layernorm_errors,
    cost=_cost,
)
def layernorm(input, weight, bias, eps=1e-6):
    """`(input - mean) / sqrt(var + eps) * weight + bias`, over the last dimension."""
    x = _accumulate(input)
    x = x - x.mean(-1, keepdim=True)
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (scaled * _accumulate(weight) + _accumulate(bias)).to(input.dtype)
