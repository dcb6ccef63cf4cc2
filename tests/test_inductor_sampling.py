"""Samplers: which are rewritten and how far, the same token where there is one, the same distribution otherwise."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import snippets
import torch
import torch._inductor.config
from inductor_capture import DEVICES, capture, graph_text, to_device
from sampler_oracle import check_draws, distributions, stock_probabilities
from snippets import gumbel, samplers, vllm
from test_inductor_snippets import tensors

import fi_ops.inductor.fuse.sampling as fuse_sampling
from fi_ops.inductor.normalize.draw import match_draw
from fi_ops.inductor.sites import Declined

aten = torch.ops.aten
SAMPLERS = {s.name: s for s in snippets.load().values() if s.kind == "sampling"}
V = samplers.V
DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


@pytest.fixture(autouse=True)
def _small_vocabularies(monkeypatch):
    """Vocabularies are small here; that rows are long enough for a rewrite is `test_short_rows_keep_their_filters`'."""
    monkeypatch.setattr(fuse_sampling, "MIN_VOCAB_TO_FILTER", 0)


def sampler_pieces(result):
    return [site.pieces for site in result.sites if site.kind == "sampling" and site.grade]


@pytest.mark.parametrize("device", DEVICES)
@DYNAMIC
@pytest.mark.parametrize("snippet", SAMPLERS.values(), ids=lambda s: s.name)
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


@pytest.mark.parametrize("device", DEVICES)
@DYNAMIC
@pytest.mark.parametrize("name", samplers.PIECES)
def test_filters_taken_into_the_op(name, dynamic, device):
    snippet = SAMPLERS[name]
    result = capture(snippet.fn, *to_device(snippet.inputs(), device), dynamic=dynamic)
    symbolic = samplers.DYNAMIC_PIECES if dynamic else {}
    assert sampler_pieces(result) == [symbolic.get(name, samplers.PIECES[name])]


@pytest.mark.parametrize("snippet", [s for s in SAMPLERS.values() if not s.grade], ids=lambda s: s.name)
def test_declined_is_what_stock_compiles(snippet):
    inputs = snippet.inputs()
    ours, stock = capture(snippet.fn, *inputs), capture(snippet.fn, *inputs, rewritten=False)
    assert [graph_text(g) for g in ours.graphs] == [graph_text(g) for g in stock.graphs]


# ---- the distribution ----


def distinct_logits(rows: int = 3, vocab: int = V, dtype=torch.float32, step: float = 1 / 16) -> torch.Tensor:
    """Rows without ties, the same numbers in every dtype."""
    return torch.stack([torch.randperm(2 * vocab)[:vocab] for _ in range(rows)]).mul(step).to(dtype)


def with_random_logits(snippet) -> tuple:
    """The snippet's inputs, with logits among which every token that is kept has a chance."""
    return tuple(
        distinct_logits(t.shape[0], dtype=t.dtype) if isinstance(t, torch.Tensor) and t.shape == (3, V) else t
        for t in snippet.inputs()
    )


RACES = {  # where the race is not the scores (and the noise), but scaled or a softmax: the scores
    "gumbel.exponential_trick_at_rate_one": lambda x: x,
    "gumbel.scaled_uniform_and_sum": lambda x: x,
    "gumbel.gumbel_softmax": lambda x: x,
    "gumbel.gumbel_softmax_of_filtered": samplers.top_k_mask,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", samplers.PIECES)
def test_distribution_is_that_of_stock(name, device, monkeypatch):
    """Kept are the same tokens, with the same probabilities, as the code itself computes them in eager mode."""
    snippet, is_gumbel = SAMPLERS[name], samplers.PIECES[name][0] == "gumbel trick"
    inputs = to_device(with_random_logits(snippet), device)
    result, ours = distributions(monkeypatch, snippet.fn, *inputs)
    assert sampler_pieces(result) == [samplers.PIECES[name]] and len(ours) == 1
    in_double = [t.double() if t.dtype in (torch.bfloat16, torch.float16) else t for t in inputs]
    if name in RACES:
        expected = RACES[name](inputs[0].double()).softmax(-1)
    else:
        expected = stock_probabilities(snippet.fn, *in_double, of_scores=is_gumbel)
    ours, expected = in_order_of_tokens(name, ours[0], expected, inputs)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=1e-9)


def in_order_of_tokens(name, ours, expected, inputs):
    """Code that draws a place in descending order: stock's probabilities by token; ours may be by place as well."""
    if name not in ("samplers.meta", "samplers.drawn_among_the_topk", "samplers.sorted_probabilities_returned"):
        return ours, expected
    ids = inputs[0].sort(-1, descending=True).indices[:, : expected.shape[-1]]
    by_token = torch.zeros(ids.shape[0], V, dtype=torch.float64, device=ids.device).scatter(1, ids, expected)
    if name == "samplers.sorted_probabilities_returned":
        ours = torch.zeros_like(by_token).scatter(1, ids, ours)
    return ours, by_token


DRAWS = 100_000
DRAWN = [
    *(samplers.gpt_fast, samplers.huggingface_min_p, samplers.top_p_descending, samplers.meta, samplers.min_p_first),
    *(samplers.drawn_among_the_topk, samplers.probabilities_returned, samplers.plain_probabilities_returned),
    *(samplers.top_p_before_top_k, vllm.everything, vllm.top_k_alone, vllm.probabilities_for_the_verifier),
    *(gumbel.exponential_trick_at_rate_one, gumbel.two_logarithms_with_eps, gumbel.clamped, gumbel.torch_gumbel),
    *(gumbel.categorical, gumbel.categorical_with_entropy),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fn", DRAWN, ids=lambda fn: f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}")
def test_draws(fn, device):
    """Chi-square of 10^5 draws against stock's probabilities, at a fixed seed.

    The limit is the 1 - 1e-6 quantile: a right sampler fails one seed in a million for each of the three rows.
    """
    torch.manual_seed(5)
    name = f"{fn.__module__.rpartition('.')[2]}.{fn.__name__}"
    inputs = with_random_logits(SAMPLERS[name])
    if name in RACES:
        expected = RACES[name](inputs[0].double()).softmax(-1)
    else:
        expected = stock_probabilities(fn, *inputs, of_scores=samplers.PIECES[name][0] == "gumbel trick")
    _, expected = in_order_of_tokens(name, expected, expected, inputs)
    many = tuple(t.repeat_interleave(DRAWS // 3, 0) for t in inputs)
    output = capture(fn, *to_device(many, device)).output
    tokens = output[0] if isinstance(output, tuple) else output
    for row, probs in zip(tokens.reshape(3, -1), expected, strict=True):
        check_draws(row, probs)


def test_gumbel_softmax_is_one_hot():
    torch.manual_seed(6)
    row = distinct_logits(1)
    one_hot = capture(gumbel.gumbel_softmax, row.expand(DRAWS, -1).contiguous()).output
    assert ((one_hot == 0) | (one_hot == 1)).all() and (one_hot.sum(-1) == 1).all()
    check_draws(one_hot.argmax(-1), row[0].double().softmax(-1))


@pytest.mark.parametrize("ties", [1, 2, 7])
def test_ties_at_the_kth_are_kept_as_stock_keeps_them(ties, monkeypatch):
    row = torch.tensor([5.0, 4.0, *[3.0] * ties, *[1.0] * 8])[torch.randperm(10 + ties)]
    x, k = row.expand(3, -1).contiguous(), torch.tensor([3, 2, row.numel()])
    for fn, inputs in (
        (lambda x: samplers.multinomial(samplers.top_k_mask(x, 3)), (x,)),
        (lambda x: samplers.exponential_trick(torch.softmax(samplers.top_k_mask(x, 3), -1)), (x,)),
        (lambda x, k: vllm.sample(vllm.apply_top_k_top_p(x, k, None)), (x, k)),
        (lambda x, k: vllm.sample(vllm.apply_top_k_only(x, k, row.numel())), (x, k)),
    ):
        result, ours = distributions(monkeypatch, fn, *inputs)
        assert sampler_pieces(result)[0][1:] == ("top-k",)
        torch.testing.assert_close(ours[0], stock_probabilities(fn, *inputs), rtol=2e-5, atol=0)


# ---- random samplers ----


def hf_top_k(x, k):
    return samplers.top_k_mask(x, k)


def where_top_k(x, k):
    return torch.where(x >= x.sort(-1, descending=True).values[:, k - 1 : k], x, -samplers.INF)


def rows_top_k(x, k):
    return x.masked_fill(x < x.sort(-1).values.gather(1, (x.shape[1] - k)[:, None]), -samplers.INF)


def topk_rows_top_k(x, k):
    return vllm.apply_top_k_only(x, k, x.shape[1])


def vllm_top_k(x, k):
    return vllm.apply_top_k_top_p(x, k, None)


def rows_top_p_descending(x, p):
    ordered, ids = x.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    remove = probs.cumsum(-1) - probs > (p if isinstance(p, float) else p[:, None])
    return x.masked_fill(remove.scatter(1, ids, remove), -samplers.INF)


def vllm_top_p(x, p):
    return vllm.apply_top_k_top_p(x, None, p)


def plain_min_p(x, m):
    probs = x.softmax(-1)
    threshold = probs.max(-1, keepdim=True).values * (m if isinstance(m, float) else m[:, None])
    return torch.where(probs < threshold, -samplers.INF, x)


def divided(x, t):
    return x / (t if isinstance(t, float) else t[:, None])


SPELLINGS = {  # by filter: spellings with one number for all rows, and with one for each
    "temperature": ((divided, lambda x, t: x * (1 / t)), (divided,)),
    "top-k": ((hf_top_k, where_top_k), (rows_top_k, vllm_top_k, topk_rows_top_k)),
    "top-p": (
        (samplers.top_p_mask, samplers.top_p_mask_descending, rows_top_p_descending),
        (rows_top_p_descending, vllm_top_p),
    ),
    "min-p": ((samplers.min_p_mask, plain_min_p), (plain_min_p, vllm.apply_min_p)),
}
ROW_NUMBERS = {
    "temperature": lambda rows: torch.rand(rows) * 1.5 + 0.4,
    "top-k": lambda rows: torch.tensor([random.choice([1, 3, 10, V]) for _ in range(rows)]),
    "top-p": lambda rows: torch.tensor([random.choice([1.0, 0.9, 0.5, 1e-4]) for _ in range(rows)]) - 1e-5,
    "min-p": lambda rows: torch.tensor([random.choice([0.0, 0.03, 0.2, 1.0]) for _ in range(rows)]),
}
NUMBERS = {"temperature": (0.5, 0.7, 1.6), "top-k": (1, 4, 17, V), "top-p": (0.3, 0.9, 0.999), "min-p": (0.02, 0.3)}


def expected_pieces(order) -> set[str]:
    """What the op can do of filters applied in this order: not a top-p or min-p in front of the temperature, nor what is
    in front of that."""
    taken: list[str] = []
    for name in reversed(order):
        if name in ("top-p", "min-p") and "temperature" in taken:
            break
        taken.append(name)
    return set(taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_random_samplers(seed, dtype, monkeypatch):
    """Any filters, in any order and spelling, scalar or by row: the distribution is what the same code computes in float64."""
    random.seed(1000 * seed + dtype.itemsize)
    torch.manual_seed(seed)
    order = random.sample(list(SPELLINGS), random.randint(0, 4))
    rows, steps, numbers = 4, [], []
    for name in order:
        by_row = random.random() < 0.5
        steps.append(random.choice(SPELLINGS[name][by_row]))
        numbers.append(ROW_NUMBERS[name](rows) if by_row else random.choice(NUMBERS[name]))
    returned, spelling = random.random() < 0.3, random.choice(["multinomial", "exponential", "gumbel", "categorical"])

    def filtered(x):
        for step, number in zip(steps, numbers, strict=True):
            x = step(x, number)
        return x

    def fn(x, *by_row):
        x = filtered(x.float() if x.dtype != torch.float64 else x)
        probs = torch.softmax(x, -1)
        if spelling == "multinomial":
            token = torch.multinomial(probs, 1)
        elif spelling == "exponential":
            token = vllm.random_sample(probs.clone())
        elif spelling == "gumbel":
            token = (x - torch.empty_like(x).exponential_().log()).argmax(-1)
        else:
            token = torch.distributions.Categorical(logits=x, validate_args=False).sample()
        return (token, probs) if returned else token

    x = distinct_logits(rows, dtype=dtype)
    result, ours = distributions(monkeypatch, fn, x)
    assert not any("internal error" in r for r in result.reasons()), result.reasons()
    expected = torch.softmax(filtered(x.double()), -1)
    assert torch.equal(ours[0] > 0, expected > 0), (order, spelling)
    torch.testing.assert_close(ours[0], expected, rtol=1e-4, atol=1e-9)
    grades = set(result.grades("sampling"))
    if not returned or spelling not in ("multinomial", "exponential"):
        assert grades == {samplers.SAMPLER}
    if not returned:
        assert set(sampler_pieces(result)[0][1:]) == expected_pieces(order), (order, spelling)
    else:
        torch.testing.assert_close(result.output[1].double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("order", list(itertools.permutations(["top-k", "top-p", "min-p"])), ids="-".join)
def test_every_order_of_the_filters(order, monkeypatch):
    """Which mass top-p measures depends on what stands in front of it; all orders are one op."""
    masks = {"top-k": lambda x: hf_top_k(x, 20), "top-p": lambda x: samplers.top_p_mask(x, 0.9)}
    masks["min-p"] = lambda x: samplers.min_p_mask(x, 0.08)

    def fn(x):
        for name in order:
            x = masks[name](x)
        return samplers.multinomial(x)

    x = distinct_logits()
    result, ours = distributions(monkeypatch, fn, x)
    assert set(sampler_pieces(result)[0][1:]) == set(order)
    torch.testing.assert_close(ours[0], stock_probabilities(fn, x.double()), rtol=2e-5, atol=1e-9)


# ---- Hugging Face's own processors, in the order in which `generate` applies them ----


def hf_sampler(*processors):
    def fn(ids, x):
        for processor in processors:
            x = processor(ids, x)
        return torch.multinomial(torch.softmax(x, dim=-1), num_samples=1).squeeze(1)

    return fn


HF = {
    "all": (dict(penalty=1.3, temperature=0.7, top_k=20, top_p=0.9, min_p=0.05), {}),
    "no penalty": (dict(temperature=1.4, top_k=20, top_p=0.8), {}),
    "top-p and min-p": (dict(top_p=0.95, min_p=0.1), {}),
    "three tokens kept at least": (dict(temperature=0.7, top_k=2, top_p=0.3, min_p=0.9), {"min_tokens_to_keep": 3}),
    "typical": (dict(temperature=0.7, top_k=20, typical=0.9), {}),
}


@pytest.mark.parametrize("name", HF)
def test_hugging_face_processors(name, monkeypatch):
    """Repetition penalty, typical and min_tokens_to_keep > 1 stay in the graph; what comes behind them is taken."""
    lp = pytest.importorskip("transformers").generation.logits_process
    numbers, options = HF[name]
    make = {
        "penalty": (lp.RepetitionPenaltyLogitsProcessor, {}, None),
        "temperature": (lp.TemperatureLogitsWarper, {}, "temperature"),
        "top_k": (lp.TopKLogitsWarper, options, "top-k"),
        "top_p": (lp.TopPLogitsWarper, options, "top-p"),
        "min_p": (lp.MinPLogitsWarper, options, "min-p"),
        "typical": (lp.TypicalLogitsWarper, options, None),
    }
    processors = [make[key][0](number, **make[key][1]) for key, number in numbers.items()]
    pieces = [piece for piece in (make[key][2] for key in numbers) if piece is not None]
    # top-p and min-p that keep more than one token, and typical, are no filters of the op: what is in front of them stays
    pieces = [] if options or "typical" in numbers else pieces
    ids, x = torch.randint(0, V, (3, 6)), distinct_logits()
    fn = hf_sampler(*processors)
    result, ours = distributions(monkeypatch, fn, ids, x)
    assert sampler_pieces(result) == [("multinomial", *pieces)]
    expected = stock_probabilities(fn, ids, x.double())
    assert torch.equal(ours[0] > 0, expected > 0)
    torch.testing.assert_close(ours[0], expected, rtol=2e-5, atol=1e-9)


# ---- what is left alone, and why ----


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
        for fn in (
            samplers.plain_multinomial,
            samplers.gpt_fast,
            gumbel.two_logarithms,
            samplers.probabilities_returned,
        ):
            result = capture(fn, *samplers.logits())
            assert set(result.grades("sampling")) <= {""}
            assert all("fallback_random" in reason for reason in result.reasons())


def test_a_generator_of_its_own_is_not_taken():
    """Dynamo breaks the graph at one; a graph that has one all the same keeps its draw."""
    graph = torch.fx.Graph()
    weights = graph.placeholder("weights")
    weights.meta["val"] = torch.rand(3, V)
    node = graph.call_function(aten.multinomial.default, (weights, 1), {"generator": torch.Generator()})
    with pytest.raises(Declined, match="has a generator of its own"):
        match_draw(node)


def test_double_logits():
    result = capture(samplers.plain_multinomial, *samplers.logits(torch.float64))
    assert result.grades("sampling") == [""] and "logits are torch.float64" in result.reasons()[0]


def test_three_dimensions():
    fn = gumbel.two_logarithms
    result = capture(fn, samplers.logits()[0][None])
    assert result.grades("sampling") == [""] and "logits have 3 dimensions" in result.reasons()[0]


# ---- numbers that are only known when the code runs ----


def gpt_fast_sample(x, temperature, top_k):
    x = x / max(temperature, 1e-5)
    values, _ = torch.topk(x, min(top_k, x.size(-1)))
    x = torch.where(x < values.select(-1, -1).unsqueeze(-1), -float("Inf"), x)
    return samplers.exponential_trick(torch.softmax(x, -1))


@pytest.mark.parametrize("device", DEVICES)
def test_symbolic_numbers(device, monkeypatch):
    """With dynamic=True the temperature comes as a tensor and k as a symbolic size: no second compile for others."""
    x = distinct_logits().to(device)
    result, ours = distributions(monkeypatch, gpt_fast_sample, x, 0.8, 5, dynamic=True)
    assert sampler_pieces(result) == [("exponential trick", "temperature", "top-k")]
    torch.testing.assert_close(ours[0], stock_probabilities(gpt_fast_sample, x, 0.8, 5), rtol=2e-5, atol=0)


def test_largest_k_as_data(monkeypatch):
    """vLLM's: the largest k of all requests is read back from the device, and topk made of as many."""

    def fn(x, k):
        return vllm.sample(vllm.apply_top_k_only(x, k))

    x, k = distinct_logits(), torch.tensor([5, V, 20])
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        result, ours = distributions(monkeypatch, fn, x, k)
    assert sampler_pieces(result) == [("exponential trick", "top-k")]
    torch.testing.assert_close(ours[0], stock_probabilities(fn, x, k), rtol=2e-5, atol=0)


@pytest.mark.parametrize("bad", [0, -3, V + 1])
def test_top_k_out_of_range(bad):
    """Eager code raises, as its gather finds no such place. So does ours on the CPU."""
    x, k = distinct_logits(), torch.tensor([5, bad, 20])
    for fn in (
        lambda x, k: vllm.sample(vllm.apply_top_k_top_p(x, k, None)),
        lambda x, k: vllm.sample(vllm.apply_top_k_only(x, k, V)),
        lambda x, k: vllm.sample(x.masked_fill(x < x.topk(20).values.gather(1, k[:, None] - 1), -samplers.INF)),
    ):
        with pytest.raises(RuntimeError, match=r"index .* is out of bounds"):
            fn(x, k)
        with pytest.raises(RuntimeError, match=r"top-k must be in \[1, (50|20)\] in every row"):
            capture(fn, x, k)
        result = capture(lambda x, k, fn=fn: fn(x, k.clamp(1, 20)), x, k)
        assert sampler_pieces(result) == [("exponential trick", "top-k")]


def test_top_p_and_min_p_out_of_range(monkeypatch):
    """A p below 0 keeps one token, above 1 all; a min-p below 0 keeps all."""
    x, p, m = distinct_logits(), torch.tensor([-0.5, 1.5, 0.9]), torch.tensor([-1.0, 0.2, -0.1])

    def fn(x, p, m):
        return vllm.sample(plain_min_p(vllm.apply_top_k_top_p(x, None, p), m))

    result, ours = distributions(monkeypatch, fn, x, p, m)
    assert sampler_pieces(result) == [("exponential trick", "top-p", "min-p")]
    torch.testing.assert_close(ours[0], stock_probabilities(fn, x, p, m), rtol=2e-5, atol=0)


def test_two_calls_draw_two_numbers():
    """One random number a row and call: draws of one compiled function differ from call to call."""

    def fn(x):
        return torch.multinomial(torch.softmax(x, -1), 1), torch.multinomial(torch.softmax(x, -1), 1)

    result = capture(fn, torch.zeros(200, V := 1000))
    first, second = result.output
    assert (first != second).float().mean() > 0.9
    assert V > first.max() >= 0


def test_short_rows_keep_their_filters(monkeypatch):
    """Of filtered probabilities that are used as well, only the noise goes: stock's filters take no longer there."""
    monkeypatch.undo()
    x = distinct_logits()
    result, ours = distributions(monkeypatch, samplers.probabilities_returned, x)
    assert result.grades("sampling") == [samplers.FROM_PROBS]
    torch.testing.assert_close(ours[0], stock_probabilities(samplers.probabilities_returned, x), rtol=2e-5, atol=0)


def test_two_draws_of_one_softmax(monkeypatch):
    def fn(x):
        probs = torch.softmax(samplers.top_k_mask(x), -1)
        return torch.multinomial(probs, 1), torch.multinomial(probs, 1)

    x = distinct_logits(1).expand(DRAWS, -1).contiguous()
    result, ours = distributions(monkeypatch, fn, x)
    expected = stock_probabilities(fn, x[:1])[0]
    assert all(result.grades("sampling")), result.sites
    for tokens, drawn in zip(result.output, ours, strict=True):
        torch.testing.assert_close(drawn[0], expected, rtol=2e-5, atol=0)
        check_draws(tokens, expected)
    assert (result.output[0] != result.output[1]).any()
