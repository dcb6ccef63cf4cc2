"""Attention over very long caches on a GPU: a million keys, and tensors whose offsets pass 2^31 elements."""

from __future__ import annotations

import pytest
import torch

from fi_ops.library._reference import attend
from fi_ops.testing import assert_within_budget

pytestmark = pytest.mark.gpu

MILLION = 2**20


def _check(query, key, value, mask=None, live=None):
    """Against float64 over the `live` keys, one KV head at a time (the whole would not fit)."""
    out = torch.ops.fi.attention(query, key, value, mask)
    group = query.shape[1] // key.shape[1]
    live = slice(None) if live is None else live
    position = torch.zeros(1, query.shape[2], dtype=torch.long, device=query.device)
    for head in (0, key.shape[1] - 1):
        heads = slice(head * group, (head + 1) * group)
        operands = [t[:1, s] for t, s in ((query, heads), (key, slice(head, head + 1)), (value, slice(head, head + 1)))]
        operands[1:] = [t[:, :, live] for t in operands[1:]]
        rest = (None, position, False, -1, None, 0.0, None, None)
        exact, same = attend(*(t.double() for t in operands), *rest)[0], attend(*operands, *rest)[0]
        assert_within_budget(out[:1, heads], exact, same, f"kv_len {key.shape[2]}, KV head {head}")


@pytest.mark.parametrize("qo_len", [1, 4, 33])
def test_a_million_keys(qo_len):
    query = torch.randn(1, 4, qo_len, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, 1, MILLION, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    _check(query, key, value)


def test_a_million_slots_with_few_live_ones():
    query = torch.randn(1, 4, 1, 64, device="cuda", dtype=torch.float16)
    key, value = (torch.randn(1, 2, MILLION, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    mask = torch.zeros(1, 1, 1, MILLION, dtype=torch.bool, device="cuda")
    live = torch.tensor([0, 77, 500_000, MILLION - 1], device="cuda")
    mask[..., live] = True
    _check(query, key, value, mask, live)


@pytest.mark.parametrize("qo_len", [1, 128])
def test_offsets_past_two_to_the_31(qo_len):
    """The last KV head begins 2^31 elements after the first."""
    key = torch.randn(1, 9, 2**21, 128, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, 9, qo_len, 128, device="cuda", dtype=torch.bfloat16)
    live = slice(2**21 - 3000, 2**21)
    mask = torch.zeros(1, 1, 1, 2**21, dtype=torch.bool, device="cuda")
    mask[..., live] = True
    _check(query, key, key, mask, live)
