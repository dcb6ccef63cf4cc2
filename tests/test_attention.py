"""What the samples of the attention ops can't say: keys that are excluded are not read."""

from __future__ import annotations

import math

import pytest
import torch

from fi_ops.library.attention import attention
from fi_ops.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
fi = torch.ops.fi


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qo_len", [1, 40])
def test_slots_after_the_live_ones_are_not_read(dtype, qo_len):
    """A static cache whose unused slots are NaN gives the very bits of the cache cut to its live part."""
    torch.manual_seed(0)
    live, max_len = 333, 2000
    q = torch.randn(2, 8, qo_len, 64).to(dtype)
    k, v = (torch.full((2, 2, max_len, 64), math.nan).to(dtype) for _ in range(2))
    k[:, :, :live], v[:, :, :live] = (torch.randn(2, 2, live, 64).to(dtype) for _ in range(2))
    offset = live - qo_len
    got = fi.attention(q, k, v, causal=True, q_offset=offset)
    assert torch.equal(got, fi.attention(q, k[:, :, :live], v[:, :, :live], causal=True, q_offset=offset))
    if qo_len == 1:
        mask = (torch.arange(max_len) < live).view(1, 1, 1, -1)
        masked = fi.attention(q, k, v, mask)
        assert torch.isfinite(masked).all()
        torch.testing.assert_close(masked, got)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_that_a_mask_excludes_are_not_read(dtype):
    torch.manual_seed(0)
    q = torch.randn(1, 32, 8, 64).to(dtype)
    k, v = (torch.randn(1, 2, 4096, 64).to(dtype) for _ in range(2))
    mask = torch.zeros(1, 1, 1, 4096, dtype=torch.bool)
    mask[..., :1024] = mask[..., 3072:] = True
    expected = fi.attention(
        q, torch.cat((k[:, :, :1024], k[:, :, 3072:]), 2), torch.cat((v[:, :, :1024], v[:, :, 3072:]), 2)
    )
    k[:, :, 1024:3072] = v[:, :, 1024:3072] = math.nan
    torch.testing.assert_close(fi.attention(q, k, v, mask), expected)


@pytest.mark.parametrize("window_left", [0, 100])
def test_keys_outside_a_window_are_not_read(window_left):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1000, 64) for _ in range(3))
    first = 1000 - 1 - window_left
    expected = fi.attention(q[:, :, -1:], k[:, :, first:], v[:, :, first:])
    k[:, :, :first] = v[:, :, :first] = math.nan
    torch.testing.assert_close(fi.attention(q[:, :, -1:], k, v, causal=True, window_left=window_left), expected)


def test_heads_of_a_group_do_not_depend_on_each_other():
    """A group computed at once equals its heads computed one by one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 8, 3, 64), torch.randn(1, 1, 200, 64), torch.randn(1, 1, 200, 64)
    together = fi.attention(q, k, v)
    for h in range(8):
        torch.testing.assert_close(together[:, h : h + 1], fi.attention(q[:, h : h + 1], k, v))


def test_offsets_beyond_32_bits():
    """A cache of more than 2^32 elements, live at its far end only; the rest is never touched, so it costs no memory."""
    slots, live = 2**25 + 1000, 100
    k, v = (torch.empty(1, 1, slots, 128, dtype=torch.bfloat16) for _ in range(2))
    k[:, :, -live:], v[:, :, -live:] = torch.randn(2, 1, 1, live, 128)
    q, new = torch.randn(1, 4, 1, 128).bfloat16(), torch.randn(1, 1, 1, 128).bfloat16()
    fi.append_kv(k, v, new, new, torch.tensor([slots - 1]))
    assert torch.equal(k[:, :, -1:], new) and torch.equal(v[:, :, -1:], new)
    mask = torch.zeros(1, 1, 1, slots, dtype=torch.bool)
    mask[..., -live:] = True
    part = (q, k[:, :, -live:], v[:, :, -live:])
    expected, same = attention(*(t.double() for t in part)), attention(*part)
    assert_within_budget(fi.attention(q, k, v, mask), expected, same)
    assert_within_budget(fi.attention(q, k, v, window_left=live - 1), expected, same)
