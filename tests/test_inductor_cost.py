"""What the passes cost: at most 5% of stock's compile time on a model of 32 layers, and time that is linear in the graph."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import Counter

import pytest
import torch
from inductor_capture import Capture, compiled_for_capture

from fi_ops.inductor import graft, manager

transformers = pytest.importorskip("transformers")

from test_inductor_models import build, new_cache  # noqa: E402

SHARE = 0.05
SHALLOW, DEEP = 8, 32
SLACK = 1.15
"""Over DEEP / SHALLOW times the work: what a model does once makes it less, what fake tensors cache varies."""


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_step(
    layers: int, implementation: str, dynamic: bool | None, rewritten: bool = True
) -> tuple[float, Capture]:
    """(processor seconds, what happened) of compiling one decode step as far as code generation."""
    torch._dynamo.reset()
    model, result = build("Llama", implementation, num_hidden_layers=layers), Capture()
    cache = new_cache(model, "static")
    ids = torch.ones(2, 5, dtype=torch.long)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        step = compiled_for_capture(model.forward, result, rewritten=rewritten, dynamic=dynamic)
        start = time.process_time()
        step(ids[:, :1], past_key_values=cache)
        return time.process_time() - start, result


class Meter:
    """Processor time of our three passes, or the function calls that they make."""

    def __init__(self, monkeypatch, counts: bool = False):
        self.seconds, self.profile = 0.0, cProfile.Profile() if counts else None
        for slot, ours in list(manager._SLOTS.items()):
            monkeypatch.setitem(manager._SLOTS, slot, self._metered(ours))

    def _metered(self, ours):
        def run(graph):
            start = time.process_time()
            if self.profile is not None:
                self.profile.enable()
            try:
                ours(graph)
            finally:
                if self.profile is not None:
                    self.profile.disable()
                self.seconds += time.process_time() - start

        return run

    @property
    def calls(self) -> int:
        return pstats.Stats(self.profile).total_calls


cases = pytest.mark.parametrize(
    ("implementation", "dynamic"), [("sdpa", None), ("sdpa", True), ("eager", None)], ids=["sdpa", "dynamic", "eager"]
)


@cases
def test_share_of_the_compile_time(implementation, dynamic, monkeypatch):
    """Of stock's compile time without code generation, which is the greater part of it: a stricter bound than that of the
    title. Processor time, the least of two runs of the passes, so that a busy machine does not matter."""
    compile_step(1, implementation, dynamic)  # imports
    stock, _ = compile_step(DEEP, implementation, dynamic, rewritten=False)
    times = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            meter = Meter(patch)
            _, result = compile_step(DEEP, implementation, dynamic)
        assert [bool(grade) for grade in result.grades()] == [True] * DEEP
        times.append(meter.seconds)
    assert 0 < min(times) <= SHARE * stock, f"{times} of {stock} s"


@cases
@pytest.mark.parametrize("declined", [False, True], ids=["rewritten", "declined"])
def test_linear_in_the_graph(implementation, dynamic, declined, monkeypatch):
    """Four times the layers, four times the function calls; also where no site is taken, so that all are put back."""
    if declined:
        monkeypatch.setattr("fi_ops.inductor.rewrite.check_worth", decline)
    calls = {}
    for layers in (1, SHALLOW, DEEP):
        with monkeypatch.context() as patch:
            meter = Meter(patch, counts=True)
            _, result = compile_step(layers, implementation, dynamic)
        assert [bool(grade) for grade in result.grades()] == [not declined] * layers
        calls[layers] = meter.calls
    assert 0 < calls[DEEP] <= SLACK * DEEP / SHALLOW * calls[SHALLOW], calls


def decline(name, facts):
    from fi_ops.inductor.sites import Declined

    raise Declined(f"{name}: for this test")


def attend_often(q, k, v, times):
    """A graph of little but attention, so that what a site costs is most of what the passes do."""
    for _ in range(times):
        q = torch.nn.functional.scaled_dot_product_attention(q + 1, k, v, is_causal=True)
    return q


def counted(function, calls: Counter):
    def call(*args):
        calls[function.__name__] += 1
        return function(*args)

    return call


def test_declined_sites_over_symbolic_sizes(monkeypatch):
    """What is put back is traced anew, on the sizes that the graph has: every node is asked once for the size it computes."""
    monkeypatch.setattr("fi_ops.inductor.rewrite.check_worth", decline)
    asked = {}
    for times in (SHALLOW, 2 * DEEP):
        q, k, v = (torch.randn(2, 4, 10 + i, 16) for i in (0, 1, 1))
        result, calls = Capture(), Counter()
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(graft, "_expression", counted(graft._expression, calls))
            torch._dynamo.reset()
            compiled_for_capture(attend_often, result, dynamic=True)(q, k, v, times)
        assert result.grades() == [""] * times
        asked[times] = calls.total()
    assert 0 < asked[2 * DEEP] <= SLACK * 2 * DEEP / SHALLOW * asked[SHALLOW], asked
