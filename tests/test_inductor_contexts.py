"""Where a compiled model may find itself: training, export, transforms, autocast, inference mode, copies.

In each: unaffected or right, with the number of rewritten sites.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from inductor_capture import without_caches
from torch import nn
from torch._inductor.utils import fresh_cache

import fi_ops
from fi_ops.inductor.sites import recording
from fi_ops.testing import assert_within_budget

HEADS, WIDTH, LENGTH = 4, 32, 6


class Attention(nn.Module):
    def __init__(self, implementation: str = "sdpa"):
        super().__init__()
        torch.manual_seed(0)
        self.implementation = implementation
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        if self.implementation == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
            mask = torch.full(scores.shape[-2:], float("-inf"), device=x.device).triu(1)
            y = (scores + mask).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    with fresh_cache(), without_caches():  # what comes out of a cache is not counted
        yield
    fi_ops.disable()
    torch._dynamo.reset()


@contextlib.contextmanager
def rewritten(sites: int, found: int | None = None) -> Iterator[None]:
    """What is compiled inside has `found` attention sites (if given), of which `sites` are rewritten."""
    with fi_ops.enabled(), recording() as reports:
        yield
    seen = [site for report in reports for site in report.sites if site.kind == "attention"]
    assert sum(bool(site.grade) for site in seen) == sites, seen
    assert found is None or len(seen) == found, seen
    assert not any("internal error" in site.reason for site in seen), seen


def inputs(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def check(got: torch.Tensor, model: nn.Module, x: torch.Tensor, plain: torch.Tensor | None = None) -> None:
    """`got` is `model(x)` within the error budget; `plain`: what eager code says, if not in the same context as this."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_within_budget(got, exact, model(x) if plain is None else plain)


implementations = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


# ---- gradients ----


@implementations
def test_training_is_stock(implementation):
    """Loss and gradients, of a step after an optimizer's step as well, to the last bit."""

    def train(enabled):
        torch._dynamo.reset()
        model = Attention(implementation)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        compiled, results = torch.compile(model, fullgraph=True), []
        with rewritten(0) if enabled else contextlib.nullcontext():
            for _ in range(2):
                optimizer.zero_grad()
                loss = compiled(inputs()).square().mean()
                loss.backward()
                results += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
                optimizer.step()
        return results

    assert all(map(torch.equal, train(True), train(False)))


@implementations
def test_gradients_of_the_input_alone(implementation):
    model = Attention(implementation).requires_grad_(False)
    x, y = inputs().requires_grad_(), inputs().requires_grad_()
    with rewritten(0):
        torch.compile(model, fullgraph=True)(x).sum().backward()
    model(y).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@implementations
def test_grad_mode_without_anything_to_differentiate(implementation):
    model = Attention(implementation).requires_grad_(False)
    with rewritten(1):
        got = torch.compile(model, fullgraph=True)(inputs())
    check(got, model, inputs())


@implementations
def test_one_function_with_and_without_gradients(implementation):
    """Evaluation in between training steps: two compiles, of which one is rewritten."""
    model = Attention(implementation)
    compiled = torch.compile(model, fullgraph=True)
    with rewritten(1):
        for _ in range(2):
            loss = compiled(inputs()).sum()
            loss.backward()
            with torch.no_grad():
                check(compiled(inputs()), model, inputs())
    expected = Attention(implementation)
    for _ in range(2):
        expected(inputs()).sum().backward()
    torch.testing.assert_close(model.qkv.weight.grad, expected.qkv.weight.grad)


@implementations
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_and_inference_mode(mode, implementation):
    model = Attention(implementation)
    with mode(), rewritten(1):
        got = torch.compile(model, fullgraph=True)(inputs())
    check(got, model, inputs())


def test_no_grad_inside_the_function():
    model = Attention()

    def fn(x):
        with torch.no_grad():
            y = model(x)
        return y * model.out.bias

    with rewritten(0):
        got = torch.compile(fn, fullgraph=True)(inputs())
    got.sum().backward()
    torch.testing.assert_close(got, fn(inputs()))
    torch.testing.assert_close(model.out.bias.grad, model(inputs()).detach().sum((0, 1)))


# ---- export ----


@implementations
@pytest.mark.parametrize("strict", [False, True])
def test_export_is_plain_torch(strict, implementation):
    """An exported program runs where fi_ops is not installed; compiling it rewrites it."""
    model = Attention(implementation).eval()
    with torch.no_grad(), rewritten(0):
        program = torch.export.export(model, (inputs(),), strict=strict)
        lowered = program.run_decompositions()
    for graph in (program.graph, lowered.graph):
        assert not any("fi." in str(node.target) or "fi_anchor" in str(node.target) for node in graph.nodes)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    module = torch.export.load(buffer).module()
    with torch.no_grad():
        check(module(inputs()), model, inputs())
        check(lowered.module()(inputs()), model, inputs())
        with rewritten(1):
            got = torch.compile(module, fullgraph=True)(inputs())
    check(got, model, inputs())


# ---- torch.func ----


@implementations
def test_functional_call(implementation):
    """Parameters as arguments, inside the compiled function and around a compiled module."""
    model, other = Attention(implementation), Attention(implementation)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    parameters = dict(other.named_parameters())

    def call(parameters, x):
        return torch.func.functional_call(model, parameters, (x,))

    with torch.no_grad():
        with rewritten(1):
            got = torch.compile(call, fullgraph=True)(parameters, inputs())
        check(got, other, inputs())
        compiled = torch.compile(model)
        with rewritten(1):
            check(compiled(inputs()), model, inputs())
        got = torch.func.functional_call(compiled, {f"_orig_mod.{k}": p for k, p in parameters.items()}, (inputs(),))
        check(got, other, inputs())


@implementations
def test_grad_of_a_compiled_function(implementation):
    model = Attention(implementation)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    expected = torch.func.grad(loss)(parameters, inputs())
    with rewritten(0):
        got = torch.compile(torch.func.grad(loss), fullgraph=True)(parameters, inputs())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


@implementations
def test_vmap_in_a_compiled_function(implementation):
    model = Attention(implementation)
    x = torch.stack([inputs(), 2 * inputs(), -inputs()])
    with torch.no_grad():
        with fi_ops.enabled():
            got = torch.compile(torch.vmap(model), fullgraph=True)(x)
        for mine, one in zip(got, x, strict=True):
            check(mine, model, one)


@implementations
def test_vmap_over_parameters(implementation):
    models = [Attention(implementation) for _ in range(3)]
    with torch.no_grad():
        for i, model in enumerate(models):
            for parameter in model.parameters():
                parameter.mul_(1 + i / 4)
    parameters, _ = torch.func.stack_module_state(models)
    parameters = {name: p.detach() for name, p in parameters.items()}

    def call(parameters, x):
        return torch.func.functional_call(models[0], parameters, (x,))

    with torch.no_grad():
        with fi_ops.enabled():
            got = torch.compile(torch.vmap(call, (0, None)), fullgraph=True)(parameters, inputs())
        for mine, model in zip(got, models, strict=True):
            check(mine, model, inputs())


# ---- autocast ----


@implementations
@pytest.mark.parametrize("place", ["around", "inside", "part"])
def test_autocast(place, implementation):
    """In bfloat16, within twice the error that stock torch has under the same autocast."""
    model = Attention(implementation)

    def inside(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    def part(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        return y + model(x)

    fn = {"around": model, "inside": inside, "part": part}[place]
    scope = torch.autocast("cpu", torch.bfloat16) if place == "around" else contextlib.nullcontext()
    with torch.no_grad(), scope:
        plain = fn(inputs())
        sites = 0 if implementation == "sdpa" else 2 if place == "part" else 1
        with rewritten(sites):
            got = torch.compile(fn)(inputs())
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(inputs().double())
    assert got.dtype == plain.dtype
    if place == "part":
        exact = 2 * exact
        assert_within_budget(got.bfloat16(), exact, plain.bfloat16())
    else:
        assert_within_budget(got, exact, plain)


# ---- floats that dynamic=True makes inputs ----


class Capped(nn.Module):
    """Eager attention with a soft cap, as Gemma 2 has it."""

    def __init__(self):
        super().__init__()
        self.cap = 2.0

    def forward(self, q, k, v):
        scores = q @ k.transpose(2, 3) * 0.25
        return (torch.tanh(scores / self.cap) * self.cap).softmax(-1) @ v


@pytest.mark.parametrize("specialized", [False, True])
def test_soft_cap_that_may_change(specialized):
    """Dynamo takes a float for an input, whose value an op could not follow: left alone, and right when it changes. Where
    dynamo is told to guard on floats, it is a constant."""
    model = Capped()
    q, k, v = (3 * torch.randn(2, 2, LENGTH, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(specialize_float=specialized), recording() as reports:
        for cap, compiles in ((2.0, 1), (5.0, 1 + specialized)):
            model.cap = cap
            with fi_ops.enabled():
                check_capped(compiled(q, k, v), model, q, k, v)
            sites = [site for report in reports for site in report.sites]
            assert [site.grade for site in sites] == ["attention" if specialized else ""] * compiles
    assert specialized or "specialize_float" in sites[0].reason


def check_capped(got, model, *qkv):
    assert_within_budget(got, model(*(t.double() for t in qkv)), model(*qkv))


# ---- copies ----


@implementations
def test_deepcopies(implementation):
    """A copy of a compiled model, before and after it ran, and a compiled copy: each has its own weights."""
    model = Attention(implementation)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        unused = copy.deepcopy(compiled)
        with rewritten(1):
            check(compiled(inputs()), model, inputs())
        used, plain = copy.deepcopy(compiled), copy.deepcopy(model)
        recompiled = torch.compile(plain, fullgraph=True)
        for i, copied in enumerate((unused, used, recompiled)):
            for parameter in copied.parameters():
                parameter.mul_(0.5 + i)
            with fi_ops.enabled():
                check(copied(inputs()), copied._orig_mod, inputs())
        check(compiled(inputs()), model, inputs())


@implementations
def test_pickled(implementation):
    """The module behind a compiled one, and a module compiled in place, come back as plain torch."""
    model = Attention(implementation)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        with rewritten(1):
            compiled(inputs())
        loaded = pickle.loads(pickle.dumps(compiled._orig_mod))
        check(loaded(inputs()), model, inputs())
        torch._dynamo.reset()
        with rewritten(1):
            check(torch.compile(loaded, fullgraph=True)(inputs()), model, inputs())
        model.compile(fullgraph=True)
        torch._dynamo.reset()
        with rewritten(1):
            model(inputs())
        in_place = pickle.loads(pickle.dumps(model))
        check(in_place(inputs()), in_place, inputs(), plain=Attention(implementation)(inputs()))


def test_state_dict_moves_between_compiled_and_plain():
    model, other = Attention(), Attention()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.25)
        compiled = torch.compile(model, fullgraph=True)
        with rewritten(1):
            compiled(inputs())
            compiled._orig_mod.load_state_dict(other.state_dict())
            check(compiled(inputs()), other, inputs())
