"""Samplers: which are rewritten and how far, the same token where there is one, the same distribution otherwise."""

from __future__ import annotations

import re

import pytest
import snippets
import torch
import torch._inductor.config
from inductor_capture import DEVICES, capture, to_device
from snippets import samplers
from test_inductor_snippets import tensors

SAMPLERS = [s for s in snippets.load().values() if s.kind == "sampling"]


def sampler_pieces(result):
    return [site.pieces for site in result.sites if site.kind == "sampling" and site.grade]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("snippet", SAMPLERS, ids=lambda s: s.name)
def test_snippet(snippet, dynamic, device):
    inputs = to_device(snippet.inputs(), device)
    expected = snippet.fn(*inputs)
    got = capture(snippet.fn, *inputs, dynamic=dynamic)
    assert not any("internal error" in r for r in got.reasons()), got.reasons()
    assert set(got.grades("sampling")) == ({snippet.grade} if snippet.grade is not None else set()), got.sites
    if snippet.reason:
        assert any(re.search(snippet.reason, r) for r in got.reasons()), got.reasons()
    for ours, plain in zip(tensors(got.output), tensors(expected), strict=True):
        assert ours.dtype == plain.dtype and ours.shape == plain.shape
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize(
    ("fn", "pieces"),
    [
        (samplers.gpt_fast, ("exponential trick", "temperature", "top-k")),
        (samplers.gumbel, ("gumbel trick",)),
        (samplers.huggingface, ("multinomial", "temperature", "top-k", "top-p")),
        (samplers.top_p_descending, ("multinomial", "top-p")),
        (samplers.plain_multinomial, ("multinomial",)),
        (samplers.half_precision_logits, ("multinomial", "temperature")),
        (samplers.top_k_keeps_five_tokens_at_the_end, ("multinomial",)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("device", DEVICES)
def test_filters_taken_into_the_op(fn, pieces, device):
    result = capture(fn, *to_device(samplers.logits(), device))
    assert sampler_pieces(result) == [pieces]
    heavy = ("aten.sort", "aten.topk", "aten.cumsum", "aten.exp.")
    left = [t for t in result.targets() if t.startswith(heavy)]
    assert not left or fn is samplers.top_k_keeps_five_tokens_at_the_end


@pytest.mark.parametrize("temperature_first", [True, False])
def test_filters_in_another_order_are_not_exchanged(temperature_first):
    """top-p before the temperature looks at another distribution than after it."""

    def fn(x):
        x = samplers.top_p_mask(x / 0.5) if temperature_first else samplers.top_p_mask(x) / 0.5
        return torch.multinomial(torch.softmax(x, -1), 1)

    result = capture(fn, *samplers.logits())
    assert sampler_pieces(result) == [
        ("multinomial", "temperature", "top-p") if temperature_first else ("multinomial", "temperature")
    ]


def test_fallback_random_is_honoured():
    with torch._inductor.config.patch(fallback_random=True):
        for fn in (samplers.plain_multinomial, samplers.gpt_fast):
            result = capture(fn, *samplers.logits())
            assert result.grades("sampling") == [""]
            assert "fallback_random" in result.reasons()[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fn", [samplers.gpt_fast, samplers.huggingface, samplers.top_p_descending])
def test_distribution(fn, device):
    """Chi-square of 20,000 draws against the probabilities that the stock code computes, at a fixed seed.

    The threshold is the 1 - 1e-6 quantile for at most 9 degrees of freedom: a right sampler fails one seed in a million.
    """
    draws, row = 20_000, torch.randn(1, 10).to(device)
    captured = {}
    original = torch.multinomial

    def keep_probabilities(probs, *args, **kwargs):
        captured["p"] = probs[0]
        return original(probs, *args, **kwargs)

    ids = capture(fn, row.expand(draws, -1).contiguous()).output.flatten().long()
    if fn is samplers.gpt_fast:
        captured["p"] = torch.softmax(samplers.top_k_mask(row / 0.8), -1)[0]
    else:
        torch.multinomial = keep_probabilities
        try:
            fn(row)
        finally:
            torch.multinomial = original
    expected = captured["p"].double() * draws
    counts = torch.bincount(ids, minlength=10).double()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 45.1


def test_two_calls_draw_two_numbers():
    """One random number a row and call: draws of one compiled function differ from call to call."""

    def fn(x):
        return torch.multinomial(torch.softmax(x, -1), 1), torch.multinomial(torch.softmax(x, -1), 1)

    result = capture(fn, torch.zeros(200, V := 1000))
    first, second = result.output
    assert (first != second).float().mean() > 0.9
    assert V > first.max() >= 0
