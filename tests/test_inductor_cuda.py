"""torch.compile with CUDA graphs, end to end: models decode right while positions advance, and nothing is skipped.

Every test compiles with `triton.cudagraph_or_error`, so that a skipped CUDA graph is an error, and counts replays: in steady
state one step is one replay of one graph.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from inductor_capture import capture, without_caches
from snippets import FULL, samplers
from snippets import cache as cache_snippets
from test_inductor_models import LAYERS, build, clear, gpt_fast, new_cache
from test_inductor_snippets import check_close, in_double
from torch._dynamo.utils import counters
from zoo.families import LATENT

import fi_ops
from fi_ops.inductor.sites import recording

transformers = pytest.importorskip("transformers")
from gpt_fast_model import sample  # noqa: E402  (test_inductor_models puts examples/ on the path)

pytestmark = pytest.mark.gpu

PROMPT, STEPS = 5, 18
BOTH = ["static", "dynamic"]
HEADS_OF_64 = dict(hidden_size=256, intermediate_size=128)
LATENT = dict(LATENT, first_k_dense_replace=LAYERS)  # no experts


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    counters.clear()
    with without_caches():
        yield
    fi_ops.disable()
    torch._dynamo.reset()


@contextlib.contextmanager
def skips_are_errors():
    with inductor_config.patch({"triton.cudagraph_or_error": True}):
        yield
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.fixture
def replays(monkeypatch):
    """One entry for each replay of a CUDA graph."""
    done: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph):
        done.append(id(graph))
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return done


class GptFast:
    """The model of examples/, caches in module buffers. Head dims of 64 in 4 query heads over 2 KV heads."""

    def __init__(self, dtype):
        self.model = gpt_fast(dtype, "cuda", dim=256, n_head=4)
        self.target = self.model

    def start(self):
        clear(self.model)

    def step(self, forward, ids, position: int):
        positions = torch.arange(position, position + ids.shape[1], device="cuda")
        return forward(ids, positions)


class HuggingFace:
    """A model of transformers over a StaticCache."""

    def __init__(self, dtype, implementation: str, family: str = "Llama", **sizes):
        self.model = build(family, implementation, "cuda", **HEADS_OF_64, **sizes).to(dtype)
        self.target = self.model.forward
        self.cache = new_cache(self.model, "static")

    def start(self):
        self.cache.reset()

    def step(self, forward, ids, position: int):
        return forward(ids, past_key_values=self.cache).logits


MODELS = {
    "gpt_fast": GptFast,
    "llama_sdpa": lambda dtype: HuggingFace(dtype, "sdpa"),
    "llama_eager": lambda dtype: HuggingFace(dtype, "eager"),
    "deepseek_sdpa": lambda dtype: HuggingFace(dtype, "sdpa", "DeepseekV3", **LATENT),
    "deepseek_eager": lambda dtype: HuggingFace(dtype, "eager", "DeepseekV3", **LATENT),
}
GRADES = {"deepseek_sdpa": "latent attention", "deepseek_eager": "latent attention"}


def prompt(vocab: int = 60) -> torch.Tensor:
    return torch.randint(1, vocab, (2, PROMPT), generator=torch.Generator().manual_seed(1)).cuda()


def decode(adapter, forward, tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, logits) of a prefill in eager mode and STEPS steps with `forward`: greedy, or fed with `tokens`."""
    adapter.start()
    logits = [adapter.step(adapter.model, prompt(), 0)[:, -1:].clone()]
    chosen = [logits[0].argmax(-1)]
    for i in range(STEPS):
        ids = chosen[-1] if tokens is None else tokens[:, i : i + 1].contiguous()
        logits.append(adapter.step(forward, ids, PROMPT + i).clone())
        chosen.append(logits[-1].argmax(-1))
    return torch.cat(chosen, 1), torch.cat(logits, 1)


def attention_grades(reports) -> list[list[str]]:
    return [[site.grade for site in report.sites if site.kind == "attention"] for report in reports]


def check_decode(name: str, replays: list, **options) -> None:
    adapter = MODELS[name](torch.float32)
    with torch.no_grad():
        tokens, logits = decode(adapter, adapter.model)
        fi_ops.enable()
        with recording() as reports, skips_are_errors():
            compiled = torch.compile(adapter.target, fullgraph=True, **options)
            ours, our_logits = decode(adapter, compiled)
    assert attention_grades(reports) == [[GRADES.get(name, FULL)] * LAYERS]
    # a warm-up, a recording (which is replayed at once), and from then on one replay a step
    assert len(replays) >= STEPS - 2 and len(set(replays)) == 1
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True], ids=BOTH)
@pytest.mark.parametrize("name", MODELS)
def test_decode_with_cuda_graphs(name, dynamic, replays):
    """The same tokens as eager in fp32, over replays at growing positions, with caches that are written in place."""
    check_decode(name, replays, dynamic=dynamic, mode="reduce-overhead")


def test_decode_max_autotune(replays):
    """Products by cuBLAS alone: choosing among Triton's templates takes minutes, and they are not what is tested."""
    with inductor_config.patch(max_autotune_gemm_backends="ATEN"):
        check_decode("gpt_fast", replays, mode="max-autotune")


def test_fi_backend(replays):
    from fi_ops.inductor.backend import fi

    adapter = GptFast(torch.float32)
    with torch.no_grad(), skips_are_errors():
        tokens, _ = decode(adapter, adapter.model)
        ours, _ = decode(adapter, torch.compile(adapter.target, backend=fi, fullgraph=True, mode="reduce-overhead"))
    assert torch.equal(ours, tokens) and len(replays) >= STEPS - 2


@pytest.mark.parametrize("name", ["gpt_fast", "llama_sdpa"])
def test_bfloat16_error_budget_over_replays(name):
    """As near to fp64 as stock is (twice its error, plus rounding), at every step of one given text."""
    adapter, precise = MODELS[name](torch.bfloat16), MODELS[name](torch.float64)
    precise.model.load_state_dict(adapter.model.state_dict())
    tokens = torch.randint(1, 60, (2, STEPS), generator=torch.Generator().manual_seed(5)).cuda()
    with torch.no_grad():
        _, exact = decode(precise, precise.model, tokens)
        _, stock = decode(adapter, adapter.model, tokens)
        fi_ops.enable()
        with skips_are_errors():
            _, ours = decode(adapter, torch.compile(adapter.target, fullgraph=True, mode="reduce-overhead"), tokens)
    allowed = (stock.double() - exact).abs().amax((0, 2)) + torch.finfo(torch.bfloat16).eps * exact.abs().amax((0, 2))
    assert ((ours.double() - exact).abs().amax((0, 2)) <= 2 * allowed).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate(implementation, replays):
    """`generate` compiles the decode step itself, with CUDA graphs, and hands it a 4-D mask; one row is padded."""
    model = build("Llama", implementation, "cuda", **HEADS_OF_64)
    model.generation_config.eos_token_id = None
    keep = torch.ones_like(prompt())
    keep[0, :2] = 0
    options = dict(attention_mask=keep, max_new_tokens=STEPS, do_sample=False, cache_implementation="static")
    stock = model.generate(prompt(), disable_compile=True, **options)
    fi_ops.enable()
    with recording() as reports, skips_are_errors():
        ours = model.generate(prompt(), **options)
    assert [FULL] * LAYERS in attention_grades(reports)
    assert all(len(grades) == LAYERS and all(grades) for grades in attention_grades(reports))
    assert torch.equal(ours, stock) and len(replays) >= STEPS - 4


# ---- random numbers ----


def multinomial(logits):
    return torch.multinomial(F.softmax(logits / 0.9, dim=-1), 1)


@pytest.mark.parametrize("fn", [samplers.gpt_fast, multinomial], ids=["exponential trick", "multinomial"])
def test_random_numbers_over_replays(fn, replays):
    """New numbers on every replay; the same sequence again after the same seed."""
    logits = torch.zeros(64, 5000, device="cuda")  # all tied, so that top-k keeps them all

    def draws(count: int) -> torch.Tensor:
        return torch.stack([compiled(logits).flatten().clone() for _ in range(count)])

    with torch.no_grad(), fi_ops.enabled(), recording() as reports, skips_are_errors():
        compiled = torch.compile(fn, fullgraph=True, mode="reduce-overhead")
        draws(3)
        torch.manual_seed(7)
        first = draws(6)
        torch.manual_seed(7)
        again = draws(6)
        further = draws(1)
    assert [site.grade for site in reports[0].sites] == ["top_k_top_p_sampling_from_logits"]
    assert len(replays) >= 14
    assert torch.equal(first, again)
    for i in range(6):
        for other in (*first[i + 1 :], further[0]):
            assert (first[i] != other).float().mean() > 0.9
    assert first.min() >= 0 and first.max() < 5000


def test_decode_step_with_its_sampler(replays):
    """Model and sampler in one CUDA graph: top-k 1 is greedy, and the caches move on."""
    adapter = GptFast(torch.float32)

    def one_step(ids, positions):
        return sample(adapter.model(ids, positions), temperature=0.8, top_k=1)[0]

    def tokens(step):
        adapter.start()
        chosen = [adapter.step(adapter.model, prompt(), 0)[:, -1:].argmax(-1)]
        for i in range(STEPS):
            chosen.append(adapter.step(step, chosen[-1], PROMPT + i).long().clone())
        return torch.cat(chosen, 1)

    with torch.no_grad(), recording() as reports, skips_are_errors():
        expected = tokens(one_step)
        with fi_ops.enabled():
            ours = tokens(torch.compile(one_step, fullgraph=True, mode="reduce-overhead"))
    kinds = [(site.kind, site.grade) for site in reports[0].sites if site.kind != "rope"]
    assert kinds == [("attention", FULL)] * LAYERS + [("sampling", "top_k_top_p_sampling_from_logits")]
    assert torch.equal(ours, expected) and len(replays) >= STEPS - 2


# ---- graphs captured by hand ----


@pytest.mark.parametrize("name", ["gpt_fast", "llama_sdpa"])
def test_captured_step_at_growing_positions(name):
    """A decode step under `torch.cuda.graph`: each replay is right at its own position."""
    adapter = MODELS[name](torch.float32)
    with torch.no_grad():
        tokens, logits = decode(adapter, adapter.model)
        with fi_ops.enabled(), recording() as reports:
            compiled = torch.compile(adapter.target, fullgraph=True)
            ids, position = tokens[:, :1].clone(), torch.full((1,), PROMPT, device="cuda")

            def step():
                if name == "gpt_fast":
                    return compiled(ids, position)
                return compiled(ids, past_key_values=adapter.cache).logits

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
                step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = step()
        assert attention_grades(reports) == [[FULL] * LAYERS]
        adapter.start()
        adapter.step(adapter.model, prompt(), 0)
        for i in range(STEPS):
            ids.copy_(tokens[:, i : i + 1])
            position.fill_(PROMPT + i)
            graph.replay()
            torch.testing.assert_close(output[:, 0], logits[:, i + 1], rtol=1e-4, atol=1e-5)


def test_captured_sampler_draws_anew():
    logits = torch.zeros(64, 5000, device="cuda")
    with torch.no_grad(), fi_ops.enabled():
        compiled = torch.compile(multinomial, fullgraph=True)
        compiled(logits)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = compiled(logits)
    draws = []
    for _ in range(4):
        graph.replay()
        draws.append(output.clone())
    for i, draw in enumerate(draws):
        for other in draws[i + 1 :]:
            assert (draw != other).float().mean() > 0.9


# ---- what is left to stock, and what explain says ----


def test_explain_names_caches_that_are_arguments(capsys):
    """CUDA graphs skip a graph that writes to an argument; a static address, or a mode without them, is no reason to worry."""

    def inputs():
        return tuple(t.cuda() for t in cache_snippets.step())

    fn, plain = cache_snippets.huggingface, inputs()
    with torch.no_grad():
        compiled = torch.compile(fn, fullgraph=True, mode="reduce-overhead")
        (note,) = (n for n in fi_ops.explain(compiled, *plain).notes if "CUDA graphs" in n)
        assert "the caches of attention at snippets/cache.py:" in note and "mark_static_address" in note
        assert not any("CUDA graphs" in n for n in fi_ops.explain(torch.compile(fn), *plain).notes)
        with fi_ops.enabled():
            for _ in range(3):
                compiled(*plain)
        assert counters["inductor"]["cudagraph_skips"] > 0
        counters.clear()
        torch._dynamo.reset()
        static = inputs()
        for cache in static[3:5]:
            torch._dynamo.mark_static_address(cache)
        with fi_ops.enabled(), skips_are_errors():
            for _ in range(3):
                compiled(*static)


def cpu_positions(q, k, v, k_cache, v_cache, positions, mask):
    k_cache[:, :, positions] = k
    v_cache[:, :, positions] = v
    return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask, enable_gqa=True)


def test_positions_on_the_cpu():
    """Indexing takes them, the cache write is torch's own then."""
    q, k, v, k_cache, v_cache, positions, mask = (t.cuda() for t in cache_snippets.step())
    inputs = (q, k, v, k_cache, v_cache, positions.cpu(), mask)
    with torch.no_grad():
        result = capture(cpu_positions, *inputs)
        check_close(result.output, cpu_positions(*inputs), cpu_positions(*in_double(inputs)))
    assert result.grades() == ["attention"] and "positions are on cpu" in result.reasons()[0]
