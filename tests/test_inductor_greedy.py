"""Greedy decoding: where argmax becomes an op, with the same ids, and where it is left to Inductor."""

from __future__ import annotations

import pytest
import torch
from inductor_capture import capture, graph_text

V = 65_536
DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def logits(rows: int = 3, vocab: int = V, dtype=torch.float32) -> torch.Tensor:
    """Whole numbers, so that every row has ties."""
    return torch.randn(rows, vocab).mul(3).round().to(dtype)


def special_rows() -> torch.Tensor:
    x = logits(7)
    x[0] = -torch.inf
    x[1, [9, 5]] = torch.inf
    x[2, [700, 70]] = torch.nan
    x[3, [800, 8]], x[3, 80] = torch.inf, torch.nan
    x[4] = torch.where(x[4] > 0, -0.0, 0.0)
    x[5] = -x[5].abs()
    x[6, 40_000:] = torch.nan
    return x


def argmax(x):
    return x.argmax(-1)


def kept_dim(x):
    return torch.argmax(x, dim=1, keepdim=True)


def in_float(x):
    return x.float().argmax(dim=-1)


def lm_head(hidden, weight):
    return (hidden @ weight.t())[:, -1].argmax(-1, keepdim=True)


def hidden_and_weight():
    return torch.randn(2, 3, 8), torch.randn(V, 8)


REWRITTEN = [
    (argmax, lambda: (logits(),)),
    (argmax, lambda: (logits(1),)),
    (argmax, lambda: (logits(4, 32_000, torch.bfloat16),)),
    (argmax, lambda: (special_rows(),)),
    (argmax, lambda: (logits()[0],)),
    (argmax, lambda: (torch.randn(3, 4, V)[:, -1],)),
    (kept_dim, lambda: (logits(dtype=torch.float16),)),
    (in_float, lambda: (logits(dtype=torch.bfloat16),)),
    (lambda x: x[1].argmax(), lambda: (logits(),)),
    (lambda x: x[1].argmax(0, keepdim=True), lambda: (logits(),)),
    (lm_head, hidden_and_weight),
]


@DYNAMIC
@pytest.mark.parametrize(("fn", "inputs"), REWRITTEN)
def test_same_ids(fn, inputs, dynamic):
    inputs = inputs()
    result = capture(fn, *inputs, dynamic=dynamic)
    if not dynamic:  # else the vocabulary has no known size
        assert [(site.grade, site.pieces) for site in result.sites if site.kind == "sampling"] == [
            ("top_k", ("greedy",))
        ]
    expected = fn(*inputs)
    assert result.output.dtype == expected.dtype and torch.equal(result.output, expected)


def test_symbolic_batch():
    x = logits()
    torch._dynamo.mark_dynamic(x, 0)
    result = capture(argmax, x, dynamic=None)
    assert result.grades("sampling") == ["top_k"] and torch.equal(result.output, x.argmax(-1))


LEFT = [
    (argmax, lambda: (logits(40, 1000),)),
    (argmax, lambda: (logits(1, 32_000),)),
    (argmax, lambda: (logits().t().contiguous().t(),)),
    (argmax, lambda: (logits(dtype=torch.float64),)),
    (argmax, lambda: (torch.randint(0, 9, (3, V)),)),
    (lambda x: x.argmax(0), lambda: (logits(),)),
    (lambda x: x.argmax(), lambda: (logits(),)),
    (lambda x: (x * 2 + 1).argmax(-1), lambda: (logits(),)),
    (lambda x: x.to(torch.float16).argmax(-1), lambda: (logits(),)),
]


@pytest.mark.parametrize(("fn", "inputs"), LEFT)
def test_left_to_inductor(fn, inputs):
    inputs = inputs()
    result, stock = capture(fn, *inputs), capture(fn, *inputs, rewritten=False)
    assert result.grades("sampling") == [] and torch.equal(result.output, fn(*inputs))
    assert [graph_text(g) for g in result.graphs] == [graph_text(g) for g in stock.graphs]


@pytest.mark.parametrize("dynamic", [False, None])
def test_generated_code(dynamic):
    import fi_ops

    x = special_rows()
    with fi_ops.enabled():
        compiled = torch.compile(argmax, fullgraph=True, dynamic=dynamic)
        assert torch.equal(compiled(x), x.argmax(-1))
        assert torch.equal(compiled(x[:2].contiguous()), x[:2].argmax(-1))
