"""Every sampler against its exact distribution, from end to end: the Python function, its random numbers, the kernel.

Chi-square and total variation (`sampling_statistics.py`) of 100,000 draws on the CPU and 1,000,000 on CUDA, from peaked, flat,
heavy-tailed and real logits, filters as numbers and by draw. The false-alarm rate of each test, had its seed been fresh, is
1e-6; of all together below 1e-3. What they would see is in `test_the_tests_see_what_is_wrong`: a temperature 4% off, one token
more or less.
"""

from __future__ import annotations

import pytest
import torch
from sampling_statistics import ROWS, assert_distributed, row_of

import fi_ops
from fi_ops.library._sampling import kept_probs

BY_LOGITS, BY_PROBS = "top_k_top_p_sampling_from_logits", "top_k_top_p_sampling_from_probs"
LARGE = {"top_k": 1500, "top_p": 0.96875}  # (or all, where the vocabulary is small)
# Numbers that float32 has, so that a filter by draw is the same one.
CASES = [
    ("sampling_from_logits", {}),
    (BY_LOGITS, {"top_k": 20}),
    (BY_LOGITS, {"top_p": 0.875}),
    (BY_LOGITS, {"min_p": 0.0625}),
    (BY_LOGITS, {"top_k": 40, "top_p": 0.8125}),
    (BY_LOGITS, {"top_k": 40, "top_p": 0.8125, "top_k_first": False}),
    (BY_LOGITS, LARGE),
    (BY_LOGITS, {"top_k": 90, "top_p": 0.9375, "min_p": 0.03125, "temperature": 0.75, "min_p_first": True}),
    ("sampling_from_probs", {}),
    ("top_k_sampling_from_probs", {"top_k": 20}),
    ("top_p_sampling_from_probs", {"top_p": 0.875}),
    ("min_p_sampling_from_probs", {"min_p": 0.0625}),
    (BY_PROBS, {"top_k": 40, "top_p": 0.8125}),
    (BY_PROBS, LARGE | {"min_p": 0.015625, "top_k_first": False}),
]
# Four settings, of which draw i has the (i mod 4)-th.
BY_DRAW = {
    "top_k": [40, 0, 7, 1500],
    "top_p": [0.8125, 0.9375, 1.0, 0.5],
    "min_p": [0.0, 0.015625, 0.125, 0.0],
    "temperature": [1.0, 0.75, 1.5, 1.25],
}
CASES_BY_DRAW = [
    (BY_LOGITS, ("top_k", "top_p"), {}),
    (BY_LOGITS, ("top_k", "top_p"), {"top_k_first": False}),
    (BY_LOGITS, ("top_k", "top_p", "min_p", "temperature"), {"min_p_first": True}),
    ("top_k_sampling_from_probs", ("top_k",), {}),
    ("top_p_sampling_from_probs", ("top_p",), {}),
    ("min_p_sampling_from_probs", ("min_p",), {}),
    (BY_PROBS, ("top_k", "top_p", "min_p"), {"top_k_first": False}),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture
def draws(device, pytestconfig) -> int:
    if pytestconfig.getoption("--emulate-cuda"):
        return 200
    return 100_000 if device == "cpu" else 1_000_000


def source(name: str, op: str, device: str) -> torch.Tensor:
    logits = row_of(name)
    return (logits.float().softmax(-1) if op.endswith("probs") else logits).to(device)


def sample(op: str, row: torch.Tensor, draws: int, filters: dict, **randomness) -> torch.Tensor:
    """`draws` tokens `[draws]` of one row `[1, vocab_size]`."""
    filters = dict(filters)
    if op in (BY_LOGITS, BY_PROBS):
        filters = {"top_k": 0, "top_p": 1.0} | filters
        filters["filter_apply_order"] = "top_k_first" if filters.pop("top_k_first", True) else "joint"
    indices = torch.zeros(draws, dtype=torch.int32, device=row.device)
    tokens, valid = getattr(fi_ops, op)(row, indices=indices, return_valid=True, **filters, **randomness)
    assert valid.all()
    return tokens


def exact(row: torch.Tensor, op: str, filters: dict) -> torch.Tensor:
    return kept_probs(row.cpu(), from_probs=op.endswith("probs"), **filters)[0]


def case_id(value) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) or "none" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("op", "filters"), CASES, ids=case_id)
def test_distribution(op, filters, name, device, draws):
    """Numbers from one seed (logits), or from torch's generator (probabilities)."""
    row = source(name, op, device)
    randomness = {"seed": 41, "offset": CASES.index((op, filters))}
    if op.endswith("probs"):
        randomness = {"generator": torch.Generator(device).manual_seed(42)}
    assert_distributed(sample(op, row, draws, filters, **randomness), exact(row, op, filters), f"{op} {filters}")


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("op", "names", "options"), CASES_BY_DRAW, ids=case_id)
def test_distribution_by_draw(op, names, options, name, device, draws):
    """Filters by draw, and a seed for each draw: each setting has its own distribution, whatever its neighbours have."""
    row = source(name, op, device)
    filters = {n: torch.tensor(BY_DRAW[n], device=device).repeat(draws // 4) for n in names}
    seeds = torch.arange(draws, device=device) * 7 - 3
    tokens = sample(op, row, draws, filters | options, seed=seeds, offset=43)
    for setting in range(4):
        scalars = {n: BY_DRAW[n][setting] for n in names}
        assert_distributed(tokens[setting::4], exact(row, op, scalars | options), f"{op} {scalars} {options}")


@pytest.mark.parametrize("likeness", [0.2, 1.0])
def test_speculative_tokens_are_the_targets(likeness, device, draws):
    """Draft tokens drawn from the draft: the first token of the output is distributed as the target's first, and where
    the first was accepted, the second as the target's second."""
    generator = torch.Generator().manual_seed(9)
    draft_logits = torch.randn(2, 17, generator=generator)
    target_logits = torch.cat([draft_logits, torch.zeros(1, 17)]) + likeness * torch.randn(3, 17, generator=generator)
    draft, target = draft_logits.softmax(-1), target_logits.softmax(-1)
    ids = torch.stack([row.multinomial(draws, replacement=True, generator=generator) for row in draft], 1)
    uniform = torch.rand(draws, 3, generator=generator)
    args = (draft.expand(draws, -1, -1), ids, uniform, target.expand(draws, -1, -1))
    output, accepted, emitted = (
        t.cpu() for t in torch.ops.fi.chain_speculative_sampling(*(t.to(device) for t in args))
    )
    assert_distributed(output[:, 0], target[0].double() / target[0].double().sum())
    second = output[emitted >= 1, 1]
    assert_distributed(second, target[1].double() / target[1].double().sum())
    third = output[emitted == 2, 2]
    assert_distributed(third, target[2].double() / target[2].double().sum())
    assert (output[emitted == 0, 1:] == -1).all() and (output[emitted == 1, 2] == -1).all()
    assert (accepted >= emitted).all() and (accepted <= 2).all()


# What is done instead of top-k 40 from a row of Zipf's law, and what becomes of its tokens.
WRONG = {
    "temperature": ({"temperature": 1.04}, lambda tokens: tokens),
    "a token less": ({"top_k": 39}, lambda tokens: tokens),
    "a token more": ({"top_k": 41}, lambda tokens: tokens),
    "top-p": ({"top_p": 0.984375}, lambda tokens: tokens),
    "the next id": ({}, lambda tokens: tokens + 1),
    "one in ten twice": ({}, lambda tokens: torch.cat([tokens, tokens[tokens % 10 == 0]])),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_tests_see_what_is_wrong(wrong, pytestconfig):
    """100,000 draws of a sampler that is a little off are refused."""
    if pytestconfig.getoption("--emulate-cuda"):
        pytest.skip("of the tests, not of a kernel: minutes when emulated")
    row, right = -torch.arange(1.0, 201.0).log()[None], {"top_k": 40}
    probs = exact(row, BY_LOGITS, right)
    options, change = WRONG[wrong]
    if not options:
        assert_distributed(sample(BY_LOGITS, row, 100_000, right, seed=44), probs)
    tokens = change(sample(BY_LOGITS, row, 100_000, right | options, seed=44))
    with pytest.raises(AssertionError, match=r"outside of the support|chi square|total variation"):
        assert_distributed(tokens, probs)
