"""Linear layers of few rows: which become `fi.linear`, and which stay, node for node, what stock torch compiles."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from inductor_capture import DEVICES, capture, graph_text

import fi_ops
from fi_ops.inductor.fuse import linear as linear_fusion
from fi_ops.inductor.fuse.linear import LEAST_BYTES, MAX_ROWS
from fi_ops.testing import assert_within_budget

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from gpt_fast_model import ModelArgs, Transformer

IN = 1024


def least_rows(device: str, dtype: torch.dtype = torch.bfloat16) -> int:
    """Rows of the smallest weight that is worth it."""
    return LEAST_BYTES[device] // dtype.itemsize // IN


OUT = max(map(least_rows, LEAST_BYTES))


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch):
    """What is rewritten where it was measured to be faster is right on every CPU."""
    monkeypatch.setattr(linear_fusion, "is_measured_cpu", lambda: True)


def tensors(*shapes, dtype=torch.bfloat16, device="cpu"):
    return tuple((torch.randn(*s) * s[-1] ** -0.5).to(device, dtype) for s in shapes)


def linear_of(rows: int, out: int = OUT, bias: bool = False, dtype=torch.bfloat16, device: str = "cpu") -> tuple:
    """Arguments of `F.linear`."""
    return tensors((rows, IN), (out, IN), *[(out,)] * bias, dtype=dtype, device=device)


def rewritten(result) -> int:
    return result.targets().count("fi.linear.default")


def check(fn, inputs: tuple, count: int, **options):
    """`count` layers are rewritten, and the answer is inside the budget."""
    result = capture(fn, *inputs, **options)
    assert rewritten(result) == count, result.sites
    assert [s.grade for s in result.sites if s.kind == "linear"] == ["linear"] * count
    with torch.no_grad():
        assert_within_budget(result.output, fn(*(t.double() for t in inputs)), fn(*inputs), "linear")
    return result


def check_left_alone(fn, *inputs, reason: str = "", **options):
    """The graph is stock's and so is the answer, bit for bit; with a `reason` there is a site that gives it."""
    stock, ours = (capture(fn, *inputs, rewritten=r, **options) for r in (False, True))
    assert rewritten(ours) == 0
    assert [graph_text(g) for g in ours.graphs] == [graph_text(g) for g in stock.graphs]
    assert torch.equal(ours.output, stock.output)
    reasons = [s.reason for s in ours.sites if s.kind == "linear"]
    assert len(reasons) == bool(reason) and all(reason in r for r in reasons), reasons
    return ours


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("device", DEVICES)
def test_rows(device, dtype, bias):
    for rows in (1, 2, MAX_ROWS):
        check(F.linear, linear_of(rows, bias=bias, dtype=dtype, device=device), 1)


def test_float32_on_the_cpu():
    check(F.linear, linear_of(2, out=least_rows("cpu", torch.float32), dtype=torch.float32), 1)


@pytest.mark.parametrize("shape", [(IN,), (1, 1, IN), (2, 3, IN)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("device", DEVICES)
def test_module(device, bias, shape):
    """nn.Linear, whose weights are parameters, on inputs of any rank; odd sizes."""
    layer = torch.nn.Linear(IN, OUT + 3, bias=bias, dtype=torch.bfloat16, device=device)
    (x,) = tensors(shape, device=device)
    result = capture(layer, x)
    assert rewritten(result) == 1
    with torch.no_grad():
        expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        assert_within_budget(result.output, expected, layer(x), "nn.Linear")


@pytest.mark.parametrize("device", DEVICES)
def test_strided_rows(device):
    """Rows of a fused weight, every other row of the input: read as they lie."""
    (x, weight) = tensors((8, IN), (3 * OUT, IN), device=device)
    check(F.linear, (x[::2], weight[OUT : 2 * OUT]), 1)


@pytest.mark.parametrize("device", DEVICES)
def test_one_row_is_known_under_dynamic_shapes(device):
    """torch specialises a size of 1, so a decode step of one sequence has no symbolic rows."""
    x, weight = linear_of(1, device=device)
    torch._dynamo.mark_static(weight)
    check(F.linear, (x, weight), 1, dynamic=True)


@pytest.mark.parametrize("device", DEVICES)
def test_gpt_fast(device):
    """Every layer's five products and the last one; attention is rewritten as it is without."""
    dim = 1024 if device == "cpu" else 2048
    args = ModelArgs(
        block_size=32, vocab_size=dim, n_layer=2, n_head=16, n_kv_head=4, dim=dim, head_dim=dim // 16,
        intermediate_size=dim + 512,
    )  # fmt: skip
    with torch.device(device):
        model = Transformer(args).to(torch.bfloat16).eval()
        inputs = torch.tensor([[3], [5]]), torch.tensor([7])
    model.setup_caches(2, 32)
    for layer in model.layers:
        for cache in (layer.attention.kv_cache.k_cache, layer.attention.kv_cache.v_cache):
            cache.normal_()
    result = capture(model, *inputs)
    assert rewritten(result) == 2 * 5 + 1
    assert result.grades() == ["rope + append + attention"] * 2
    with torch.no_grad():
        same = model(*inputs)
        assert_within_budget(result.output, model.double()(*inputs), same, "gpt-fast")


# ------------------------------------------------------------------------------------------------ near misses


@pytest.mark.parametrize("device", DEVICES)
def test_too_many_rows(device):
    check_left_alone(F.linear, *linear_of(MAX_ROWS + 1, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_symbolic_rows(device):
    inputs = linear_of(3, device=device)
    for tensor in inputs[1:]:
        torch._dynamo.mark_static(tensor)
    check_left_alone(F.linear, *inputs, dynamic=True)


@pytest.mark.parametrize("device", DEVICES)
def test_small_weight(device):
    check_left_alone(F.linear, *linear_of(1, out=least_rows(device) - 1, device=device))


def test_other_dtypes():
    check_left_alone(F.linear, *linear_of(1, dtype=torch.float64))


@pytest.mark.gpu
def test_float32_on_cuda():
    check_left_alone(F.linear, *linear_of(1, dtype=torch.float32, device="cuda"))


@pytest.mark.gpu
def test_unaligned_rows_on_cuda():
    """The kernel for such rows is right, and was not measured."""
    x, weight = tensors((2, IN + 4), (OUT, IN + 4), device="cuda")
    check_left_alone(F.linear, x, weight, reason="16-byte boundaries")


def test_small_float32():
    check_left_alone(F.linear, *linear_of(1, out=least_rows("cpu", torch.float32) - 1, dtype=torch.float32))


def test_cpu_that_was_not_measured(monkeypatch):
    monkeypatch.setattr(linear_fusion, "is_measured_cpu", lambda: False)
    check_left_alone(F.linear, *linear_of(1), reason="measured to be faster than stock torch only on")


@pytest.mark.parametrize("device", DEVICES)
def test_weight_laid_out_by_input(device):
    """`[in_features, out_features]`: a product, and no linear layer."""
    check_left_alone(torch.mm, *tensors((2, IN), (IN, OUT), device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_computed_weight(device):
    check_left_alone(lambda x, w: F.linear(x, w * 2), *linear_of(2, device=device), reason="computed in the graph")


@pytest.mark.parametrize("device", DEVICES)
def test_weight_without_contiguous_rows(device):
    (x, weight) = tensors((2, IN), (IN, OUT), device=device)
    check_left_alone(F.linear, x, weight.t(), reason="weight has no contiguous last dimension")


@pytest.mark.parametrize("device", DEVICES)
def test_input_without_contiguous_rows(device):
    (x, weight) = tensors((IN, 2), (OUT, IN), device=device)
    check_left_alone(F.linear, x.t(), weight, reason="input has no contiguous last dimension")


@pytest.mark.parametrize("device", DEVICES)
def test_written_weight(device):
    def step(x, weight):
        y = F.linear(x, weight)
        weight.mul_(0.5)
        return y

    x, weight = linear_of(2, device=device)
    stock, ours = (capture(step, x, weight.clone(), rewritten=r) for r in (False, True))
    assert rewritten(ours) == 0 and graph_text(ours.graphs[0]) == graph_text(stock.graphs[0])
    assert torch.equal(ours.output, stock.output)
    (reason,) = (s.reason for s in ours.sites)
    assert "writes to the weight" in reason


@pytest.mark.parametrize("device", DEVICES)
def test_residual_that_is_no_bias(device):
    """addmm whose first argument has a value for every row."""
    (x, weight, residual) = tensors((2, IN), (OUT, IN), (2, OUT), device=device)
    check_left_alone(lambda x, w, r: torch.addmm(r, x, w.t()), x, weight, residual)
    check_left_alone(lambda x, w, r: torch.addmm(r[0], x, w.t(), alpha=2), x, weight, residual)


@pytest.mark.parametrize("device", DEVICES)
def test_graph_with_gradients(device):
    (x, weight) = linear_of(2, device=device)
    result = capture(lambda x, w: F.linear(x, w).sum(), x, weight.requires_grad_(), grad=True)
    assert rewritten(result) == 0 and not result.sites


@pytest.mark.parametrize("option", ["max_autotune", "max_autotune_gemm", "freezing"])
def test_stock_is_asked_to_choose(option):
    with torch._inductor.config.patch({option: True}):
        check_left_alone(F.linear, *linear_of(1), reason=f"config.{option}")


# ------------------------------------------------------------------------------------------------ what is said about it


def test_explain(capsys):
    """Layers of one line and size are one row of the table, with their number."""
    layers = torch.nn.ModuleList(torch.nn.Linear(IN, IN, bias=False, dtype=torch.bfloat16) for _ in range(3))

    def chain(x):
        for layer in layers:
            x = layer(x)
        return x

    with torch.no_grad():
        found = fi_ops.explain(chain, *tensors((2, IN)))
    text = capsys.readouterr().out
    assert found.count("linear", fused=True) == 3
    assert f"2 x {IN} to {IN} (3 times)" in text and "linear: 3 of 3 rewritten" in text


def test_required_count(monkeypatch):
    monkeypatch.setenv("FI_OPS_REQUIRE", "linear:1")
    check(F.linear, linear_of(1), 1)
    monkeypatch.setenv("FI_OPS_REQUIRE", "linear:2")
    with pytest.raises(Exception, match="asks for 2 linear rewrites"):
        capture(F.linear, *linear_of(1))


def test_compiled():
    """Through code generation, by plain `torch.compile`."""
    inputs = linear_of(4, bias=True)
    torch._dynamo.reset()
    with torch.no_grad(), fi_ops.enabled():
        output = torch.compile(F.linear, dynamic=False)(*inputs)
    assert_within_budget(output, F.linear(*(t.double() for t in inputs)), F.linear(*inputs), "compiled")
