"""End to end through code generation: the same greedy tokens over 64 steps, from the model and from `generate`."""

from __future__ import annotations

import pytest
import torch
from inductor_capture import without_caches
from test_inductor_models import FULL, LAYERS, build, clear, gpt_fast
from torch._dynamo.utils import counters

import fi_ops
from fi_ops.inductor.sites import recording

transformers = pytest.importorskip("transformers")

STEPS = 64


@pytest.fixture(autouse=True)
def _clean():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    with without_caches():
        yield
    fi_ops.disable()
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def test_gpt_fast_64_tokens():
    model = gpt_fast()
    model.setup_caches(max_batch_size=2, max_seq_length=6 + STEPS)

    def greedy(forward):
        clear(model)
        ids = torch.randint(0, 96, (2, 6), generator=torch.Generator().manual_seed(3))
        tokens = [model(ids, torch.arange(6))[:, -1:].argmax(-1)]
        for i in range(STEPS):
            tokens.append(forward(tokens[-1], torch.tensor([6 + i]))[:, -1:].argmax(-1))
        return torch.cat(tokens, dim=1)

    with torch.no_grad():
        stock = greedy(model)
        fi_ops.enable()
        with recording() as reports:
            ours = greedy(torch.compile(model, fullgraph=True))
    assert [s.grade for s in reports[0].sites if s.kind == "attention"] == [FULL] * LAYERS and len(reports) == 1
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate_with_static_cache(implementation):
    """`generate` compiles the decode step itself (on a GPU; here the forward is compiled for it) and hands it a 4-D mask."""
    model = build("Llama", implementation)
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(4))
    keep = torch.ones_like(ids)
    keep[0, :2] = 0
    options = dict(attention_mask=keep, max_new_tokens=STEPS, do_sample=False, cache_implementation="static")
    stock = model.generate(ids, disable_compile=True, **options)
    fi_ops.enable()
    counters["fi_ops"].clear()
    model.forward = torch.compile(model.forward, fullgraph=True)
    with recording() as reports:
        ours = model.generate(ids, **options)
    grades = [[s.grade for s in r.sites if s.kind == "attention"] for r in reports]
    assert grades and all(len(g) == LAYERS and all(g) for g in grades)
    assert [FULL] * LAYERS in grades
    assert torch.equal(ours, stock)
