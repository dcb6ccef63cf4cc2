"""What the samples of the sampler from logits can't say: intervals of its CDF, invariance, extremes, the Python function.

All seeds are fixed, so a pass or a failure repeats. (Distributions: `test_sampling_distribution.py`.)
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fi_ops
from fi_ops import _build
from fi_ops.library._sampling import kept_probs

OP = torch.ops.fi.top_k_top_p_sampling_from_logits.default
FILTERS = {
    "none": {},
    "top_k": {"top_k": 40},
    "large top_k": {"top_k": 2900},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.02},
    "top_k top_p": {"top_k": 50, "top_p": 0.9},
    "large top_k top_p": {"top_k": 2900, "top_p": 0.97},
    "all": {"top_k": 120, "top_p": 0.95, "min_p": 0.01, "temperature": 0.8},
    "all, large top_k": {"top_k": 2500, "top_p": 0.95, "min_p": 0.01, "temperature": 1.5},
    "all, min-p first": {"top_k": 120, "top_p": 0.9, "min_p": 0.01, "min_p_first": True},
    "joint": {"top_k": 60, "top_p": 0.7, "min_p": 0.01, "top_k_first": False},
    "joint, large top_k": {"top_k": 2900, "top_p": 0.7, "min_p": 0.01, "top_k_first": False},
}
FILTER_CASES = pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


def draw(row: torch.Tensor, uniforms: torch.Tensor, device: str, **options) -> torch.Tensor:
    """Many draws from one row, made on `device`; the samples are on the CPU."""
    indices = torch.zeros(uniforms.numel(), dtype=torch.int64, device=device)
    samples, valid = OP(row[None].to(device), uniforms.to(device), indices=indices, **options)
    assert valid.all()
    return samples.cpu()


def assert_draws(row: torch.Tensor, uniforms: torch.Tensor, device: str, tolerance: float = 1e-6, **options) -> None:
    """Every token is in the float64 support, and its interval of that CDF holds its uniform, up to `tolerance`."""
    probs = kept_probs(row[None], **options)[0]
    tokens, u = draw(row, uniforms, device, **options), uniforms.double()
    cdf = probs.cumsum(0)
    assert (probs[tokens] > 0).all(), "a token outside the support"
    gap = torch.maximum(cdf[tokens] - probs[tokens] - u, u - cdf[tokens]).max().item()
    assert gap <= tolerance, f"a draw is {gap:.2e} outside its token's interval"


@FILTER_CASES
@pytest.mark.parametrize("vocab", [3001, 9001])
def test_every_token_of_the_support_is_drawn_and_no_other(options, vocab, device):
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 2
    probs = kept_probs(row[None], **options)[0]
    support = (probs > 1e-7).nonzero().flatten()
    middle = (probs.cumsum(0) - probs / 2)[support].float()
    sharp = probs[support] > 1e-5  # else rounding of the uniform to float32 may leave the interval
    tokens = draw(row, middle.clamp_max(1 - 2**-24), device, **options)
    assert torch.equal(tokens[sharp], support[sharp])
    assert (probs[tokens] > 0).all()
    ends = draw(row, torch.tensor([0.0, 1 - 2**-24]), device, **options)
    kept = (probs > 0).nonzero().flatten()
    assert ends[0] == kept[0]
    assert probs[ends[1] :].sum() < 1e-6 + probs[ends[1]]


@FILTER_CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cdf_at_a_real_vocabulary(options, dtype, device):
    generator = torch.Generator().manual_seed(2)
    uniforms = torch.rand(12, generator=generator)
    for scale in (3.0, 0.01):
        assert_draws((torch.randn(128256, generator=generator) * scale).to(dtype), uniforms, device, **options)


@FILTER_CASES
def test_a_draw_depends_on_its_row_alone(options):
    """Whatever the batch (more rows than threads, fewer, permuted) and the thread count, shared rows or not."""
    generator = torch.Generator().manual_seed(3)
    logits, uniforms = torch.randn(5, 70_001, generator=generator) * 2, torch.rand(5, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = OP(logits, uniforms, **options)[0]
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(OP(logits, uniforms, **options)[0], expected)
            order = torch.tensor([3, 1, 4])
            assert torch.equal(OP(logits[order], uniforms[order], **options)[0], expected[order])
            assert OP(logits[2:3], uniforms[2:3], **options)[0] == expected[2]
            assert OP(logits, uniforms[2:3], indices=torch.tensor([2]), **options)[0] == expected[2]
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@FILTER_CASES
def test_a_draw_on_a_gpu_depends_on_its_row_alone(options):
    """A few rows have several blocks each, many rows one."""
    generator = torch.Generator().manual_seed(4)
    logits, uniforms = torch.randn(300, 20_011, generator=generator) * 2, torch.rand(300, generator=generator)
    logits, uniforms = logits.cuda(), uniforms.cuda()
    expected = OP(logits, uniforms, **options)[0]
    for rows in (slice(0, 1), slice(7, 12), slice(299, 300)):
        assert torch.equal(OP(logits[rows], uniforms[rows], **options)[0], expected[rows])


@pytest.mark.gpu
@pytest.mark.skipif(os.environ.get("FI_OPS_CHECK", "0") not in ("", "0"), reason="values are checked")
def test_values_out_of_range_are_harmless_on_a_gpu():
    logits = torch.randn(3, 1000, device="cuda")
    bad = torch.tensor([-1.0, 1.0, torch.nan, torch.inf, -torch.inf], device="cuda")
    rows = torch.tensor([-1, 3, 2**40, -(2**40), 0], device="cuda")
    samples, valid = OP(logits, bad, indices=rows)
    assert valid.tolist() == [False] * 4 + [True] and samples[:4].eq(0).all()
    for arrays in ({"top_p_arr": bad}, {"min_p_arr": bad}, {"temperature_arr": bad}, {"top_k_arr": rows}):
        samples, _ = OP(logits, bad, indices=rows.clamp(0, 2), **arrays)
        assert samples.ge(0).all() and samples.lt(1000).all()


def _levels() -> list[str]:
    names = [isa.name for isa in _build.isa_levels()]
    return names[: names.index(fi_ops.cpu_isa())]


@pytest.mark.skipif(bool(os.environ.get("FI_OPS_CPU_ISA")), reason="already held to a level")
def test_isa_levels_draw_the_same():
    """Levels differ in the last bits of a weight at most: draws are in the right intervals on each."""
    for level in _levels():
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
        command += ["-k", "real_vocabulary and dtype0 or ties or cluster"]
        run = subprocess.run(command, env={**os.environ, "FI_OPS_CPU_ISA": level}, capture_output=True, text=True)
        assert run.returncode == 0, f"with FI_OPS_CPU_ISA={level}:\n{run.stdout[-4000:]}"


EXTREMES = {
    "all equal": lambda x: torch.full_like(x, -7.25),
    "denormals": lambda x: x * 1e-40,
    "one far outlier over a tight cluster": lambda x: torch.where(torch.arange(x.numel()) == 77, 9.0, x * 1e-4),
    "the whole float range": lambda x: x.sign() * 10 ** (x.abs() * 12).clamp_max(38),
    "most masked by the lowest float": lambda x: torch.where(x < 1.5, torch.finfo(torch.float32).min, x),
    "most masked by -inf": lambda x: torch.where(x < 1.5, -torch.inf, x),
    "signed zeros": lambda x: torch.where(x < 0, -0.0, 0.0),
    "two values": lambda x: torch.where(x < 1, -1.0, 1.0),
    "two clusters of neighbours": lambda x: torch.where(x < 0, 1.0, 1.0 + 2**-20) + x.mul(4).round() * 2**-23,
    "infinities": lambda x: torch.where(x > 2, torch.inf, x),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name, device):
    """Every search ends, and ends right, however the logits lie."""
    generator = torch.Generator().manual_seed(5)
    row = EXTREMES[name](torch.randn(40_000, generator=generator))
    uniforms = torch.cat([torch.rand(4, generator=generator), torch.tensor([0.0, 1 - 2**-24])])
    for options in FILTERS.values():
        if name == "denormals" and options.get("top_p", 1.0) < 1 and options.get("min_p"):
            continue  # min_p and top_p sit on the same boundary there: float64 and float32 may differ
        for temperature in (1.0, 1e-3, 1e3):
            assert_draws(row, uniforms, device, **{**options, "temperature": temperature})


def test_ties_at_the_top_k_boundary(device):
    row = torch.zeros(128256)
    row[[5, 9]] = 1.0
    uniforms = torch.linspace(0, 1 - 2**-24, 65)
    exact = draw(row, uniforms, device, top_k=1000, top_k_ties="exact")
    assert exact.max() == 999 and exact.min() == 0
    every = draw(row, uniforms, device, top_k=1000, top_k_ties="threshold")
    assert every.max() == 128255
    top = draw(row, uniforms, device, top_k=2)
    assert set(top.tolist()) == {5, 9}
    assert set(draw(row, uniforms, device, top_k=1).tolist()) == {5}
    assert set(draw(row, uniforms, device, top_k=1, top_k_ties="threshold").tolist()) == {5, 9}
    assert draw(row, uniforms, device, temperature=0.0).eq(5).all()
    assert draw(row, uniforms, device, top_p=0.0, top_k=100).eq(5).all()


def test_top_p_splits_ties_by_id(device):
    row = torch.zeros(10_000)
    assert draw(row, torch.tensor([1 - 2**-24]), device, top_p=0.5) == 4999
    assert draw(row, torch.tensor([1 - 2**-24]), device, top_p=0.50001) == 5000


def test_rows_without_a_distribution(device):
    logits = torch.randn(6, 5000)
    logits[0, 4999], logits[1], logits[2, 0], logits[3, :-1] = torch.nan, -torch.inf, torch.nan, -torch.inf
    logits[4, 100], logits[4, 7] = torch.inf, torch.nan
    for options in (*FILTERS.values(), {"temperature": 0.0}):
        samples, valid = OP(logits.to(device), torch.full((6,), 0.5, device=device), **options)
        assert valid.tolist() == [False, False, False, True, False, True]
        assert samples[[0, 1, 2, 4]].eq(0).all() and samples[3] == 4999


# ------------------------------------------------------------------------------------------------ the Python function


def test_philox_is_the_published_one():
    """Known answers of Random123's philox4x32-10."""
    words = [torch.full((1,), 0xFFFFFFFF)] * 4
    from fi_ops._uniform import _philox_4x32_10

    assert [int(w) for w in _philox_4x32_10(words, words[:2])] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    zero = [torch.zeros(1, dtype=torch.int64)] * 4
    assert [int(w) for w in _philox_4x32_10(zero, zero[:2])] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_seeds():
    logits = torch.randn(4, 1000)
    sample = fi_ops.top_k_top_p_sampling_from_logits
    seeds, offset = torch.tensor([3, 2**40, -1, 3]), torch.tensor([5])
    tokens = sample(logits, 100, 0.9, seed=seeds, offset=offset)
    alone = [sample(logits[i : i + 1], 100, 0.9, seed=seeds[i : i + 1], offset=offset) for i in range(4)]
    assert torch.equal(tokens, torch.cat(alone))
    assert torch.equal(
        sample(logits, 0, 1.0, seed=7), sample(logits, 0, 1.0, seed=torch.tensor([7]), offset=torch.tensor([0]))
    )
    uniform = fi_ops.philox_uniform(7, 0, 1000)
    assert uniform.unique().numel() > 990 and uniform.min() >= 0 and uniform.max() < 1
    assert not torch.equal(uniform, fi_ops.philox_uniform(7, 1, 1000))


def test_function_matches_op():
    logits, uniform = torch.randn(3, 500, dtype=torch.float32), torch.tensor([0.1, 0.5, 0.9])
    sample = fi_ops.top_k_top_p_sampling_from_logits
    top_k, top_p = torch.tensor([5, 0, 9], dtype=torch.int32), torch.tensor([0.9, 0.5, 1.0])
    got = sample(logits, top_k, top_p, filter_apply_order="joint", temperature=0.7, uniform=uniform, return_valid=True)
    want = OP(logits, uniform, top_k_arr=top_k, top_p_arr=top_p, temperature=0.7, top_k_first=False)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    rows = torch.tensor([2, 0])
    assert sample(logits, 5, 0.9, rows).dtype == torch.int64
    generator = torch.Generator().manual_seed(1)
    first = sample(logits, 50, 0.9, generator=generator)
    assert torch.equal(first, sample(logits, 50, 0.9, generator=generator.manual_seed(1)))
    with pytest.raises(ValueError, match="NaN"):
        sample(logits / 0 * 0, 5, 0.9, check_nan=True)
    with pytest.raises(RuntimeError, match="filter_apply_order must be 'top_k_first' or 'joint', got 'p'"):
        sample(logits, 5, 0.9, filter_apply_order="p")
    with pytest.raises(RuntimeError, match="seed must be an int or an integer tensor"):
        sample(logits, 5, 0.9, seed=torch.tensor([1, 2]))


def test_function_compiles_fullgraph():
    sample = torch.compile(
        lambda x, seed: fi_ops.top_k_top_p_sampling_from_logits(x, 50, 0.9, seed=seed),
        fullgraph=True,
        backend="aot_eager",
    )
    fresh = torch.compile(
        lambda x: fi_ops.top_k_top_p_sampling_from_logits(x, 50, 0.9), fullgraph=True, backend="aot_eager"
    )
    logits, seeds = torch.randn(3, 400), torch.tensor([1, 2, 3])
    assert torch.equal(sample(logits, seeds), fi_ops.top_k_top_p_sampling_from_logits(logits, 50, 0.9, seed=seeds))
    tokens = torch.stack([fresh(logits) for _ in range(20)])
    assert (tokens != tokens[0]).any(), "a compiled sampler must draw new numbers at every call"
