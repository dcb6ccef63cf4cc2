"""Every family of the zoo reaches the grades that are written down, answers within the budget, compiles no more than stock.

CI's share of `make zoo`: what stops matching, in torch, in transformers or in a recogniser, fails here with its reasons.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from zoo.families import FAMILIES
from zoo.runner import Case, cases, golden_lines, quick_cases, run
from zoo.table import END, PAGE, golden

CASES = [case for family in FAMILIES for case in quick_cases(family)]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key.replace(" ", "-"))
def test_golden(case):
    outcome, written = run(case), golden()
    reasons = {name: list(dict.fromkeys(phase.reasons)) for name, phase in outcome.phases.items()}
    expected = [f"{key}: {text}" for key, text in written.items() if key.startswith(f"{case.key}: ")]
    assert golden_lines(outcome) == expected, f"{reasons}; if this is an improvement, run `make zoo`"
    for name, phase in outcome.phases.items():
        assert phase.error <= 1, f"{name}: error is {phase.error:.3g} times its budget"


def test_compiles_are_those_of_stock():
    """A window that fills and slides: the family with the most graphs."""
    outcome = run(Case("Gemma3", "sdpa", "static"), against_stock=True)
    assert outcome.compiles == outcome.stock_compiles


def test_everything_is_written_down():
    keys = {key.partition(": ")[0] for key in golden()}
    assert keys == {case.key for family in FAMILIES for case in cases(family)}, "run `make zoo`"
    page = PAGE.read_text()
    assert END in page
    for family in FAMILIES:
        assert f"\n| {family.key} |" in page, "run `make zoo`"
