"""Random numbers of rewritten samplers under `torch.manual_seed`, and `enable(sampling=False)`, which leaves samplers alone."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from inductor_capture import DEVICES, capture, graph_text
from snippets import samplers
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.profiler import profile

import fi_ops
from fi_ops.inductor import manager, options, sites

SAMPLER = "top_k_top_p_sampling_from_logits"
OFF = "off: enable(sampling=False)"


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    counters.clear()
    with fresh_cache():
        yield
    fi_ops.disable()
    torch._dynamo.reset()


def multinomial(logits):
    return torch.multinomial(F.softmax(logits / 0.9, dim=-1), 1)


SPELLINGS = pytest.mark.parametrize("fn", [samplers.gpt_fast, multinomial], ids=["exponential", "multinomial"])


def flat_logits(device):
    """All tied, so that top-k keeps them all, and two draws are hardly ever the same."""
    return torch.zeros(64, 5000, device=device)


# ---- seeds ----


@SPELLINGS
@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_repeats_the_draws(fn, device):
    """Run to run: also of functions compiled anew."""
    logits = flat_logits(device)

    def draws(seed):
        torch.manual_seed(seed)
        return torch.stack([compiled(logits).flatten() for _ in range(3)])

    with torch.no_grad(), fi_ops.enabled():
        compiled = torch.compile(fn, fullgraph=True)
        first, again, other = draws(7), draws(7), draws(8)
        torch._dynamo.reset()
        anew = draws(7)
    assert counters["fi_ops"][f"sampling: {SAMPLER}"] >= 1
    assert torch.equal(first, again) and torch.equal(first, anew)
    different = [(first[0], first[1]), (first[0], first[2]), (first[1], first[2]), (first[0], other[0])]
    assert all((a != b).float().mean() > 0.9 for a, b in different)


@SPELLINGS
@pytest.mark.parametrize("device", DEVICES)
def test_the_stream_is_not_stocks(fn, device):
    """What the documentation says: a seed gives other tokens than it does without the rewrites."""
    logits, tokens = flat_logits(device), {}
    for rewritten in (False, True):
        torch._dynamo.reset()
        with torch.no_grad(), fi_ops.enabled(rewritten):
            compiled = torch.compile(fn, fullgraph=True)
            torch.manual_seed(7)
            tokens[rewritten] = compiled(logits).flatten()
    assert (tokens[False] != tokens[True]).float().mean() > 0.9


def test_one_row_more_keeps_the_others():
    """One number a row, drawn in order: the first rows of a larger batch have the numbers they would have alone."""
    with torch.no_grad(), fi_ops.enabled():
        compiled = torch.compile(multinomial, dynamic=True)
        tokens = []
        for rows in (16, 17):
            torch.manual_seed(3)
            tokens.append(compiled(torch.zeros(rows, 5000)).flatten())
    assert torch.equal(tokens[0], tokens[1][:16])


@pytest.mark.gpu
@SPELLINGS
def test_cuda_graph_replays_follow_the_seed(fn):
    """Replays of a CUDA graph draw anew, the same after reseeding, also where another function drew in between."""
    logits, eager = flat_logits("cuda"), torch.empty(7, device="cuda")

    def draws(count):
        return torch.stack([compiled(logits).flatten().clone() for _ in range(count)])

    with torch.no_grad(), fi_ops.enabled():
        compiled = torch.compile(fn, fullgraph=True, mode="reduce-overhead")
        draws(3)
        torch.manual_seed(7)
        first = draws(4)
        eager.uniform_()
        behind = draws(1)
        torch.manual_seed(7)
        assert torch.equal(first, draws(4))
        eager.uniform_()
        assert torch.equal(behind, draws(1))
    everything = [*first, behind[0]]
    assert all((a != b).float().mean() > 0.9 for i, a in enumerate(everything) for b in everything[:i])


# ---- enable(sampling=False) ----


@pytest.mark.parametrize("device", DEVICES)
def test_switched_off_is_stocks_graph(device):
    """Node for node, and the token that stock draws; attention beside it is rewritten all the same."""

    def fn(logits, q):
        return samplers.gpt_fast(logits), F.scaled_dot_product_attention(q, q, q)

    inputs = torch.randn(3, 50, device=device), torch.randn(1, 2, 6, 16, device=device)
    stock = capture(lambda x: fn(x, inputs[1])[0], inputs[0], rewritten=False)
    fi_ops.enable(sampling=False)
    ours = capture(lambda x: fn(x, inputs[1])[0], inputs[0])
    assert ours.grades("sampling") == [""] and ours.reasons() == [OFF]
    assert graph_text(ours.graphs[0]) == graph_text(stock.graphs[0])
    both = capture(fn, *inputs)
    assert both.grades("sampling") == [""] and both.grades("attention") == ["attention"]


def test_switched_off_draws_stocks_tokens():
    logits, tokens = flat_logits("cpu"), []
    for sampling in (None, False):
        torch._dynamo.reset()
        with torch.no_grad(), fi_ops.enabled(sampling is False, sampling=sampling):
            compiled = torch.compile(multinomial)
            torch.manual_seed(7)
            tokens.append(compiled(logits))
    assert torch.equal(*tokens)


def test_the_setting_nests_and_comes_back():
    def state():
        return manager.is_enabled() and options.current().sampling

    fi_ops.enable(sampling=False)
    assert manager.is_enabled() and state() is False
    fi_ops.enable()  # says nothing of samplers, and changes nothing
    assert state() is False
    with fi_ops.enabled():
        assert state() is False
        with fi_ops.enabled(sampling=True):
            assert state() is True
            with fi_ops.enabled(False):
                assert not manager.is_enabled()
                with fi_ops.enabled():
                    assert state() is True
            assert state() is True
        assert state() is False
    with pytest.raises(KeyError), fi_ops.enabled(sampling=True):
        raise KeyError
    assert state() is False
    fi_ops.enable(sampling=True)
    assert state() is True
    fi_ops.enable(sampling=False)
    fi_ops.disable()
    fi_ops.enable()
    assert state() is True, "disable() forgets the setting"
    fi_ops.disable()
    with fi_ops.enabled(sampling=False):
        assert state() is False
    assert not manager.is_enabled() and options.current() == options.Options()


def test_keys_differ():
    fi_ops.enable()
    on = manager.cache_key()
    fi_ops.enable(sampling=False)
    off = manager.cache_key()
    fi_ops.enable(sampling=True)
    assert on == manager.cache_key() != off


def test_caches_do_not_mix_the_two():
    """One cache folder: each setting finds its own graph there and never the other's; a graph from there draws as when made."""
    logits, drawn = flat_logits("cpu"), {}

    def run(sampling):
        torch._dynamo.reset()
        counters.clear()
        with torch.no_grad(), fi_ops.enabled(sampling=sampling):
            compiled = torch.compile(multinomial, fullgraph=True)
            torch.manual_seed(7)
            drawn.setdefault(sampling, []).append(compiled(logits))
            with profile() as events:
                compiled(logits)
        assert not counters["aot_autograd"]["autograd_cache_bypass"] + counters["inductor"]["fxgraph_cache_bypass"]
        hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
        return bool(hits), any(event.name == f"fi::{SAMPLER}" for event in events.events())

    assert [run(True), run(False), run(True), run(False)] == [
        (False, True),
        (False, False),
        (True, True),
        (True, False),
    ]
    assert torch.equal(*drawn[True]) and torch.equal(*drawn[False])


def test_explain_and_warnings(monkeypatch, capsys):
    """explain names the switch; nobody is warned of what was asked for, and a change of the setting is one."""
    monkeypatch.setattr(sites, "_warned", set())
    logits = torch.randn(2, 50)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        fi_ops.enable(sampling=False)
        torch.compile(multinomial)(logits)
        found = fi_ops.explain(multinomial, logits)
    assert [s.reason for s in found.sites] == [OFF] and OFF in capsys.readouterr().out
    assert "sampling: 0 of 1 rewritten" in str(found)
    with pytest.warns(UserWarning, match="compiled before this call stay as they are"):
        fi_ops.enable(sampling=True)
    assert fi_ops.explain(multinomial, logits).count("sampling", fused=True) == 1
