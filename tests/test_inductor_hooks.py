"""enable, disable, explain, the "fi" backend, caches: everything around the rewrites."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from inductor_capture import Capture, capture, compiled_for_capture
from snippets import FULL
from snippets import cache as cache_snippets
from snippets import meta as llama
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache, run_and_get_code

import fi_ops
from fi_ops.inductor import manager, sites

SLOTS = ("pre_grad_custom_pass", "joint_custom_pre_pass", "post_grad_custom_post_pass")


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    with fresh_cache():
        yield
    fi_ops.disable()
    torch._dynamo.reset()


def settings():
    names = [*SLOTS, "joint_custom_post_pass", "post_grad_custom_pre_pass", "pre_grad_pass_timing"]
    return {name: getattr(inductor_config, name, None) for name in names}


def qkv():
    return torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16), torch.randn(1, 2, 6, 16)


class Users(CustomGraphPass):
    """A pass of the user's own."""

    def __init__(self, name="users pass"):
        self.name, self.calls = name, 0

    def __call__(self, graph):
        self.calls += 1

    def uuid(self):
        return self.name


# ---- enable and disable ----


def test_disable_puts_everything_back():
    before = settings()
    fi_ops.enable()
    fi_ops.enable()  # a second call changes nothing
    assert manager.is_enabled() and settings() != before
    fi_ops.disable()
    fi_ops.disable()
    assert not manager.is_enabled() and settings() == before


def test_enabled_is_scoped_and_nests():
    before = settings()
    with fi_ops.enabled():
        inside = settings()
        with fi_ops.enabled():
            assert manager.is_enabled()
        assert settings() == inside
        with fi_ops.enabled(False):
            assert settings() == before
        assert manager.is_enabled()
    assert settings() == before
    with pytest.raises(KeyError), fi_ops.enabled():
        raise KeyError
    assert settings() == before


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("slot", SLOTS)
def test_passes_of_the_user_run_and_come_back(slot, as_list):
    if as_list and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 takes one pass a slot")
    users = Users()
    held = [users] if as_list else users
    with inductor_config.patch({slot: held}):
        fi_ops.enable()
        with torch.no_grad():
            torch.compile(F.scaled_dot_product_attention)(*qkv())
        fi_ops.disable()
        assert users.calls >= 1
        assert getattr(inductor_config, slot) is held


def test_a_list_changed_after_enable_keeps_what_was_added():
    if torch.__version__ < "2.13":
        pytest.skip("torch 2.11 takes one pass a slot")
    before, after = Users("before"), Users("after")
    with inductor_config.patch(joint_custom_pre_pass=before):
        fi_ops.enable()
        inductor_config.joint_custom_pre_pass = [inductor_config.joint_custom_pre_pass, after]
        fi_ops.disable()
        assert inductor_config.joint_custom_pre_pass == [before, after]


def test_uuid_covers_options_and_other_passes(monkeypatch):
    def uuid(before=None):
        return manager.ChainedPass("slot", lambda graph: None, before).uuid()

    plain = uuid()
    assert plain == uuid() and "fi_ops" in plain
    assert uuid(Users("a")) != uuid(Users("b")) != plain
    assert uuid(lambda graph: None) is None, "a pass without uuid keeps Inductor from caching, as without us"
    monkeypatch.setenv("FI_OPS_REQUIRE", "attention:1")
    assert uuid() != plain


# ---- what users see ----


def test_counters():
    counters["fi_ops"].clear()
    with fi_ops.enabled(), torch.no_grad():
        torch.compile(F.scaled_dot_product_attention, backend="inductor")(*qkv())
    assert counters["fi_ops"]["attention"] == counters["fi_ops"]["attention_candidates"] == 1
    assert counters["fi_ops"]["attention: attention"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(mode="reduce-overhead"),
        dict(options={"max_autotune": False}),
        dict(mode="default", options={"max-autotune": False}),
    ],
    ids=["plain", "mode", "options", "both"],
)
def test_backend_takes_mode_and_options(arguments):
    """By its name it comes from an entry point; torch.compile hands it `mode` and `options` like this."""
    from fi_ops.inductor.backend import fi

    before = settings()
    q, k, v = qkv()
    counters["fi_ops"].clear()
    with torch.no_grad():
        if len(arguments) < 2:
            compiled = torch.compile(F.scaled_dot_product_attention, backend=fi, **arguments)
        else:  # torch.compile itself takes only one of the two
            compiled = torch.compile(F.scaled_dot_product_attention, backend=functools.partial(fi, **arguments))
        torch.testing.assert_close(compiled(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert counters["fi_ops"]["attention"] == 1
    assert settings() == before


def test_backend_by_its_name():
    """`torch.compile(model, backend="fi")`, by the entry point that installing the package registers."""
    names = [e.value for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "fi"]
    if not names:
        pytest.skip("the package is on the path but not installed")
    assert names[0] == "fi_ops.inductor.backend:fi"
    q, k, v = qkv()
    counters["fi_ops"].clear()
    with torch.no_grad():
        compiled = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend="fi", fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), F.scaled_dot_product_attention(q, k, v))
    assert counters["fi_ops"]["attention"] == 1


def test_require_makes_a_shortfall_an_error(monkeypatch):
    q, k, v = qkv()
    monkeypatch.setenv("FI_OPS_REQUIRE", "attention:1")
    assert capture(F.scaled_dot_product_attention, q, k, v).grades() == ["attention"]
    with pytest.raises(Exception, match=r"asks for 1 attention rewrites in a graph, got 0 of 1 sites.*float64"):
        capture(F.scaled_dot_product_attention, q.double(), k.double(), v.double())
    monkeypatch.setenv("FI_OPS_REQUIRE", "attention=1")
    with pytest.raises(Exception, match="FI_OPS_REQUIRE must be kind:count"):
        capture(F.scaled_dot_product_attention, q, k, v)


def test_warns_once_where_nothing_is_fused(monkeypatch):
    monkeypatch.setattr(sites, "_warned", set())
    report = sites.GraphReport([sites.Site("attention", "n", "model.py:3", reason="n: scale per head")])
    with pytest.warns(
        UserWarning, match=r"1 attention sites found, 0 rewritten \(first: model.py:3: n: scale per head\)"
    ):
        sites.publish(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sites.publish(report)


def test_says_once_that_earlier_compiles_stay(monkeypatch):
    monkeypatch.setattr(sites, "_warned", set())
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    with pytest.warns(UserWarning, match="compiled before this call stay as they are"):
        fi_ops.enable()
    fi_ops.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fi_ops.enable()


def test_an_error_in_a_rewrite_leaves_the_site_alone(monkeypatch):
    from fi_ops.inductor import rewrite

    def broken(*_):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(rewrite, "plan_attention", broken)
    q, k, v = qkv()
    result = capture(F.scaled_dot_product_attention, q, k, v)
    assert result.grades() == [""] and "internal error: on purpose" in result.reasons()[0]
    torch.testing.assert_close(result.output, F.scaled_dot_product_attention(q, k, v))


# ---- explain ----


class Step(torch.nn.Module):
    """One decode step over a cache in module buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(1, 2, 12, 16))
        self.register_buffer("v_cache", torch.zeros(1, 2, 12, 16))

    def forward(self, q, k, v, positions, mask):
        return cache_snippets.index_put(q, k, v, self.k_cache, self.v_cache, positions, mask)


def step_inputs():
    q, k, v, _, _, positions, mask = cache_snippets.step(1, batch=1)
    return q, k, v, positions, mask


def test_explain_tells_what_became_of_each_site(capsys):
    q, k, v, kc, vc, positions, mask = cache_snippets.step()
    before = kc.clone()
    with torch.no_grad():
        found = fi_ops.explain(cache_snippets.huggingface, q, k, v, kc, vc, positions, mask)
    text = capsys.readouterr().out
    assert found.count("attention", fused=True) == found.count("rope", fused=True) == 1
    assert FULL in text and "snippets/cache.py:" in text and "attention: 1 of 1 rewritten" in text
    assert "2 written tensors are arguments" in text and "mark_static_address" in text
    assert torch.equal(kc, before), "the caller's cache is not written to"


def test_explain_names_the_failed_check():
    q, k, v, kc, vc, positions, mask = cache_snippets.step()
    with torch.no_grad():
        found = fi_ops.explain(cache_snippets.cache_read_before_the_write, q, k, v, kc, vc, positions, mask)
    assert found.sites[0].grade == "attention" and "as it was before the write" in found.sites[0].reason


def test_explain_on_buffers_and_on_a_compiled_module():
    model = Step()
    compiled = torch.compile(model)
    with torch.no_grad():
        for _ in range(2):
            found = fi_ops.explain(compiled, *step_inputs())
            assert found.sites[0].grade == "append + attention"
    assert not any("arguments of the compiled graph" in note for note in found.notes)
    assert model.k_cache.abs().max() == 0, "module buffers are not written to"
    assert not manager.is_enabled()


def test_explain_says_when_gradients_are_in_the_way():
    q, k, v = (t.requires_grad_() for t in qkv())
    found = fi_ops.explain(F.scaled_dot_product_attention, q, k, v)
    assert "needs gradients" in found.sites[0].reason and found.count("attention", fused=True) == 0


# ---- generated code and compiles ----


def test_generated_code_copies_no_cache():
    """Re-inplacing leaves the mutating op alone with the caches: no clone of one, no copy back."""
    model, inputs = Step(), step_inputs()
    reference = Step()(*inputs)
    with torch.no_grad(), fi_ops.enabled():
        result, (code, *_) = run_and_get_code(torch.compile(model, fullgraph=True), *inputs)
    torch.testing.assert_close(result, reference)
    assert code.count("torch.ops.fi.append_attention.default(") == 1
    body = code[code.index("torch.ops.fi.append_attention") :]
    assert "empty_strided_cpu((1, 2, 12, 16)" not in code and "copy_" not in body.split("def get_args")[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_generated_code_copies_no_cache_of_which_it_sees_a_part(dynamic):
    torch._dynamo.reset()
    inputs = llama.decode()
    for tensor in inputs[:5]:
        torch._dynamo.mark_static(tensor, 3)
    expected = copy.deepcopy(inputs)
    with torch.no_grad(), fi_ops.enabled():
        result, (code, *_) = run_and_get_code(torch.compile(llama.llama_with_sdpa, dynamic=dynamic), *inputs)
        reference = llama.llama_with_sdpa(*expected)
    torch.testing.assert_close(result, reference)
    torch.testing.assert_close(inputs[3:5], expected[3:5])
    assert code.count("torch.ops.fi.rope_append_attention.default(") == 1
    assert "copy_" not in code[code.index("torch.ops.fi") :].split("def get_args")[0]


@pytest.mark.parametrize("dynamic", [None, True])
def test_no_compile_that_stock_does_not_have(dynamic):
    """Growing lengths: as many graphs with the rewrites as without."""
    graphs = {}
    for rewritten in (False, True):
        torch._dynamo.reset()
        result = Capture()
        compiled = compiled_for_capture(cache_snippets.concatenated, result, rewritten=rewritten, dynamic=dynamic)
        with torch.no_grad():
            q, k, v, kc, vc, positions, mask = cache_snippets.step(4)
            for _ in range(5):
                _, kc, vc = compiled(q, k, v, kc, vc, positions, mask)
        graphs[rewritten] = len(result.graphs)
    assert graphs[True] == graphs[False]


SCRIPT = """
    import json, sys, torch, fi_ops
    sys.path.insert(0, sys.argv[1])
    from torch._dynamo.utils import counters
    from torch.profiler import profile
    from test_inductor_hooks import Step, step_inputs
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if sys.argv[2] == "on":
        fi_ops.enable()
    model, inputs = Step(), step_inputs()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        compiled(*inputs)
        with profile() as events:
            result = compiled(*inputs)
        expected = Step()(*inputs)
    print(json.dumps(dict(
        right=torch.allclose(result, expected, atol=1e-5),
        ours=sum(e.name == "fi::append_attention" for e in events.events()),
        fx_hit=counters["inductor"]["fxgraph_cache_hit"], fx_bypass=counters["inductor"]["fxgraph_cache_bypass"],
        aot_hit=counters["aot_autograd"]["autograd_cache_hit"],
        aot_bypass=counters["aot_autograd"]["autograd_cache_bypass"],
        sites=counters["fi_ops"]["attention"],
    )))
"""


def test_caches_hit_warm_and_are_not_shared_with_stock(tmp_path):
    """Three processes, one cache folder: cold, warm, and stock torch, which must not get our code."""
    here = os.path.dirname(__file__)
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.path.dirname(here)}

    def run(switch, **extra):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), here, switch]
        done = subprocess.run(command, env={**env, **extra}, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    cold, warm, stock = run("on"), run("on"), run("off")
    assert all(r["right"] and not r["fx_bypass"] and not r["aot_bypass"] for r in (cold, warm, stock))
    assert cold["sites"] == 1 and cold["aot_hit"] == 0 and cold["ours"] == 1
    assert warm["sites"] == 0 and warm["aot_hit"] == 1 and warm["ours"] == 1
    assert stock["aot_hit"] == 0 and stock["fx_hit"] == 0 and stock["ours"] == 0
