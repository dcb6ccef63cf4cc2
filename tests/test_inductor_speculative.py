"""Speculative decoding under the rewrites: draws from weights that are known not to be negative, and whose distribution."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from inductor_capture import DEVICES, capture, without_caches
from snippets import samplers, speculative

import fi_ops
from fi_ops.inductor.normalize.non_negative import is_non_negative
from fi_ops.inductor.sites import recording

FROM_PROBS = "sampling_from_probs"


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    with without_caches():
        yield
    torch._dynamo.reset()


# ---- what is known of weights ----

A, C = torch.randn(4, 6), torch.randn(4, 6)
INDEX = torch.tensor([3, 0, 1])

PROVEN = {
    "relu": lambda a, c: F.relu(a),
    "clamp": lambda a, c: a.clamp(0, 3),
    "clamp of known": lambda a, c: a.abs().clamp(max=0.5),
    "square": lambda a, c: a * a,
    "power": lambda a, c: a**2 + c.square(),
    "softmax": lambda a, c: F.softmax(a, -1),
    "product": lambda a, c: a.exp() * c.sigmoid() / c.abs().sum(-1, keepdim=True),
    "difference where larger": lambda a, c: torch.where(a > c, a - c, 0.0),
    "difference where not smaller": lambda a, c: torch.where(a < c, 0.0, a - c),
    "difference where smaller": lambda a, c: torch.where(a <= c, c - a, 0.0),
    "difference where not larger": lambda a, c: torch.where(a >= c, 0.0, c - a),
    "difference where not not larger": lambda a, c: torch.where(~(a > c), 0.0, a - c),
    "itself where larger than a number": lambda a, c: torch.where(a >= 0.2, a, 1.0),
    "itself where both": lambda a, c: torch.where((c > 0) & (a > 0), a, c.abs()),
    "selected": lambda a, c: F.relu(a)[INDEX].t()[2:, :2],
    "gathered": lambda a, c: F.softmax(a, -1).gather(1, INDEX[:, None]),
    "sorted": lambda a, c: F.softmax(a, -1).sort(-1, descending=True)[0],
    "largest": lambda a, c: F.softmax(a, -1).topk(3)[0].amax(-1),
    "joined": lambda a, c: torch.cat([F.relu(a), c.abs()]),
    "padded": lambda a, c: F.pad(F.relu(a), (0, 2), value=1.0),
    "written": lambda a, c: F.relu(a).index_put((INDEX,), c.abs()[INDEX]),
    "scattered": lambda a, c: torch.zeros(4, 6).scatter(1, INDEX[:, None], c.abs()),
    "counted": lambda a, c: (a > c).float().cumsum(-1),
    "maximum": lambda a, c: torch.maximum(a, c.abs()),
    "minimum": lambda a, c: torch.minimum(a.exp(), c.abs()),
}
NEGATIVE = {
    "input": lambda a, c: a,
    "clamp from below zero": lambda a, c: a.clamp(min=-0.1),
    "clamp to below zero": lambda a, c: a.abs().clamp(max=-0.1),
    "both clamps": lambda a, c: a.clamp(min=1.0, max=-1.0),
    "cube": lambda a, c: a**3,
    "product of inputs": lambda a, c: a * c,
    "difference of known": lambda a, c: a.abs() - c.abs(),
    "times minus one": lambda a, c: a.abs() * -1,
    "quotient by an input": lambda a, c: a.abs() / c,
    "logarithm": lambda a, c: a.abs().log(),
    "difference where smaller": lambda a, c: torch.where(a < c, a - c, 0.0),
    "difference where not larger": lambda a, c: torch.where(a > c, 0.0, a - c),
    "difference where not not smaller": lambda a, c: torch.where(~(a < c), 0.0, a - c),
    "itself where larger than below zero": lambda a, c: torch.where(a > -0.5, a, 1.0),
    "itself where smaller": lambda a, c: torch.where(a < 0.2, a, 1.0),
    "something else where larger": lambda a, c: torch.where(a > 0, c, 1.0),
    "itself where either": lambda a, c: torch.where((c > 0) | (a > 0), a, c.abs()),
    "other branch": lambda a, c: torch.where(a > 0, a, c),
    "joined with an input": lambda a, c: torch.cat([F.relu(a), c]),
    "padded": lambda a, c: F.pad(F.relu(a), (0, 2), value=-1.0),
    "written into an input": lambda a, c: a.index_put((INDEX,), c.abs()[INDEX]),
    "an input written": lambda a, c: F.relu(a).index_put((INDEX,), c[INDEX]),
    "maximum": lambda a, c: torch.maximum(a, c),
    "minimum": lambda a, c: torch.minimum(a.exp(), c),
    "subtracted by a factor": lambda a, c: torch.add(a.abs(), c.abs(), alpha=-2),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", PROVEN)
def test_proven(name, dynamic):
    assert PROVEN[name](A, C).min() >= 0
    assert is_non_negative(result_of(PROVEN[name], dynamic))


@pytest.mark.parametrize("name", NEGATIVE)
def test_not_proven(name):
    assert NEGATIVE[name](A, C).min() < 0, "a near miss that could be one"
    assert not is_non_negative(result_of(NEGATIVE[name], False))


STEPS = [
    lambda x, y, z: x + y,
    lambda x, y, z: x - y,
    lambda x, y, z: x * y,
    lambda x, y, z: x / (y.abs() + 1),
    lambda x, y, z: -x,
    lambda x, y, z: x.abs(),
    lambda x, y, z: F.relu(x),
    lambda x, y, z: x.clamp(-1, 1),
    lambda x, y, z: x.clamp(min=0),
    lambda x, y, z: x.clamp(max=0.5),
    lambda x, y, z: x.sigmoid(),
    lambda x, y, z: torch.maximum(x, y),
    lambda x, y, z: torch.minimum(x, y),
    lambda x, y, z: torch.where(x > y, x - y, z),
    lambda x, y, z: torch.where(x < y, z, x - y),
    lambda x, y, z: torch.where(x <= y, y - x, z),
    lambda x, y, z: torch.where(~(x >= y), y - x, z),
    lambda x, y, z: torch.where((x > 0) & (y > z), x, z),
    lambda x, y, z: torch.where((x > 0) | (y > z), x, z),
    lambda x, y, z: torch.where(x < 0.1, z, x),
    lambda x, y, z: torch.where(x > -0.1, x, z),
    lambda x, y, z: x.cumsum(-1) / 6,
    lambda x, y, z: x[INDEX.repeat(2)[:4]],
    lambda x, y, z: x.scatter(1, INDEX[:, None], y),
    lambda x, y, z: torch.cat([x[:2], y[2:]]),
]


@pytest.mark.parametrize("seed", range(4))
def test_random_expressions(seed):
    """What is proven holds: 250 expressions made of each other, on three inputs of both signs."""
    choose = random.Random(seed)
    plan = [(choose.choice(STEPS), *(choose.random() for _ in range(3))) for _ in range(250)]

    def fn(a, c):
        made = [a, c, a * c]
        for step, *places in plan:  # of the last ones, so that they grow deep
            made.append(step(*(made[-1 - int(place * min(len(made), 12))] for place in places)))
        return made[3:]

    result = capture(fn, A, C, rewritten=False)
    nodes = next(node for node in result.graphs[0].nodes if node.op == "output").args[0]
    proven = [i for i, node in enumerate(nodes) if is_non_negative(node)]
    assert len(proven) > 25
    for _ in range(3):
        values = fn(torch.randn(4, 6), torch.randn(4, 6))
        assert all(((values[i] >= 0) | values[i].isnan()).all() for i in proven)


def result_of(fn, dynamic):
    graph = capture(fn, A, C, rewritten=False, dynamic=dynamic).graphs[0]
    return next(node for node in graph.nodes if node.op == "output").args[0][0]


# ---- distributions ----


def assert_distributed(tokens, expected):
    """Chi-square of the tokens against exact probabilities (at most 8 that are not 0, of which none is rare) at a fixed seed.

    The threshold is the 1 - 1e-6 quantile for 7 degrees of freedom: a right sampler fails at one seed in a million.
    """
    expected = expected.double().cpu() * len(tokens)
    counts = torch.bincount(tokens.flatten().cpu().long(), minlength=len(expected)).double()
    assert (counts[expected == 0] == 0).all() and expected[expected > 0].min() > 5
    assert ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum() < 40.53


def distributions(shape, device="cpu", seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(1.2).softmax(-1).to(device)


@pytest.mark.parametrize("fn", ["clamped", "where_larger", "maximum_with_nothing"])
@pytest.mark.parametrize("device", DEVICES)
def test_residual(fn, device):
    p, q = distributions((2, 8), device)
    result = capture(getattr(speculative, fn), p.expand(40_000, 8), q.expand(40_000, 8))
    assert result.grades("sampling") == [FROM_PROBS]
    residual = (q - p).clamp(min=0)
    assert_distributed(result.output, residual / residual.sum())


@pytest.mark.parametrize("device", DEVICES)
def test_chain_acceptance_is_the_targets_distribution(device):
    """The theorem: whatever the draft, the tokens that come out are distributed as the target's; here in one graph."""
    rows, k, vocab = 60_000, 2, 8
    p, q = distributions((k, vocab), device), distributions((k + 1, vocab), device, seed=2)
    tokens = torch.stack([torch.multinomial(p[i], rows, replacement=True) for i in range(k)], 1)
    inputs = tokens, p.expand(rows, k, vocab), q.expand(rows, k + 1, vocab)
    result = capture(speculative.chain_acceptance, *inputs)
    assert result.grades("sampling") == [FROM_PROBS]
    out = result.output
    assert_distributed(out[:, 0], q[0])
    for place in (1, 2):
        assert_distributed(out[out[:, place] >= 0, place], q[place])
    accepted = torch.minimum(p, q[:k]).sum(-1)
    expected = torch.stack([1 - accepted[0], accepted[0] * (1 - accepted[1]), accepted[0] * accepted[1]])
    assert_distributed((out >= 0).sum(1) - 1, expected)


def gpt_fast_accept(draft_tokens, draft_probs, target_probs):
    """gpt-fast's speculative_decode from the target's probabilities on: with host syncs, so no single graph."""
    k = draft_tokens.shape[0]
    at = torch.arange(0, k, device=draft_tokens.device)
    p, q = draft_probs[at, draft_tokens], target_probs[at, draft_tokens]
    accept_draft_prob = torch.minimum(torch.ones((), device=p.device), q[:k] / p)
    rejected_locations = (torch.rand_like(accept_draft_prob) > accept_draft_prob).nonzero()
    if rejected_locations.shape[0] == 0:
        return torch.cat([draft_tokens, samplers.exponential_trick(target_probs[-1]).to(draft_tokens.dtype)])
    accept_length = rejected_locations[0].item()
    new = target_probs[accept_length] - draft_probs[accept_length]
    new = torch.where(new > 0, new, 0.0)
    new = new / new.sum()
    last = samplers.exponential_trick(new)
    return torch.cat([draft_tokens[:accept_length], last.to(draft_tokens.dtype)])


@pytest.mark.parametrize("device", DEVICES)
def test_gpt_fast_with_its_syncs(device):
    """The graph breaks at nonzero() and item(); the piece with the draw after a rejection is rewritten, and all is right."""
    k, vocab, calls = 2, 6, 3000
    p, q = distributions((k, vocab), device), distributions((k + 1, vocab), device, seed=2)
    drafts = torch.stack([torch.multinomial(p[i], calls, replacement=True) for i in range(k)], 1)
    with torch.no_grad(), fi_ops.enabled(), recording() as reports:
        step = torch.compile(gpt_fast_accept)
        outputs = [step(tokens, p, q) for tokens in drafts]
    sites = {(site.grade, site.reason.partition(": ")[2]) for report in reports for site in report.sites}
    assert (FROM_PROBS, "") in sites, sites
    assert_distributed(torch.stack([out[0] for out in outputs]), q[0])
    assert_distributed(torch.stack([out[1] for out in outputs if len(out) > 1]), q[1])
    assert {len(out) for out in outputs} == {1, 2, 3}


def test_nothing_left_of_the_row():
    """The draft is the target, yet a token was rejected: 0 / 0, for which stock draws token 0, and so do we."""
    p = distributions((3, 8))
    for fn in (speculative.gpt_fast_residual, speculative.maximum_with_nothing):
        inputs = (p[0], p[0]) if fn is speculative.gpt_fast_residual else (p, p)
        result = capture(fn, *inputs)
        assert result.grades("sampling") == [FROM_PROBS]
        assert torch.equal(result.output, capture(fn, *inputs, rewritten=False).output) and result.output.max() == 0
