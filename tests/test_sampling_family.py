"""What samples can't say of the sampling family: exactness by brute force, other references, invariance, distribution.

All seeds are fixed, so a pass or a failure repeats. False-alarm rate of the chi-square tests, had the seeds been fresh: 1e-6
each.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fi_ops
from fi_ops.library._sampling import kept_probs

OPS = torch.ops.fi
RELAXED = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


# ------------------------------------------------------------------------------------------------ brute force


def exactly_kept(row, top_k, top_p, min_p, top_k_first, min_p_first, ties) -> dict[int, Fraction]:
    """The definition, in rational arithmetic: the kept tokens of a row of weights, and their probabilities."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    largest = row[order[0]]
    k = len(row) if top_k <= 0 or top_k >= len(row) else top_k
    kth = row[order[k - 1]]
    in_top_k = {i for n, i in enumerate(order) if (row[i] >= kth if ties == "threshold" else n < k)}
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


@pytest.mark.parametrize("ties", ["exact", "threshold"])
@pytest.mark.parametrize("top_k_first", [True, False])
@pytest.mark.parametrize("min_p_first", [True, False])
def test_every_small_row_with_ties(ties, top_k_first, min_p_first, device):
    """All rows of four weights from {0, 1, 2, 4}: filters that end on a tie, or just where a sum reaches top_p."""
    rows = [row for row in itertools.product((0, 1, 2, 4), repeat=4) if any(row)]
    weights = torch.tensor(rows, dtype=torch.float32, device=device)
    modes = {"top_k_first": top_k_first, "min_p_first": min_p_first, "top_k_ties": ties}
    for top_k, top_p, min_p in itertools.product((0, 1, 2, 3), (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5)):
        expected = torch.zeros(len(rows), 4, dtype=torch.float64)
        for r, row in enumerate(rows):
            for i, p in exactly_kept(list(map(Fraction, row)), top_k, top_p, min_p, **modes_of(modes)).items():
                expected[r, i] = float(p)
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, **modes}
        renormed = OPS.top_k_top_p_renorm_probs(weights, **filters).cpu().double()
        assert torch.equal(renormed > 0, expected > 0), filters
        assert (renormed - expected).abs().max() < 1e-6, filters
        for u in (0.0, 0.3, 0.7, 1 - 2**-24):
            uniform = torch.full((len(rows),), u, device=device)
            samples, valid = OPS.top_k_top_p_sampling_from_probs(weights, uniform, **filters)
            assert valid.all()
            assert (expected.gather(1, samples.cpu().long()[:, None]) > 0).all(), (filters, u)


def modes_of(modes: dict) -> dict:
    return {**{key: modes[key] for key in ("top_k_first", "min_p_first")}, "ties": modes["top_k_ties"]}


# ------------------------------------------------------------------------------------------------ other references


def sorted_filter(probs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Top-k, then top-p of the rest, as Hugging Face's processors have them: by a sort and a running sum, in float64."""
    if top_k > 0:
        probs = probs.masked_fill(probs < probs.topk(min(top_k, probs.shape[-1]), -1).values[:, -1:], 0)
        probs = probs / probs.sum(-1, keepdim=True)
    ascending, order = probs.sort(-1)
    removed = ascending.cumsum(-1) <= 1 - top_p
    removed[:, -1] = False
    probs = probs.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), 0)
    return probs / probs.sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(6))
def test_sort_based_reference(seed, device):
    """Random sizes, spreads and parameters; kept sets may differ in a token whose running sum is at top_p to 1e-6."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=generator))]

    for _ in range(12):
        rows, vocab = pick(1, 3, 7), pick(5, 130, 1000, 4097, 20_000)
        top_k, top_p = pick(0, 1, 5, 50, 600, 3000), pick(0.05, 0.5, 0.9, 0.99, 1.0)
        logits = torch.randn(rows, vocab, generator=generator) * pick(0.01, 1.0, 4.0)
        expected = sorted_filter(logits.double().softmax(-1), top_k, top_p)
        from_logits = OPS.top_k_top_p_softmax(logits.to(device), top_k=top_k, top_p=top_p).cpu().double()
        probs = logits.double().softmax(-1).float().to(device)
        from_probs = OPS.top_k_top_p_renorm_probs(probs, top_k=top_k, top_p=top_p).cpu().double()
        for actual in (from_logits, from_probs):
            apart = (actual - expected).abs()
            at_the_edge = expected.where(expected > 0, 1.0).amin(-1, keepdim=True)  # the smallest that is kept
            assert (apart <= 2 * at_the_edge.clamp_min(1e-6) + 1e-6).all(), (vocab, top_k, top_p)
            assert ((actual > 0).sum(-1) - (expected > 0).sum(-1)).abs().max() <= 1, (vocab, top_k, top_p)


def test_top_k_is_torchs(device):
    generator = torch.Generator().manual_seed(1)
    for vocab, k in ((7, 7), (1000, 40), (50_000, 1), (50_000, 300), (50_000, 9000)):
        x = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(3)]) - vocab / 2.0  # no ties
        values, indices = (t.cpu() for t in OPS.top_k(x.to(device), k))
        expected = x.topk(k)
        assert torch.equal(values, expected.values) and torch.equal(indices, expected.indices)
        by_id = OPS.top_k(x.to(device), k, sorted=False)[1].cpu()
        assert torch.equal(by_id, expected.indices.sort(-1).values)


@pytest.mark.parametrize("seed", range(3))
def test_top_k_ties_are_by_id(seed, device):
    x = torch.randint(0, 3, (20, 9), generator=torch.Generator().manual_seed(seed)).float()
    for k in range(1, 10):
        expected = torch.tensor([sorted(range(9), key=lambda i, row=row: (-row[i], i))[:k] for row in x.tolist()])
        assert torch.equal(OPS.top_k(x.to(device), k)[1].cpu(), expected)
        masked = OPS.top_k_mask_logits(x.to(device), top_k=k).cpu()
        assert torch.equal((masked > -math.inf), torch.zeros(20, 9, dtype=torch.bool).scatter(1, expected, True))


def test_mask_keeps_the_bits_of_what_it_keeps(device):
    generator = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = (torch.randn(4, 9000, generator=generator) * 4).to(dtype)
        x[1, ::7], x[2, 5] = -0.0, math.inf
        for top_k in (0, 1, 30, 8000):
            masked = OPS.top_k_mask_logits(x.to(device), top_k=top_k).cpu()
            kept = masked > -math.inf
            assert torch.equal(masked[kept].view(torch.uint8), x[kept].view(torch.uint8))
            assert (kept.sum(-1) == (top_k or 9000)).all()


def test_logprobs_are_torchs(device):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 30_000, generator=generator) * 5
    tokens = torch.randint(0, 30_000, (5,), generator=generator)
    logprobs, ranks, top, ids = (t.cpu() for t in OPS.gather_logprobs(logits.to(device), tokens.to(device), 10))
    expected = logits.double().log_softmax(-1)
    assert (logprobs - expected.gather(1, tokens[:, None])[:, 0]).abs().max() < 1e-5
    assert torch.equal(ranks, (logits >= logits.gather(1, tokens[:, None])).sum(-1))
    assert torch.equal(ids, logits.topk(10).indices) and (top - expected.gather(1, ids)).abs().max() < 1e-5
    for r in (1, 4, 10):  # a token of rank r is the r-th of the top ids
        assert (OPS.gather_logprobs(logits.to(device), ids[:, r - 1].to(device))[1] == r).all()


def test_processors_are_hugging_faces(device):
    from transformers import RepetitionPenaltyLogitsProcessor

    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 500, generator=generator)
    prompt = torch.randint(0, 500, (3, 40), generator=generator)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits.clone())
    mask = torch.zeros(3, 500, dtype=torch.bool).scatter(1, prompt, True)
    actual = fi_ops.apply_logits_processors(logits.to(device), prompt_mask=mask.to(device), repetition_penalty=1.3)
    assert (actual.cpu() - expected).abs().max() < 1e-6


def test_bitmask_is_xgrammars(device):
    """Bit t % 32 of word t // 32, the sign bit included."""
    vocab = 101
    allowed = torch.rand(4, vocab, generator=torch.Generator().manual_seed(5)) < 0.5
    words = torch.zeros(4, 4, dtype=torch.int64)
    for t in range(vocab):
        words[:, t // 32] |= allowed[:, t].long() << (t % 32)
    bitmask = torch.where(words >= 2**31, words - 2**32, words).int()
    logits = torch.randn(4, vocab).to(device)
    masked = fi_ops.apply_token_bitmask(logits, bitmask.to(device))
    assert torch.equal(masked.cpu(), logits.cpu().masked_fill(~allowed, -math.inf))


# ------------------------------------------------------------------------------------------------ hostile rows

FLOATS = st.one_of(
    st.floats(width=32),
    st.sampled_from(
        [0.0, -0.0, 1.0, 1e-45, -1e-45, 3.4028234663852886e38, -3.4028234663852886e38, math.inf, -math.inf]
    ),
    st.floats(-20, 20, width=32),
)
PARAMETERS = st.fixed_dictionaries(
    {
        "top_k": st.integers(-2, 12),
        "top_p": st.one_of(st.sampled_from([0.0, 1.0, 2.0, 1e-30, 0.9999999]), st.floats(0, 1.5, width=32)),
        "min_p": st.one_of(st.sampled_from([0.0, 1.0, 1e-30]), st.floats(0, 1, width=32)),
        "top_k_first": st.booleans(),
        "min_p_first": st.booleans(),
        "top_k_ties": st.sampled_from(["exact", "threshold"]),
    }
)


@RELAXED
@given(
    row=st.lists(FLOATS, min_size=1, max_size=20),
    copies=st.sampled_from([1, 3, 500]),
    parameters=PARAMETERS,
    temperature=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 1e30]),
    u=st.floats(0, 1 - 2**-24, width=32),
)
def test_hostile_rows(row, copies, parameters, temperature, u):
    """Whatever a row has, the id is in range and drawn from what can be kept, or the row is said to be invalid."""
    x = torch.tensor(row, dtype=torch.float32).repeat(copies)[None]
    uniform = torch.tensor([u])
    for from_probs in (False, True):
        options = parameters if from_probs else {**parameters, "temperature": temperature}
        name = f"top_k_top_p_sampling_from_{'probs' if from_probs else 'logits'}"
        samples, valid = getattr(OPS, name)(x, uniform, **options)
        # a filter may end on a boundary that rounding moves: a little more is allowed to be kept
        wider = {**options, "top_p": options["top_p"] * 1.00001 + 1e-6, "min_p": options["min_p"] * 0.99999}
        wider["top_p"] = 0.0 if options["top_p"] == 0 else wider["top_p"]
        probs = kept_probs(x, from_probs=from_probs, **wider)[0]
        assert valid.item() != probs.isnan().any()
        assert 0 <= samples.item() < x.shape[1] and (valid.item() or samples.item() == 0)
        assert not valid.item() or probs[samples.item()] > 0 or probs.isnan().any()
    renormed = OPS.top_k_top_p_renorm_probs(x, **parameters)
    assert renormed.isnan().all() or abs(renormed.double().sum().item() - 1) < 1e-5
    logprobs, rank, _, ids = OPS.gather_logprobs(x, samples.long(), x.shape[1])
    assert ids[0, rank.item() - 1] == samples.item() and torch.equal(ids.sort(-1).values[0], torch.arange(x.shape[1]))
    assert logprobs.isnan().all() or logprobs.max() <= 0


# ------------------------------------------------------------------------------------------------ invariance


def calls(rows: int, vocab: int, device: str = "cpu") -> dict:
    """Every op on the same random rows, as functions of which rows."""
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(rows, vocab, generator=generator) * 2
    probs, u = logits.softmax(-1), torch.rand(rows, generator=generator)
    target = (logits + torch.randn(rows, vocab, generator=generator)).softmax(-1)
    counts = torch.randint(-5, 3, (rows, vocab), generator=generator).clamp_min(0).int()
    logits, probs, u, target, counts = (t.to(device) for t in (logits, probs, u, target, counts))
    tokens = logits.argmax(-1)
    return {
        "sampling_from_probs": lambda r: OPS.sampling_from_probs(probs[r], u[r]),
        "top_p_sampling_from_probs": lambda r: OPS.top_p_sampling_from_probs(probs[r], u[r], top_p=0.9),
        "top_k_sampling_from_probs": lambda r: OPS.top_k_sampling_from_probs(probs[r], u[r], top_k=9000),
        "min_p_sampling_from_probs": lambda r: OPS.min_p_sampling_from_probs(probs[r], u[r], min_p=0.1),
        "softmax": lambda r: OPS.softmax(logits[r], temperature=0.7),
        "top_p_renorm_probs": lambda r: OPS.top_p_renorm_probs(probs[r], top_p=0.9),
        "top_k_renorm_probs": lambda r: OPS.top_k_renorm_probs(probs[r], top_k=300),
        "top_k_top_p_softmax": lambda r: OPS.top_k_top_p_softmax(logits[r], top_k=8000, top_p=0.8),
        "top_k_mask_logits": lambda r: OPS.top_k_mask_logits(logits[r], top_k=20_000),
        "top_k": lambda r: OPS.top_k(logits[r], 10_000),
        "gather_logprobs": lambda r: OPS.gather_logprobs(logits[r], tokens[r], 5),
        "apply_logits_processors": lambda r: OPS.apply_logits_processors(
            logits[r], counts[r], repetition_penalty=1.2, frequency_penalty=0.1
        ),
        "chain_speculative_sampling": lambda r: OPS.chain_speculative_sampling(
            probs[r][:, None], tokens[r][:, None], u[r][:, None].expand(-1, 2), target[r][:, None].expand(-1, 2, -1)
        ),
    }


@pytest.mark.parametrize("name", calls(1, 2))
def test_a_row_depends_on_itself_alone(name):
    """Bit for bit, whatever the batch and the thread count."""
    call = calls(5, 70_001)[name]

    def outputs(rows) -> list[torch.Tensor]:
        result = call(torch.tensor(rows))
        return list(result) if isinstance(result, (tuple, list)) else [result]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = outputs([0, 1, 2, 3, 4])
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            for rows in ([0, 1, 2, 3, 4], [3, 1], [2]):
                for actual, whole in zip(outputs(rows), expected, strict=True):
                    assert torch.equal(actual, whole[rows]), f"{count} threads, rows {rows}"
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ distribution


def assert_distributed(tokens: torch.Tensor, probs: torch.Tensor) -> None:
    """Chi-square of draws against float64 probabilities, at a false-alarm rate of 1e-6 (Wilson and Hilferty's cube)."""
    kept = probs > 0
    assert kept[tokens].all(), "a token outside the support"
    counts = torch.bincount(tokens, minlength=len(probs)).double()[kept]
    expected = probs[kept] * len(tokens)
    assert expected.min() > 5
    freedom = int(kept.sum()) - 1
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + 4.7534 * spread**0.5) ** 3
    assert ((counts - expected) ** 2 / expected).sum().item() < limit


DRAWS = 100_000


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.8}, {"top_k": 12}, {"min_p": 0.2}, {"top_k": 30, "top_p": 0.9, "min_p": 0.1}], ids=str
)
@pytest.mark.parametrize("spread", [0.1, 1.5])
def test_chi_square_from_probs(options, spread, device):
    name = "sampling_from_probs"
    for key in options:
        name = f"{key}_sampling_from_probs"
    name = "top_k_top_p_sampling_from_probs" if len(options) > 1 else name
    row = (torch.randn(53, generator=torch.Generator().manual_seed(7)) * spread).exp()  # not normalised
    uniform = fi_ops.philox_uniform(8, 0, DRAWS).to(device)
    rows = torch.zeros(DRAWS, dtype=torch.int64, device=device)
    samples, valid = getattr(OPS, name)(row[None].to(device), uniform, **options, indices=rows)
    assert valid.all()
    assert_distributed(samples.cpu(), kept_probs(row[None], from_probs=True, **options)[0])


@pytest.mark.parametrize("likeness", [0.2, 1.0])
def test_speculative_tokens_are_the_targets(likeness, device):
    """Draft tokens drawn from the draft: the first token of the output is distributed as the target's first, and where
    the first was accepted, the second as the target's second."""
    generator = torch.Generator().manual_seed(9)
    draft_logits = torch.randn(2, 17, generator=generator)
    target_logits = torch.cat([draft_logits, torch.zeros(1, 17)]) + likeness * torch.randn(3, 17, generator=generator)
    draft, target = draft_logits.softmax(-1), target_logits.softmax(-1)
    ids = torch.stack([row.multinomial(DRAWS, replacement=True, generator=generator) for row in draft], 1)
    uniform = torch.rand(DRAWS, 3, generator=generator)
    args = (draft.expand(DRAWS, -1, -1), ids, uniform, target.expand(DRAWS, -1, -1))
    output, accepted, emitted = (t.cpu() for t in OPS.chain_speculative_sampling(*(t.to(device) for t in args)))
    assert_distributed(output[:, 0], target[0].double() / target[0].double().sum())
    second = output[emitted >= 1, 1]
    assert_distributed(second, target[1].double() / target[1].double().sum())
    third = output[emitted == 2, 2]
    assert_distributed(third, target[2].double() / target[2].double().sum())
    assert (output[emitted == 0, 1:] == -1).all() and (output[emitted == 1, 2] == -1).all()
    assert (accepted >= emitted).all() and (accepted <= 2).all()
