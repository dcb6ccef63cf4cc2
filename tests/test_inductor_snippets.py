"""Every snippet: rewritten to the grade it says, or left alone for the reason it says; and the same answer as eager."""

from __future__ import annotations

import copy
import re

import pytest
import snippets
import torch
from inductor_capture import DEVICES, capture, to_device

SNIPPETS = snippets.load()
HEAD_DIM = 16
GRADED = [s for s in SNIPPETS.values() if s.kind == "attention"]

# what SDPA reads was written to through another view of the same tensor: see ordered_by_use
VIEWS_MADE_ANEW = ("stacks.a_stack_with_gaps",)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def check_close(got, reference, exact):
    """Twice the error that plain torch of the same dtype has against fp64, as everywhere in the tests."""
    for ours, plain, precise in zip(tensors(got), tensors(reference), tensors(exact), strict=True):
        assert ours.shape == plain.shape and ours.dtype == plain.dtype
        if not ours.is_floating_point():
            assert torch.equal(ours, plain)
            continue
        precise = precise.double()
        allowed = 2 * ((plain.double() - precise).abs().max() + torch.finfo(ours.dtype).eps * precise.abs().max())
        assert (ours.double() - precise).abs().max() <= allowed


def in_double(inputs):
    return tuple(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", [s.name for s in GRADED])
def test_snippet(name, dynamic, device):
    snippet = SNIPPETS[name]
    inputs = to_device(snippet.inputs(), device)
    before, plain_inputs, exact_inputs = copy.deepcopy(inputs), copy.deepcopy(inputs), in_double(copy.deepcopy(inputs))
    with torch.no_grad():
        plain = snippet.fn(*plain_inputs)
        exact = snippet.fn(*exact_inputs)
    for tensor in tensors(inputs):
        if tensor.dim() == 4 and tensor.shape[-1] == HEAD_DIM:
            torch._dynamo.mark_static(tensor, 3)  # as in a model, where it is written out in views
    try:
        got = capture(snippet.fn, *inputs, dynamic=dynamic)
    except torch._dynamo.exc.Unsupported as error:
        with pytest.raises(torch._dynamo.exc.Unsupported):
            capture(snippet.fn, *copy.deepcopy(before), rewritten=False, dynamic=dynamic)
        pytest.skip(f"stock torch does not compile it: {error}".splitlines()[0])

    assert not any("internal error" in r for r in got.reasons()), got.reasons()
    grade = snippet.dynamic_grade if dynamic and snippet.dynamic_grade is not None else snippet.grade
    if grade is None:
        assert got.grades() == []
    else:
        assert set(got.grades()) == {grade}, got.sites
    if snippet.reason and grade == snippet.grade:
        assert any(re.search(snippet.reason, r) for r in got.reasons()), got.reasons()
    if snippet.rotated is not None:
        assert [bool(g) for g in got.grades("rope")] == [snippet.rotated], got.sites
    assert not any("fi_anchor" in t for t in got.targets())
    if snippet.grade:
        check_close(got.output, plain, exact)
    else:  # left alone: to the last bit what stock torch makes of it
        stock = capture(snippet.fn, *copy.deepcopy(before), rewritten=False, dynamic=dynamic)
        assert all(map(torch.equal, tensors(got.output), tensors(stock.output)))
    check_close(inputs, plain_inputs, exact_inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_left_alone_is_what_stock_compiles(device):
    """A graph in which nothing was rewritten is the graph of stock torch, node for node."""
    from inductor_capture import graph_text, ordered_by_use

    for snippet in GRADED:
        if snippet.grade != "" or "autocast" in snippet.reason:
            continue
        for dynamic in (False, True):
            inputs = to_device(snippet.inputs(), device)
            stock, ours = (capture(snippet.fn, *inputs, rewritten=r, dynamic=dynamic) for r in (False, True))
            graphs = [ours.graphs[0], stock.graphs[0]]
            if snippet.name in VIEWS_MADE_ANEW:
                graphs = [ordered_by_use(graph) for graph in graphs]
            assert graph_text(graphs[0]) == graph_text(graphs[1]), snippet.name
