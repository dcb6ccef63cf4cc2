"""Subclasses of Tensor as inputs: a graph on torch-function subclasses is stock's, node for node; parameters, buffers and wrappers
do not keep a graph from being rewritten."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
import torch.nn.functional as F
from inductor_capture import capture, graph_text, without_caches
from torch import nn
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.testing._internal.two_tensor import TwoTensor

import fi_ops
from fi_ops.inductor.sites import recording
from fi_ops.testing import assert_within_budget

LENGTH, LMAX, D = 6, 8, 16


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


class Tagged(torch.Tensor):
    """A subclass that only keeps its type."""


class Doubling(torch.Tensor):
    """A subclass that changes what SDPA does."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * result if function is F.scaled_dot_product_attention else result


class Quiet(torch.Tensor):
    """A subclass that overrides nothing, and whose results are plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Weight(nn.Parameter):
    """A class of parameters, as quantisation libraries have them."""


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_to_scaled_keys(q, k, v):
    return attend(q, k * 2, v)


def rotate_and_attend(q, k, v):
    angles = torch.arange(LENGTH)[:, None] * 100.0 ** (-torch.arange(D // 2) / D)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    q, k = (x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin for x in (q, k))
    return attend(q, k, v)


def eager(q, k, v):
    scores = q @ (k * 2).transpose(2, 3) * D**-0.5
    return scores.softmax(-1) @ v


def write_and_attend(q, k, v):
    """Writes into the first slots of k and v, which are caches."""
    k[:, :, :2], v[:, :, :2] = q[:, :, :2], q[:, :, 2:4]
    return F.scaled_dot_product_attention(q[:, :, :2], k, v)


def sample(q, k, v):
    weights = torch.softmax(k[0, 0], -1)
    return torch.multinomial(weights, 1)


def qkv():
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(1, 2, LENGTH, D, generator=generator) for _ in range(3))


def plain(tensor):
    return tensor.as_subclass(torch.Tensor)


SUBCLASSES = (Tagged, Doubling, Quiet)
BELOW_OTHER_NODES = [attend_to_scaled_keys, eager, rotate_and_attend]
"""Functions whose graphs run with stock torch under every release, because no op gets k itself. An op of
ours for the last one would."""


@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize("fn", BELOW_OTHER_NODES)
def test_torch_function_subclass_runs_as_with_stock(fn, kind):
    def run(how):
        q, k, v = qkv()
        k = k.as_subclass(kind)
        with torch.no_grad():
            result = how(q, k, v)
        assert type(k) is kind
        return result, plain(k), v

    with fi_ops.enabled():
        got = run(torch.compile(fn, fullgraph=True))
    torch._dynamo.reset()
    stock, reference = run(torch.compile(fn, fullgraph=True)), run(fn)
    assert type(got[0]) is type(stock[0])  # which is not always that of eager code
    assert all(torch.equal(plain(mine), plain(theirs)) for mine, theirs in zip(got, stock, strict=True))
    torch.testing.assert_close(plain(got[0]), plain(reference[0]))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", SUBCLASSES)
@pytest.mark.parametrize("fn", [attend, *BELOW_OTHER_NODES, write_and_attend, sample])
def test_graph_on_a_torch_function_subclass_is_stocks(fn, kind, dynamic):
    """Node for node, with a site that says why. The graphs run without torch's look at custom ops, which refuses some of them."""
    with torch._functorch.config.patch(check_custom_op_aliasing=False):
        ours, stock = (
            capture(fn, qkv()[0], qkv()[1].as_subclass(kind), qkv()[2], rewritten=r, dynamic=dynamic)
            for r in (True, False)
        )
    assert [graph_text(g) for g in ours.graphs] == [graph_text(g) for g in stock.graphs]
    assert ours.sites and not any(site.grade for site in ours.sites)
    assert kind.__name__ in ours.sites[0].reason, ours.sites


@pytest.mark.parametrize("kind", [Tagged, Doubling])
def test_torch_function_subclass_given_to_an_op(kind):
    """Stock torch 2.11 to 2.13 refuse that as well: the same error, or the right answer."""

    def outcome(rewritten):
        q, k, v = qkv()
        torch._dynamo.reset()
        try:
            with torch.no_grad(), fi_ops.enabled(rewritten), without_caches():
                return torch.compile(attend)(q.as_subclass(kind), k, v)
        except TypeError as error:
            return str(error).replace("0x", "").splitlines()[0]

    got, stock = outcome(True), outcome(False)
    if isinstance(stock, str):
        assert got == stock and "fi." not in got
        return
    assert type(got) is type(stock) and torch.equal(plain(got), plain(stock))


def test_a_cached_graph_of_plain_tensors_is_not_run_on_a_subclass():
    """Both graphs look alike; the types of their inputs are part of what torch's caches look them up by."""
    caching = torch._functorch.config.patch(enable_autograd_cache=True, check_custom_op_aliasing=False)
    with torch.no_grad(), fi_ops.enabled(), caching, torch._inductor.config.patch(fx_graph_cache=True):
        for kind, has_op in ((torch.Tensor, True), (Quiet, False), (torch.Tensor, True)):
            torch._dynamo.reset()
            q, k, v = qkv()
            expected = write_and_attend(*qkv())
            got, codes = run_and_get_code(torch.compile(write_and_attend), q, k.as_subclass(kind), v)
            torch.testing.assert_close(got, expected)
            assert ["torch.ops.fi." in code for code in codes] == [has_op]


def test_only_the_graph_with_the_subclass_is_left():
    """The next graph that is compiled is rewritten again."""
    q, k, v = qkv()

    def fn(q, k, v):
        first = attend_to_scaled_keys(q, k, v)
        torch._dynamo.graph_break()
        return attend(plain(first), v, v)

    with torch.no_grad(), fi_ops.enabled(), recording() as reports, without_caches():
        got = torch.compile(fn)(q, k.as_subclass(Quiet), v)
    grades = [site.grade for report in reports for site in report.sites]
    assert grades == ["", "attention"], reports
    torch.testing.assert_close(got, fn(q, k, v))


def test_explain_names_the_subclass(capsys):
    q, k, v = qkv()
    with torch.no_grad():
        result = fi_ops.explain(attend_to_scaled_keys, q, k.as_subclass(Tagged), v)
    assert result.count("attention") == 1 and result.count("attention", fused=True) == 0
    assert "Tagged, a subclass of Tensor" in str(result)


# ---- not meant ----


@pytest.mark.parametrize("kind", [nn.Parameter, nn.Buffer, Weight])
def test_parameters_and_buffers(kind):
    """Subclasses in name only."""
    q, k, v = qkv()
    with torch.no_grad(), fi_ops.enabled(), recording() as reports, without_caches():
        got = torch.compile(attend)(q, kind(k), kind(v))
    assert [site.grade for report in reports for site in report.sites] == ["attention"]
    assert_within_budget(got, attend(*(t.double() for t in (q, k, v))), attend(q, k, v))


def test_wrapper_subclass():
    """Taken apart below the hook that pins SDPA: both of the tensors inside get the right answer."""
    a, b = qkv(), tuple(t + 1 for t in qkv())
    with torch.no_grad(), fi_ops.enabled():
        got = torch.compile(attend)(*(TwoTensor(x, y) for x, y in zip(a, b, strict=True)))
    assert isinstance(got, TwoTensor)
    for mine, arguments in ((got.a, a), (got.b, b)):
        assert_within_budget(mine, attend(*(t.double() for t in arguments)), attend(*arguments))


def test_wrapped_eager_attention_is_rewritten():
    """Once for each of the tensors inside. (Inductor keeps the strides of the first alone, and these tensors want equal ones.)"""

    def fn(q, k, v):
        return eager(q, k, v).flatten()

    a, b = qkv(), tuple(t + 1 for t in qkv())
    with torch.no_grad(), fi_ops.enabled(), recording() as reports, without_caches():
        got = torch.compile(fn)(*(TwoTensor(x, y) for x, y in zip(a, b, strict=True)))
    assert [site.grade for report in reports for site in report.sites] == ["attention"] * 2
    for mine, arguments in ((got.a, a), (got.b, b)):
        assert_within_budget(mine, fn(*(t.double() for t in arguments)), fn(*arguments))


@contextlib.contextmanager
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
def test_dtensor():
    """Eager attention: torch has no rule for SDPA on the CPU, and SDPA whose result is a wrapper is not pinned."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    q, k, v = qkv()
    with one_process() as mesh, torch.no_grad(), fi_ops.enabled(), without_caches():
        arguments = (distribute_tensor(t, mesh, [Replicate()]) for t in (q, k, v))
        got = torch.compile(eager)(*arguments).to_local()
    assert_within_budget(got, eager(*(t.double() for t in (q, k, v))), eager(q, k, v))


def test_masked_tensor_is_as_in_eager():
    """torch's own subclass of both kinds, which no compiled graph gets."""
    from torch.masked import masked_tensor

    q, k, v = qkv()

    def scaled(q, k, v):
        return k * 2, attend(q, v, v)

    with torch.no_grad(), fi_ops.enabled(), pytest.warns(UserWarning):
        masked = masked_tensor(k, k > 0)
        got, attended = torch.compile(scaled)(q, masked, v)
        expected = masked * 2
    assert type(got) is type(expected)
    torch.testing.assert_close(got.get_data(), expected.get_data())
    torch.testing.assert_close(attended, attend(q, v, v))
