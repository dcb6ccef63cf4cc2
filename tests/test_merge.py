"""Merging of attention states: what one sample can't say. And FlashInfer's `cascade` functions."""

from __future__ import annotations

import math

import pytest
import torch

from fi_ops import cascade


def state(length=6, heads=4, dim=64, dtype=torch.float32):
    return torch.randn(length, heads, dim).to(dtype), torch.randn(length, heads) * 4


def attention(q, k, v):
    """q [L, H, D], k and v [n, H, D] -> a state."""
    logits = torch.einsum("lhd,nhd->lhn", q, k).double() / q.shape[-1] ** 0.5
    return torch.einsum("lhn,nhd->lhd", logits.softmax(-1), v.double()), torch.logsumexp(logits, -1) / math.log(2)


def test_parts_merge_to_the_whole():
    q, k, v = torch.randn(5, 3, 64), torch.randn(90, 3, 64), torch.randn(90, 3, 64)
    whole_v, whole_s = attention(q, k, v)
    parts = [attention(q, k[a:b], v[a:b]) for a, b in ((0, 1), (1, 40), (40, 90))]
    vs, ss = (torch.stack([p[i].float() for p in parts], 1) for i in range(2))
    merged = cascade.merge_states(vs, ss)
    folded = (vs[:, 0], ss[:, 0])
    for i in (1, 2):
        folded = cascade.merge_state(*folded, vs[:, i], ss[:, i])
    for got_v, got_s in (merged, folded):
        torch.testing.assert_close(got_v.double(), whole_v, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got_s.double(), whole_s, atol=1e-6, rtol=1e-6)


def test_associative_and_commutative_within_rounding():
    a, b, c = state(), state(), state()
    left = cascade.merge_state(*cascade.merge_state(*a, *b), *c)
    right = cascade.merge_state(*a, *cascade.merge_state(*b, *c))
    swapped = cascade.merge_state(*cascade.merge_state(*b, *a), *c)
    for other in (right, swapped):
        torch.testing.assert_close(left[0], other[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(left[1], other[1], atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_empty_state_is_neutral_to_the_bit(dtype):
    v, s = state(dtype=dtype)
    garbage, empty = torch.full_like(v, math.nan), torch.full_like(s, -math.inf)
    for got in (cascade.merge_state(v, s, garbage, empty), cascade.merge_state(garbage, empty, v, s)):
        assert torch.equal(got[0], v) and torch.equal(got[1], s)
    many = cascade.merge_states(torch.stack((garbage, v, garbage), 1), torch.stack((empty, s, empty), 1))
    assert torch.equal(many[0], v) and torch.equal(many[1], s)
    nothing = cascade.merge_state(garbage, empty, garbage, empty)
    assert (nothing[0] == 0).all() and (nothing[1] == -math.inf).all()


def test_in_place_equals_out_of_place_and_honours_the_mask():
    a, b = state(), state()
    expected = cascade.merge_state(*a, *b)
    mask = torch.tensor([True, False, True, True, False, False])
    v, s = (t.clone() for t in a)
    assert cascade.merge_state_in_place(v, s, *b) is None
    assert torch.equal(v, expected[0]) and torch.equal(s, expected[1])
    v, s = (t.clone() for t in a)
    cascade.merge_state_in_place(v, s, *b, mask)
    for got, new, old in zip((v, s), expected, a, strict=True):
        assert torch.equal(got[mask], new[mask]) and torch.equal(got[~mask], old[~mask])


def test_flashinfer_converts_the_lse():
    (va, sa), (vb, sb) = state(), state()
    expected = cascade.merge_state(va, sa.double().float(), vb, sb)
    assert torch.equal(cascade.merge_state(va, sa.double(), vb, sb.double())[0], expected[0])
    with pytest.raises(RuntimeError, match="s must be float32, got float64"):
        cascade.merge_state_in_place(va, sa.double(), vb, sb)


def test_compiles():
    a, b = state(), state()

    def call(va, sa, vb, sb):
        v, s = va.clone(), sa.clone()
        cascade.merge_state_in_place(v, s, vb, sb)
        return (
            v,
            s,
            *cascade.merge_state(va, sa, vb, sb),
            *cascade.merge_states(torch.stack((va, vb), 1), torch.stack((sa, sb), 1)),
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*a, *b)
    assert all(torch.equal(x, y) for x, y in zip(compiled, call(*a, *b), strict=True))
