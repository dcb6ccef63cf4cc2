"""What a sample of `linear` can't say: a row's result is the same, bit for bit, whatever rows it comes with."""

from __future__ import annotations

import pytest
import torch

from fi_ops.library import SPECS

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
