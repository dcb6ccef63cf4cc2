"""A bias by position beside a mask of finfo.min: the op gets the mask as a fact and the bias as a small tensor, where
the bias is known to be too small to undo the mask."""

from __future__ import annotations

import pytest
import torch
from inductor_capture import capture
from test_inductor_mask_facts import CAUSAL, LOWEST, B, H, L, S, calls, check, facts, keys, made, qkv, rows


def powers(k):
    return 0.5 ** torch.arange(1, H + 1)


def exponents(k):
    return torch.exp2(-torch.arange(1, H + 1).float() * (8 / H))


def reciprocals(k):
    """MPT's; the order of the heads is changed, too."""
    slopes = 1.0 / torch.pow(2, torch.arange(1, H + 1).float() * (8 / H))
    return torch.cat([slopes[1::2], slopes[::2]])


def exponentials(k):
    return (torch.arange(H) * -0.3).exp().reciprocal().neg().abs()


SLOPES = [powers, exponents, reciprocals, exponentials]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("slopes_of", SLOPES)
def test_alibi(slopes_of, dynamic):
    def attend(q, k, v):
        scores = (q @ k.mT) * 0.25 + slopes_of(k)[:, None, None] * (keys(k) - k.shape[2] + 1)
        return scores.masked_fill(keys(k) > rows(q), LOWEST).softmax(-1) @ v

    got = check(attend, *qkv(), dynamic=dynamic)
    (call,) = calls(got)
    assert {**facts(call), "mask": None} == {**CAUSAL, "mask": None}
    assert tuple(call["mask"].meta["val"].shape[:3]) == (1, H, 1) and made(got, L, S) == []


@pytest.mark.parametrize("merged", [False, True], ids=["heads", "batch and heads"])
def test_positions_are_data(merged):
    """BLOOM with a padded prompt: whatever an int64 is, times a slope it is far from finfo.min."""

    def attend(q, k, v, live):
        bias = powers(k)[:, None] * ((live.cumsum(-1) - 1) * live)[:, None]  # [B, H, S]
        keep = (keys(k) <= rows(q))[None, None]
        if merged:
            scores = torch.baddbmm(bias.view(B * H, 1, S).to(q), q.flatten(0, 1), k.flatten(0, 1).mT)
            weights = (scores.view(B, H, L, S) + torch.where(keep, 0.0, LOWEST)).softmax(-1)
            return (weights.view(B * H, L, S) @ v.flatten(0, 1)).view(B, H, L, -1)
        return (q @ k.mT + bias[:, :, None] + torch.where(keep, 0.0, LOWEST)).softmax(-1) @ v

    live = torch.ones(B, S, dtype=torch.int64)
    live[1, :3] = 0
    got = check(attend, *qkv(), live)
    assert facts(calls(got)[0]) == {**CAUSAL, "mask": (B, H, 1, S)} and made(got, L, S) == []


def _of_floats(q, k, v, bias):
    return bias[:, None, :]


def _of_slopes_from_outside(q, k, v, bias):
    return bias[:, :1, None] * keys(k)


def _divided_by_what_may_be_0(q, k, v, bias):
    return (powers(k)[:, None] / (keys(k) - 4))[:, None]


def _that_overflows(q, k, v, bias):
    return (1e30 * powers(k)[:, None, None]) ** 2 * keys(k)


def _of_large_numbers(q, k, v, bias):
    return (-1e37 * powers(k)[:, None, None]) * keys(k)


def _of_a_negative_base(q, k, v, bias):
    return ((-2.0) ** (keys(k) * 0.5)).nan_to_num()[None]


def _masked(bias_of):
    def attend(q, k, v, bias):
        scores = q @ k.mT + bias_of(q, k, v, bias)
        return scores.masked_fill(keys(k) > rows(q), LOWEST).softmax(-1) @ v

    bias = torch.randn(H, S)
    bias[:, 0] = LOWEST  # so that no key is left to row 0, whose answer is the mean over all keys then
    return attend, *qkv(), bias


@pytest.mark.parametrize(
    "bias_of", [_of_floats, _of_slopes_from_outside, _of_large_numbers, _of_a_negative_base], ids=lambda f: f.__name__
)
def test_bias_without_bounds(bias_of):
    """It may be as low as the mask itself: then both stay one mask of numbers."""
    told = facts(calls(check(*_masked(bias_of)))[0])
    assert "causal" not in told and told["mask"][2:] == (L, S)


@pytest.mark.parametrize("bias_of", [_divided_by_what_may_be_0, _that_overflows], ids=lambda f: f.__name__)
def test_infinite_bias(bias_of):
    """Eager's answer is NaN in places, so only what the op was told is looked at."""
    assert "causal" not in facts(calls(capture(*_masked(bias_of)))[0])
