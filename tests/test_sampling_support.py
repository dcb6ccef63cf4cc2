"""Which tokens can be drawn at all: brute force over small rows with ties, and the sort-based reference.

What the sampling tests show, and where:

- support, token for token, of every filter and order of filters, with ties, by rational arithmetic: here (small rows);
  `test_sampling.py` (the middle of every token's interval, real vocabularies, extreme rows)
- equal to a sort-based reference over random parameters, numbers or by row: here
- distribution, by chi-square and total variation, from the seed to the token; draft chains: `test_sampling_distribution.py`
- a draw is a function of its row, its filters and its number alone: threads, batch, place in it, shared rows
  (`test_sampling.py`, `test_sampling_family.py`, `test_sampling_cuda.py`), neighbours that can't be sampled
  (`test_sampling_family.py`), seeds by row (`test_sampling.py`, `test_sampling_functions.py`)
- a captured graph draws new and right tokens at every replay: `test_sampling_cuda.py`
- CPU against CUDA, and the CPU's instruction sets against each other, token for token: `test_sampling_devices.py`
- hostile rows (NaN, infinities, denormals, zeros, negative numbers, ties, any parameters), by hypothesis: `test_sampling_family.py`
- top-k, log-probabilities, penalties, bit masks against other libraries: `test_sampling_family.py`; the Python functions and
  pipelines: `test_sampling_functions.py`; every op on every sample: `test_every_op.py`
"""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch

from fi_ops.library._sampling import kept_probs

OPS = torch.ops.fi
MODES = [
    pytest.param({"top_k_first": a, "min_p_first": b, "top_k_ties": ties}, id=f"top_k_first={a}-min_p_first={b}-{ties}")
    for a in (True, False)
    for b in (True, False)
    for ties in ("exact", "threshold")
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture
def some(pytestconfig) -> slice:
    """Which of the small rows: all, but where each draw takes milliseconds."""
    return slice(0, None, 31 if pytestconfig.getoption("--emulate-cuda") else 1)


# ------------------------------------------------------------------------------------------------ brute force


def exactly_kept(row, top_k, top_p, min_p, top_k_first, min_p_first, top_k_ties) -> dict[int, Fraction]:
    """The definition, in rational arithmetic: the kept tokens of a row of weights, and their probabilities."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    largest = row[order[0]]
    k = len(row) if top_k <= 0 or top_k >= len(row) else top_k
    kth = row[order[k - 1]]
    in_top_k = {i for n, i in enumerate(order) if (row[i] >= kth if top_k_ties == "threshold" else n < k)}
    in_min_p = {i for i in order if row[i] >= Fraction(min_p) * largest}
    counted = set(order) & (in_top_k if top_k_first else set(order)) & (in_min_p if min_p_first else set(order))
    target, before, kept = Fraction(top_p) * sum(row[i] for i in counted), Fraction(0), []
    for n, i in enumerate(order):
        in_top_p = top_p >= 1 or before < target or n == 0
        if top_p == 0:
            in_top_p = n == 0
        if in_top_p and (top_p == 0 or (i in in_top_k and i in in_min_p)) and row[i] > 0:
            kept.append(i)
        before += row[i] if i in counted else 0
    total = sum(row[i] for i in kept)
    return {i: row[i] / total for i in kept}


def small_rows(*weights: int) -> list[list[Fraction]]:
    """All rows of four of these weights, but for the one of zeros."""
    return [list(map(Fraction, row)) for row in itertools.product(weights, repeat=4) if any(row)]


def drawn(op: str, rows: torch.Tensor, filters: dict) -> torch.Tensor:
    """Which tokens 16 evenly spaced numbers draw, `[rows, vocab_size]` bool: all that have more than 1/16."""
    uniform = ((torch.arange(16, device=rows.device) + 0.5) / 16).repeat(len(rows))
    indices = torch.arange(len(rows), device=rows.device).repeat_interleave(16)
    tokens, valid = getattr(OPS, op)(rows, uniform, indices=indices, **filters)
    assert valid.all()
    drawn = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
    return drawn.scatter(1, tokens.view(len(rows), 16), True).cpu()


def ops_of(filters: dict, source: str) -> list[tuple[str, dict]]:
    """The samplers that can do it, with their arguments: one that has all filters, and those of one filter or none."""
    found = [(f"top_k_top_p_sampling_from_{source}", filters)]
    unused = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    active = [name for name in unused if filters[name] != unused[name]]
    if not active:
        found.append((f"sampling_from_{source}", {}))
    if source == "probs" and len(active) == 1:
        ties = {"top_k_ties": filters["top_k_ties"]} if active == ["top_k"] else {}
        found.append((f"{active[0]}_sampling_from_probs", {active[0]: filters[active[0]], **ties}))
    return found


@pytest.mark.parametrize("modes", MODES)
def test_every_small_row_of_probs(modes, device, some):
    """Rows from {0, 1, 2, 4}: filters that end on a tie, or just where a sum reaches top_p, which such sums can do exactly."""
    rows = small_rows(0, 1, 2, 4)[some]
    weights = torch.tensor(rows, dtype=torch.float32, device=device)
    for top_k, top_p, min_p in itertools.product((0, 1, 2, 3), (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5)):
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, **modes}
        expected = torch.zeros(len(rows), 4, dtype=torch.float64)
        for r, row in enumerate(rows):
            for i, p in exactly_kept(row, **filters).items():
                expected[r, i] = float(p)
        renormed = OPS.top_k_top_p_renorm_probs(weights, **filters).cpu().double()
        assert torch.equal(renormed > 0, expected > 0), filters
        assert (renormed - expected).abs().max() < 1e-6, filters
        for op, arguments in ops_of(filters, "probs"):
            assert torch.equal(drawn(op, weights, arguments), expected > 0), (op, filters)


@pytest.mark.parametrize("modes", MODES)
def test_every_small_row_of_logits(modes, device, some):
    """Rows of logarithms of {0, 1, 2}. Sums of exponentials are not exact, so where one is to reach top_p (or a weight
    min_p) just so, the token there may be kept or not: one of the subsets that 1e-5 more or less allows is what is kept."""
    rows = small_rows(0, 1, 2)[some]
    logits = torch.tensor(rows, dtype=torch.float64).log().float().to(device)
    either = (Fraction(1) - Fraction(1, 10**5), Fraction(1) + Fraction(1, 10**5))
    for top_k, top_p, min_p in itertools.product((0, 1, 2, 3), (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5)):
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, **modes}
        masses = [Fraction(top_p) * e for e in either] if 0 < top_p < 1 else [top_p]
        floors = [Fraction(min_p) * e for e in either] if min_p > 0 else [min_p]
        allowed = [
            {frozenset(exactly_kept(row, top_k, mass, floor, **modes)) for mass in masses for floor in floors}
            for row in rows
        ]
        softmax = OPS.top_k_top_p_softmax(logits, **filters).cpu()
        kept = [frozenset(row.nonzero().flatten().tolist()) for row in softmax]
        wrong = [(r, s) for r, s, a in zip(rows, kept, allowed, strict=True) if s not in a]
        assert not wrong, (filters, wrong[:3])
        for op, arguments in ops_of(filters, "logits"):
            assert torch.equal(drawn(op, logits, arguments), softmax > 0), (op, filters)


@pytest.mark.parametrize("ties", ["exact", "threshold"])
def test_every_small_row_of_one_filter(ties, device, some):
    """The ops that write filtered rows, those of one filter: what the definition keeps."""
    rows = small_rows(0, 1, 2, 4)[some]
    weights = torch.tensor(rows, dtype=torch.float32, device=device)
    logits = weights.log()

    def support(**filters):
        every = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "top_k_first": True, "min_p_first": False, "top_k_ties": ties}
        kept = [exactly_kept(row, **every | filters) for row in rows]
        return torch.tensor([[i in k for i in range(4)] for k in kept])

    for top_k in (0, 1, 2, 3, 4):
        expected = support(top_k=top_k)
        renormed = OPS.top_k_renorm_probs(weights, top_k=top_k, top_k_ties=ties)
        assert torch.equal(renormed.cpu() > 0, expected)
        masked = OPS.top_k_mask_logits(logits, top_k=top_k, top_k_ties=ties)
        assert torch.equal(masked.cpu() > -torch.inf, expected)  # (a weight of 0 is a logit of -inf)
    for top_p in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert torch.equal(OPS.top_p_renorm_probs(weights, top_p=top_p).cpu() > 0, support(top_p=top_p))


# ------------------------------------------------------------------------------------------------ the sort


def sorted_filter(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Min-p, then top-k, then top-p of the rest, by a sort and a running sum, in float64; each parameter by row.

    As vLLM has them: one ascending sort, whose k-th value from the end is the threshold, and a sum up to 1 - top_p.
    """
    vocab = probs.shape[1]
    probs = probs.masked_fill(probs < min_p[:, None] * probs.amax(-1, keepdim=True), 0)
    ascending, order = probs.sort(-1)
    k = torch.where(top_k <= 0, vocab, top_k).clamp_max(vocab)
    ascending = ascending.masked_fill(ascending < ascending.gather(1, (vocab - k)[:, None]), 0)
    ascending = ascending / ascending.sum(-1, keepdim=True)
    removed = ascending.cumsum(-1) <= 1 - top_p[:, None]
    removed[:, -1] = False
    ascending = ascending.masked_fill(removed, 0)
    probs = torch.zeros_like(probs).scatter(1, order, ascending)
    return probs / probs.sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(6))
def test_sort_based_reference(seed, device):
    """Random sizes, spreads and parameters by row; kept sets may differ in a token whose running sum is at top_p to 1e-6,
    and draws where the number is that near to the end of a token's interval."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values, rows=None):
        chosen = torch.tensor(values)[torch.randint(len(values), (rows or 1,), generator=generator)]
        return chosen if rows else chosen.item()

    for _ in range(12):
        rows, vocab = pick(1, 3, 7), pick(5, 130, 1000, 4097, 20_000)
        filters = {
            "top_k": pick(0, 1, 5, 50, 600, 3000, rows=rows),
            "top_p": pick(0.05, 0.5, 0.9, 0.99, 1.0, rows=rows),
            "min_p": pick(0.0, 0.0, 0.03, rows=rows),
        }
        logits = torch.randn(rows, vocab, generator=generator) * pick(0.01, 1.0, 4.0)
        uniform = torch.rand(rows, generator=generator)
        probs = logits.double().softmax(-1)
        expected = sorted_filter(probs, **{name: f.double() if name != "top_k" else f for name, f in filters.items()})
        arrays = {f"{name}_arr": f.to(device) for name, f in filters.items()} | {"min_p_first": True}
        at_the_edge = expected.where(expected > 0, 1.0).amin(-1, keepdim=True)  # the smallest that is kept
        for source, renorm, x in (("logits", "softmax", logits), ("probs", "renorm_probs", probs.float())):
            actual = getattr(OPS, f"top_k_top_p_{renorm}")(x.to(device), **arrays).cpu().double()
            apart = (actual - expected).abs()
            assert (apart <= 2 * at_the_edge.clamp_min(1e-6) + 1e-6).all(), (vocab, filters)
            assert ((actual > 0).sum(-1) - (expected > 0).sum(-1)).abs().max() <= 1, (vocab, filters)
            sampler = getattr(OPS, f"top_k_top_p_sampling_from_{source}")
            tokens = sampler(x.to(device), uniform.to(device), **arrays)[0].cpu().long()[:, None]
            same = (actual > 0).eq(expected > 0).all(-1)  # else all intervals are others
            upper, weight = expected.cumsum(-1).gather(1, tokens)[:, 0], expected.gather(1, tokens)[:, 0]
            gap = torch.maximum(upper - weight - uniform, uniform - upper)
            assert (gap[same] <= 1e-6).all() and (weight[same] > 0).all(), (vocab, filters)
            assert (actual.gather(1, tokens) > 0).all()


def test_the_reference_of_the_package_is_the_sorts():
    """`kept_probs` itself, against the sort, where no sum is near a filter's end."""
    generator = torch.Generator().manual_seed(9)
    probs = torch.randn(64, 200, generator=generator).double().softmax(-1)
    filters = {
        "top_k": torch.randint(0, 120, (64,), generator=generator),
        "top_p": torch.rand(64, generator=generator).double(),
        "min_p": torch.rand(64, generator=generator).double() * 0.1,
    }
    actual = kept_probs(probs, **filters, from_probs=True, min_p_first=True)
    assert (actual - sorted_filter(probs, **filters)).abs().max() < 1e-12
