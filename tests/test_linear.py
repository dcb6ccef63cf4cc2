"""What a sample of `linear` can't say: a row is the same, bit for bit, whatever rows it comes with; the public function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fi_ops
from fi_ops.library import SPECS
from fi_ops.testing import assert_within_budget

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(300, 1032), (37, 6000), (11, 77)])
def test_a_row_alone_gives_what_it_gives_among_others(device, dtype, out_features, in_features):
    torch.manual_seed(0)
    x = torch.randn(21, in_features, device=device).to(dtype)
    weight = (torch.randn(out_features, in_features, device=device) * in_features**-0.5).to(dtype)
    bias = torch.randn(out_features, device=device).to(dtype)
    linear = SPECS["linear"].overload
    together = linear(x, weight, bias)
    for first, rows in ((0, 1), (20, 1), (3, 2), (5, 8), (7, 9), (0, 16), (2, 17)):
        alone = linear(x[first : first + rows].clone(), weight, bias)
        torch.testing.assert_close(alone, together[first : first + rows], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_public_function(dtype):
    """torch.nn.functional.linear's meaning and arguments."""
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, 3, 100), (50, 100), (50,)))
    for args in ((x, weight), (x, weight, bias)):
        exact = F.linear(*(t.double() for t in args))
        assert_within_budget(fi_ops.linear(*args), exact, F.linear(*args), "linear")
