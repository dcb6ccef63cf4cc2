"""Attention of many query rows: the random calls of `test_few_query_rows.py` with rows enough for the prefill kernels.

The sizes cross what those are cut by: blocks of 64 and 128 rows, tiles of 32 and 64 keys, the padded head dims, keys that several
blocks share.
"""

from __future__ import annotations

import pytest
import torch
from test_few_query_rows import DEVICES, random_call

from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(60))
def test_random_call(seed, device):
    op, args, kwargs = random_call(seed, device, [17, 31, 40, 64, 70, 130], [1, 1, 2, 3, 4])
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"seed {seed}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [(192, 192), (64, 128), (104, 72), (40, 300)])
def test_head_dims_between_the_padded_ones(dims, dtype, device):
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, n, dims[0], device=device).to(dtype) for heads, n in ((4, 90), (2, 150)))
    v = torch.randn(1, 2, 150, dims[1], device=device).to(dtype)
    mask = torch.rand(1, 1, 90, 150, device=device) > 0.5
    mask[..., 64:128] = False  # a tile that no row sees
    for sample in (Sample((q, k, v), {"causal": True}, "causal"), Sample((q, k, v, mask), name="mask")):
        assert_op_matches_reference(SPECS["attention_with_lse"], sample)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "window_left": 1300}])
def test_long_keys_with_values_that_only_count_alone(options, device):
    """`finfo.min` in most places: those keys weigh nothing, except for a row that has no others."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    q, k, v = (torch.randn(2, heads, n, 64, device=device).to(dtype) for heads, n in ((4, 40), (2, 1400), (2, 1400)))
    low = torch.finfo(dtype).min
    keys = torch.arange(1400, device=device)
    mask = torch.zeros(2, 1, 40, 1400, device=device, dtype=dtype).masked_fill((keys >= 300) & (keys < 1350), low)
    mask[1, :, 5] = low
    assert_op_matches_reference(SPECS["attention_with_lse"], Sample((q, k, v, mask), options, "finfo.min"))
