"""Draws against an exact distribution: chi-square and total variation; and the rows of logits that samplers are held against.

Both tests have a false-alarm rate of `FALSE_ALARM` for fresh random numbers; the tests' seeds are fixed, so a pass repeats.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch

FALSE_ALARM = 1e-6
_QUANTILE = 4.7534  # of the normal distribution, at 1 - FALSE_ALARM
_CELL = 50  # expected draws of a cell at the least: the tail of smaller ones is heavier than chi-square's

ROWS = ("peaked", "flat", "heavy-tailed", "real")
DEMO_MODEL = Path(__file__).resolve().parent.parent / "examples" / "demo_model"
TEXT = '''<|begin|>"""Utility functions for paths."""

import os


def join(path, *paths):
    """Join path components."""
    path = os.fspath(path)'''


@functools.cache
def row_of(name: str) -> torch.Tensor:
    """One row of logits, `[1, vocab_size]`, on the CPU: float32, the real one bfloat16 as its model is."""
    generator = torch.Generator().manual_seed(31)
    if name == "peaked":  # one token has 96% of the mass
        row = torch.randn(300, generator=generator)
        row[170] = 9.5
        return row[None]
    if name == "flat":
        return torch.randn(1, 257, generator=generator) * 0.02
    if name == "heavy-tailed":  # Zipf's law: two fifths of the mass lie behind the 100th token
        return torch.log(torch.randperm(8192, generator=generator) + 1.0).mul(-1.03)[None]
    return _of_the_demo_model()


def _of_the_demo_model() -> torch.Tensor:
    """Of the token of `TEXT` behind which the demo checkpoint is least sure, vocabulary 2,048."""
    transformers = pytest.importorskip("transformers", reason="the demo checkpoint is loaded by transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="auto").eval()
    ids = tokenizer(TEXT, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(ids).logits[0]
    probs = logits.double().softmax(-1)
    unsure = (-(probs * probs.clamp_min(1e-300).log()).sum(-1)).argmax()
    return logits[unsure][None].contiguous()


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, float]:
    """The statistic, and what it exceeds with probability FALSE_ALARM (Wilson and Hilferty's cube).

    counts, probs (float64, of sum 1): `[vocab_size]`. Rare tokens share cells of at least `_CELL` expected draws.
    """
    expected, order = (probs * counts.sum()).sort(descending=True)
    counts = counts[order].double()
    kept = expected > 0
    expected, counts = expected[kept], counts[kept]
    alone = int((expected >= _CELL).sum())
    # rare ones, the rarest first, so that what is left over at the end joins the most frequent of them
    rare = expected[alone:].flip(0)
    cell = (rare.cumsum(0) / _CELL).long()
    cell = cell.clamp_max(max(int(rare.sum() // _CELL) - 1, 0))
    cells = int(cell.max()) + 1 if len(rare) else 0
    wanted = torch.zeros(cells, dtype=torch.float64).index_add(0, cell, rare)
    seen = torch.zeros(cells, dtype=torch.float64).index_add(0, cell, counts[alone:].flip(0))
    wanted, seen = torch.cat([expected[:alone], wanted]), torch.cat([counts[:alone], seen])
    freedom = len(wanted) - 1
    if freedom == 0:
        return 0.0, 0.0
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + _QUANTILE * spread**0.5) ** 3
    return ((seen - wanted) ** 2 / wanted).sum().item(), limit


def total_variation(counts: torch.Tensor, probs: torch.Tensor) -> tuple[float, float]:
    """Half the sum of |share - probability|, and what it exceeds with a probability of at most FALSE_ALARM.

    Its mean is at most half the sum of the shares' standard deviations; one draw more or less of a token moves it by
    1 / draws, so it exceeds its mean by t with probability exp(-2 draws t^2) at most (McDiarmid).
    """
    draws = int(counts.sum())
    mean = 0.5 * (probs * (1 - probs) / draws).clamp_min(0).sqrt().sum().item()
    distance = 0.5 * (counts.double() / draws - probs).abs().sum().item()
    return distance, mean + math.sqrt(-math.log(FALSE_ALARM) / (2 * draws))


def assert_distributed(tokens: torch.Tensor, probs: torch.Tensor, what: str = "") -> None:
    """Tokens `[draws]` are in the support of probs (float64 `[vocab_size]`, of sum 1) and distributed so, by both tests."""
    counts = torch.bincount(tokens, minlength=len(probs)).cpu()
    assert len(counts) == len(probs), f"{what}: token {len(counts) - 1} of a vocabulary of {len(probs)}"
    outside = ((counts > 0) & (probs == 0)).nonzero().flatten().tolist()
    assert not outside, f"{what}: tokens outside of the support: {outside[:8]}"
    for test in (chi_square, total_variation):
        value, limit = test(counts, probs)
        assert value <= limit, f"{what}: {test.__name__.replace('_', ' ')} {value:.6g} is over {limit:.6g}"
