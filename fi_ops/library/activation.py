"""Gated activations of feed-forward layers: `act(input[..., :hidden_size]) * input[..., hidden_size:]`.

Shapes: input `[..., 2 * hidden_size]` (last dim contiguous, other strides free), output `[..., hidden_size]` contiguous. float32
inside, rounded once. The functions of FlashInfer's `activation` module.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ._checks import check, check_dtype, check_last_dim_contiguous, shape_of
from ._reference import accumulate_dtype
from ._spec import FLOATS, Cost, ErrorSample, Sample, op


def _fake(name: str):
    def fake(input):
        check_dtype(name, "input", input, FLOATS)
        check(
            name,
            input.shape[-1] % 2 == 0 if input.dim() else False,
            lambda: (
                f"input must be [..., 2 * hidden_size], got {shape_of(input)}; concatenate the gate and the other half"
            ),
        )
        check_last_dim_contiguous(name, "input", input)
        return torch.empty((*input.shape[:-1], input.shape[-1] // 2), dtype=input.dtype, device=input.device)

    return fake


def _samples(device, dtype):
    def rand(*shape, scale=3.0):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    yield Sample((rand(5, 512),), name="typical")
    yield Sample((rand(2, 3, 2 * 97),), name="3-d, odd hidden_size")
    yield Sample((rand(6, 4, 256)[::2, 1:3, :128],), name="strided rows")
    yield Sample((rand(1, 64).expand(4, 64),), name="expanded rows")
    yield Sample((rand(1, 2 * 40000),), name="one row, several tasks wide")
    yield Sample((rand(700, 2 * 33),), name="many short rows")
    yield Sample((rand(2),), name="one element")
    yield Sample((rand(3, 256, scale=60.0),), name="large values")
    yield Sample((rand(0, 64),), name="no rows")
    yield Sample((rand(4, 0),), name="no columns")


def _errors(device):
    x = torch.randn(4, 6, device=device)
    yield ErrorSample(
        (x[:, :5].contiguous(),), r"input must be \[\.\.\., 2 \* hidden_size\], got \[4, 5\]; concatenate"
    )
    yield ErrorSample((x[0, 0],), r"input must be \[\.\.\., 2 \* hidden_size\], got \[\]; concatenate")
    yield ErrorSample((x.double(),), r"input must be float32, bfloat16 or float16, got float64; convert")
    yield ErrorSample((x.t(),), r"input must have a contiguous last dimension, got strides \[1, 6\]; call")
    yield ErrorSample((x.clone().requires_grad_(),), r"has no backward, got an input that requires grad; call it under")


def _cost(input):
    return Cost(bytes=input.nbytes + input.nbytes // 2, flops=10 * input.numel())


def _gated(input: torch.Tensor, act) -> torch.Tensor:
    gate, up = input.to(accumulate_dtype(input)).chunk(2, -1)
    return (act(gate) * up).to(input.dtype)


_SPEC: dict[str, Any] = {"samples": _samples, "errors": _errors, "cost": _cost}


@op("(Tensor input) -> Tensor", fake=_fake("silu_and_mul"), **_SPEC)
def silu_and_mul(input):
    """`silu(gate) * up`, silu(x) = x / (1 + e^-x) (SwiGLU)."""
    return _gated(input, F.silu)


@op("(Tensor input) -> Tensor", fake=_fake("gelu_and_mul"), **_SPEC)
def gelu_and_mul(input):
    """`gelu(gate) * up` with the exact gelu, x / 2 (1 + erf(x / sqrt 2)) (GeGLU)."""
    return _gated(input, F.gelu)


@op("(Tensor input) -> Tensor", fake=_fake("gelu_tanh_and_mul"), **_SPEC)
def gelu_tanh_and_mul(input):
    """`gelu(gate) * up` with the tanh approximation of gelu."""
    return _gated(input, lambda x: F.gelu(x, approximate="tanh"))
