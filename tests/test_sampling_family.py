"""What samples can't say of the sampling family: other references, hostile rows, invariance.

Exactness by brute force: `test_sampling_support.py`, which lists what all these files show. All seeds are fixed, so a pass or a
failure repeats.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fi_ops
from fi_ops.library import SPECS
from fi_ops.library._sampling import kept_probs

OPS = torch.ops.fi
RELAXED = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


# ------------------------------------------------------------------------------------------------ other references


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


def a_little_wider(options: dict) -> dict:
    """A filter may end on a boundary that rounding moves: a little more may be kept."""
    wider = dict(options)
    if "top_p" in options:
        top_p = torch.as_tensor(options["top_p"], dtype=torch.float64)
        wider["top_p"] = torch.where(top_p == 0, 0.0, top_p * 1.00001 + 1e-6)
    if "min_p" in options:
        wider["min_p"] = torch.as_tensor(options["min_p"], dtype=torch.float64) * 0.99999
    return wider


@RELAXED
@given(
    row=st.lists(FLOATS, min_size=1, max_size=20),
    copies=st.sampled_from([1, 3, 500]),
    parameters=PARAMETERS,
    temperature=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 1e30]),
    u=st.floats(0, 1 - 2**-24, width=32),
)
def test_hostile_rows(row, copies, parameters, temperature, u, device):
    """Whatever a row has, the id is in range and drawn from what can be kept, or the row is said to be invalid."""
    x = torch.tensor(row, dtype=torch.float32).repeat(copies)[None].to(device)
    uniform = torch.tensor([u], device=device)
    for from_probs in (False, True):
        options = parameters if from_probs else {**parameters, "temperature": temperature}
        name = f"top_k_top_p_sampling_from_{'probs' if from_probs else 'logits'}"
        samples, valid = getattr(OPS, name)(x, uniform, **options)
        probs = kept_probs(x, from_probs=from_probs, **a_little_wider(options))[0]
        assert valid.item() != probs.isnan().any()
        assert 0 <= samples.item() < x.shape[1] and (valid.item() or samples.item() == 0)
        assert not valid.item() or probs[samples.item()] > 0 or probs.isnan().any()
    renormed = OPS.top_k_top_p_renorm_probs(x, **parameters)
    assert renormed.isnan().all() or abs(renormed.double().sum().item() - 1) < 1e-5
    logprobs, rank, _, ids = OPS.gather_logprobs(x, samples.long(), x.shape[1])
    assert ids[0, rank.item() - 1] == samples.item() and torch.equal(
        ids.sort(-1).values[0].cpu(), torch.arange(x.shape[1])
    )
    assert logprobs.isnan().all() or logprobs.max() <= 0


# What becomes of a row of normal logits, or of their softmax.
KINDS = {
    "usual": lambda x: x,
    "NaN": lambda x: torch.where(x == x.max(), math.nan, x),
    "all -inf": lambda x: torch.full_like(x, -math.inf),
    "infinities": lambda x: torch.where(x > x.median(), math.inf, x),
    "zeros": torch.zeros_like,
    "signed zeros": lambda x: torch.zeros_like(x).copysign(x - x.median()),
    "denormals": lambda x: x * 1e-40,
    "one token at 1": lambda x: (x == x.max()).to(x.dtype),
    "unnormalised": lambda x: x * 1e30,
    "ties": lambda x: x.mul(2).round(),
    "all equal": lambda x: torch.full_like(x, 0.7),
    "one negative": lambda x: torch.where(x == x.min(), -1e-3, x),
}
BY_ROW = st.fixed_dictionaries(
    {
        "top_k": st.one_of(st.sampled_from([0, 1, -7, 2**40]), st.integers(1, 400)),
        "top_p": st.one_of(st.sampled_from([0.0, 1.0, 1e-30, 7.0]), st.floats(0, 1, width=32)),
        "min_p": st.one_of(st.sampled_from([0.0, 1.0, 1e-30]), st.floats(0, 1, width=32)),
        "temperature": st.one_of(st.sampled_from([0.0, 1.0, 1e-30, 1e30]), st.floats(0.125, 4, width=32)),
        "u": st.floats(0, 1 - 2**-24, width=32),
        "kind": st.sampled_from(list(KINDS)),
    }
)


@settings(RELAXED, max_examples=150)
@given(
    rows=st.lists(BY_ROW, min_size=1, max_size=4),
    vocab=st.sampled_from([1, 2, 33, 300, 3001]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    top_k_first=st.booleans(),
    min_p_first=st.booleans(),
    top_k_ties=st.sampled_from(["exact", "threshold"]),
    seed=st.integers(0, 2**16),
)
def test_hostile_batches(rows, vocab, dtype, top_k_first, min_p_first, top_k_ties, seed, device):
    """Every op of one row of logits or probabilities: rows that can't be sampled beside others that can, each with filters of
    its own. A row's output is what it is alone, bit for bit, and is right in the sense of `test_hostile_rows`."""
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed)) * 3
    numbers = {key: torch.tensor([row[key] for row in rows]) for key in ("top_k", "top_p", "min_p", "temperature", "u")}
    orders = {"top_k_first": top_k_first, "min_p_first": min_p_first, "top_k_ties": top_k_ties}
    for spec in SPECS.values():
        if spec.family not in ("sampling", "renorm"):
            continue
        names = [a.name for a in spec.parsed.arguments]
        from_probs = names[0] == "probs"
        x = logits.softmax(-1) if from_probs else logits.to(dtype)
        x = torch.stack([KINDS[row["kind"]](x[r]) for r, row in enumerate(rows)])
        filters = {key: value for key, value in numbers.items() if f"{key}_arr" in names}
        options = {key: value for key, value in orders.items() if key in names}

        def call(some, x=x, filters=filters, options=options, draws="uniform" in names, op=spec.overload):
            args = (x[some], numbers["u"][some]) if draws else (x[some],)
            arrays = {f"{key}_arr": value[some].to(device) for key, value in filters.items()}
            result = op(*(t.to(device) for t in args), **arrays, **options)
            return [t.cpu() for t in (result if isinstance(result, tuple) else (result,))]

        whole = call(slice(None))
        for r in range(len(rows)):
            for of_batch, alone in zip(whole, call(slice(r, r + 1)), strict=True):
                assert torch.equal(of_batch[r].nan_to_num(7.0), alone[0].nan_to_num(7.0)), (spec.name, r)
        if spec.name == "top_k_mask_logits":
            continue  # (infinities are numbers like others to it; its samples have them)
        probs = kept_probs(x, from_probs=from_probs, **a_little_wider(filters | options))
        can_be_sampled = ~probs.isnan().any(-1)
        if "uniform" in names:
            tokens, valid = whole[0].long(), whole[1]
            assert (tokens >= 0).all() and (tokens < vocab).all() and (tokens[~valid] == 0).all(), spec.name
            assert torch.equal(valid, can_be_sampled), spec.name
            assert (probs.gather(1, tokens[:, None])[valid] > 0).all(), spec.name
        else:
            assert torch.equal(~whole[0].isnan().any(-1), can_be_sampled), spec.name
            written = whole[0][can_be_sampled].double()
            assert ((written.sum(-1) - 1).abs() < 1e-5).all(), spec.name
            assert (probs[can_be_sampled][written > 0] > 0).all(), spec.name


@settings(RELAXED, max_examples=150)
@given(
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=6, max_size=6),
    vocab=st.sampled_from([2, 33, 3001]),
    u=st.lists(st.floats(0, 1 - 2**-24, width=32), min_size=6, max_size=6),
    seed=st.integers(0, 2**16),
)
def test_hostile_chains(kinds, vocab, u, seed, device):
    """Draft chains of hostile rows: a prefix of the draft's tokens, one token in range, -1 behind it; alone as in a batch."""
    generator = torch.Generator().manual_seed(seed)
    probs = (torch.randn(2, 6, vocab, generator=generator) * 2).softmax(-1)
    draft = torch.stack([KINDS[kind](row) for kind, row in zip(kinds, probs[0], strict=True)]).view(2, 3, -1)[:, :2]
    target = torch.stack([KINDS[kind](row) for kind, row in zip(kinds[::-1], probs[1], strict=True)]).view(2, 3, -1)
    ids = torch.randint(0, vocab, (2, 2), generator=generator)
    args = [t.to(device) for t in (draft, ids, torch.tensor(u).view(2, 3), target)]
    whole = [t.cpu() for t in OPS.chain_speculative_sampling(*args)]
    output, accepted, emitted = whole
    for b in range(2):
        alone = OPS.chain_speculative_sampling(*(t[b : b + 1] for t in args))
        assert all(torch.equal(one[b], other[0].cpu()) for one, other in zip(whole, alone, strict=True))
        n = int(emitted[b])
        assert 0 <= n <= accepted[b] <= 2
        assert torch.equal(output[b, :n], ids[b, :n]) and 0 <= output[b, n] < vocab and (output[b, n + 1 :] == -1).all()


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
