"""Linear layers of few rows, as a decode step has them: what they cost is reading the weights, once.

Shapes: input `[..., in_features]`, weight `[out_features, in_features]`, bias `[out_features]`, all of one dtype (last dims
contiguous, other strides free: a weight may be rows of a larger one), output `[..., out_features]` contiguous. For 1 to 16 rows,
and right for any number of them. A row's result does not depend on the rows next to it.
"""

from __future__ import annotations

import torch

from ._checks import (
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from ._reference import accumulate_dtype
from ._spec import FLOATS, Cost, ErrorSample, Sample, op


def _fake(input, weight, bias=None):
    name = "linear"
    check_dtype(name, "input", input, FLOATS)
    check(name, input.dim() >= 1, lambda: "input must be [..., in_features], got a 0-d tensor; add a dimension")
    check_last_dim_contiguous(name, "input", input)
    check_same_device(name, "weight", weight, "input", input)
    check_same_dtype(name, "weight", weight, "input", input)
    check_ndim(name, "weight", weight, 2, "[out_features, in_features]")
    check_shape(name, "weight", weight, (weight.shape[0], input.shape[-1]), "[out_features, in_features]")
    check_last_dim_contiguous(name, "weight", weight)
    if bias is not None:
        check_same_device(name, "bias", bias, "input", input)
        check_same_dtype(name, "bias", bias, "input", input)
        check_shape(name, "bias", bias, (weight.shape[0],), "[out_features]")
        check_last_dim_contiguous(name, "bias", bias)
    return torch.empty((*input.shape[:-1], weight.shape[0]), dtype=input.dtype, device=input.device)


def _samples(device, dtype):
    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    yield Sample((rand(5, 256), rand(96, 256)), name="typical")
    yield Sample((rand(1, 1024), rand(512, 1024), rand(512)), name="one row, bias")
    yield Sample((rand(1024), rand(200, 1024), rand(200)), name="no row dimension")
    yield Sample((rand(2, 3, 97), rand(61, 97), rand(61)), name="3-d, odd sizes")
    for rows in (2, 7, 16, 17, 40):
        yield Sample((rand(rows, 320), rand(80, 320), rand(80)), name=f"{rows} rows")
    yield Sample((rand(8, 160)[::2, 32:], rand(100, 128)), name="strided input rows")
    yield Sample((rand(2, 2, 3, 64).transpose(1, 2), rand(40, 64)), name="transposed input rows")
    yield Sample((rand(3, 64), rand(96, 64)[32:64], rand(96)[32:64]), name="rows of a fused weight")
    yield Sample((rand(3, 72), rand(48, 144)[:, 72:]), name="columns of a wider weight")
    yield Sample((rand(4, 77), rand(35, 80)[::2, 3:]), name="unaligned strided weight")
    yield Sample((rand(1, 8197), rand(23, 8197, scale=0.05), rand(23)), name="many in_features")
    yield Sample((rand(3, 9000), rand(19, 9000, scale=0.05)), name="few rows, many in_features")
    yield Sample((rand(1, 64), rand(5003, 64)), name="many out_features")
    yield Sample((rand(16, 1), rand(3, 1), rand(3)), name="one in_feature")
    yield Sample((rand(9, 33), rand(1, 33)), name="one out_feature")
    yield Sample((rand(2, 256, scale=60.0), rand(64, 256)), name="large values")
    yield Sample((rand(0, 64), rand(8, 64), rand(8)), name="no rows")
    yield Sample((rand(3, 0), rand(8, 0), rand(8)), name="no in_features")
    yield Sample((rand(3, 16), rand(0, 16)), name="no out_features")


def _errors(device):
    x, w, b = (torch.randn(*shape, device=device) for shape in ((2, 8), (4, 8), (4,)))
    yield ErrorSample((x.double(), w), r"input must be float32, bfloat16 or float16, got float64; convert")
    yield ErrorSample((x[0, 0], w), r"input must be \[\.\.\., in_features\], got a 0-d tensor; add")
    yield ErrorSample(
        (w[:, :2].t(), w[:, :4]), r"input must have a contiguous last dimension, got strides \[1, 8\]; call"
    )
    yield ErrorSample((x, w.half()), r"weight must have input's dtype float32, got float16; convert")
    yield ErrorSample((x, b), r"weight must be \[out_features, in_features\], got \[4\]; reshape it to 2 dimensions")
    yield ErrorSample((x, w[:, :7]), r"weight must be \[out_features, in_features\] = \[4, 8\], got \[4, 7\]; check")
    yield ErrorSample(
        (x, torch.randn(8, 4, device=device).t()), r"weight must have a contiguous last dimension, got strides \[1, 4\]"
    )
    yield ErrorSample((x, w, b.half()), r"bias must have input's dtype float32, got float16; convert")
    yield ErrorSample((x, w, b[:3]), r"bias must be \[out_features\] = \[4\], got \[3\]; check")
    yield ErrorSample(
        (x, w, torch.randn(8, device=device)[::2]), r"bias must have a contiguous last dimension, got strides \[2\]"
    )
    yield ErrorSample(
        (x, w.clone().requires_grad_()), r"has no backward, got an input that requires grad; call it under"
    )


def _cost(input, weight, bias=None):
    rows = input.numel() // max(input.shape[-1], 1)
    output = rows * weight.shape[0]
    moved = input.numel() + weight.numel() + output + (0 if bias is None else bias.numel())
    return Cost(bytes=moved * input.element_size(), flops=2 * output * weight.shape[1])


@op(
    "(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    fake=_fake,
    samples=_samples,
    errors=_errors,
    cost=_cost,
)
def linear(input, weight, bias=None):
    """`input @ weight.T + bias`, for few rows of input: products and sums in float32, rounded once, after the bias.

    Each weight is read once for up to 16 rows; larger inputs are right as well, and a matrix product of their own would be faster.
    """
    dtype = accumulate_dtype(input)
    output = input.to(dtype) @ weight.to(dtype).t()
    return (output if bias is None else output + bias.to(dtype)).to(input.dtype)
