"""The same (seed, offset) draws the same token everywhere, except where rounding puts the draw on a boundary: how often.

The numbers of `philox_uniform` are the same on every device; what can differ is the last bits of weights, and so where one token's
interval ends and the next one's begins. Each difference must lie at such an end by float64, and there may be no more of them than
the weights' resolution allows (`sampling_tokens.py`; docs/kernels/sampling_cuda.md has the argument and the counts). `-s` prints
the counts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampling_tokens import CASES, boundaries, differing, draws_of, numbers

import fi_ops
from fi_ops import _build

BY_THE_CPU = "the CPU's kernels, or the tests themselves: minutes when draws are emulated"
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def assert_few(case, mine: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    count, mean, limit = differing(case, mine, theirs)
    print(f"{case.name}: {count} of {len(mine)} tokens differ, {what}; at most {mean:.3g} in the mean")
    assert count <= limit, f"{case.name}: {count} of {len(mine)} tokens differ, {what}; at most {limit} were expected"


@pytest.mark.gpu
@EACH
def test_cuda_draws_the_cpus_tokens(case):
    draws = draws_of(case, 1_000_000)
    assert_few(case, case.tokens(draws, "cuda"), case.tokens(draws), "CUDA and CPU")


@pytest.mark.gpu
def test_numbers_are_the_cpus():
    seeds = torch.randint(-(2**63), 2**63 - 1, (1000,), generator=torch.Generator().manual_seed(53))
    for seed in (7, seeds):
        mine = fi_ops.philox_uniform(seed if isinstance(seed, int) else seed.cuda(), 2**40 + 3, 1000, "cuda")
        assert torch.equal(mine.cpu(), fi_ops.philox_uniform(seed, 2**40 + 3, 1000))


@EACH
def test_any_number_of_threads_draws_the_same_tokens(case, pytestconfig):
    if pytestconfig.getoption("--emulate-cuda"):
        pytest.skip(BY_THE_CPU)
    threads, draws = torch.get_num_threads(), draws_of(case, 1000)
    try:
        torch.set_num_threads(1)
        expected = case.tokens(draws)
        for count in (2, 5):
            torch.set_num_threads(count)
            assert torch.equal(case.tokens(draws), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(bool(os.environ.get("FI_OPS_CPU_ISA")), reason="already held to a level")
def test_every_instruction_set_draws_the_same_tokens(tmp_path, pytestconfig):
    """Against the levels below this machine's. (With `--emulate-cuda`: the CUDA kernels against the lowest level.)"""
    draws, here, names = 4000, "CUDA, emulated", [isa.name for isa in _build.isa_levels()]
    if pytestconfig.getoption("--emulate-cuda"):
        draws, names = 300, names[:1]
    else:
        here = fi_ops.cpu_isa()
        names = names[: names.index(here)]
    script = Path(__file__).with_name("sampling_tokens.py")
    mine = {case.name: case.tokens(draws_of(case, draws)) for case in CASES}
    for name in names:
        path = tmp_path / f"{name}.pt"
        command = [sys.executable, str(script), str(draws), str(path)]
        subprocess.run(command, env={**os.environ, "FI_OPS_CPU_ISA": name}, check=True)
        theirs = torch.load(path)
        for case in CASES:
            assert_few(case, mine[case.name], theirs[case.name], f"{here} and {name}")


@pytest.mark.parametrize("shift", [1e-5, -1e-5])
def test_a_boundary_that_moves_is_seen(shift, pytestconfig):
    """What the tests would say of a CDF that is 1e-5 off, of ids off by one, of a filter left out."""
    if pytestconfig.getoption("--emulate-cuda"):
        pytest.skip(BY_THE_CPU)
    case = CASES[0]
    truth = boundaries(case)
    rows, uniform = numbers(30_000)
    right, off = (
        torch.searchsorted(truth.upper[rows], u[:, None], right=True)[:, 0].clamp(0, 999)
        for u in (uniform.double(), uniform.double() + shift)
    )
    assert_few(case, right, case.tokens(30_000), "float64 and float32")
    with pytest.raises(AssertionError, match=r"changed within|no neighbour|were expected"):
        assert_few(case, right, off, "a shifted CDF")
    with pytest.raises(AssertionError, match=r"changed within|no neighbour"):
        assert_few(case, right, (right + 1).clamp_max(999), "the next ids")
    with pytest.raises(AssertionError, match="outside of the support"):
        assert_few(CASES[1], CASES[1].tokens(30_000), right, "no top-k")
