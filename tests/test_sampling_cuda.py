"""The sampling family's CUDA kernels against the CPU's, and what only a GPU can show: batches, graphs."""

from __future__ import annotations

import pytest
import torch
from test_sampling_family import calls as family_calls

import fi_ops

OPS = torch.ops.fi


def calls(rows: int, vocab: int, device: str = "cpu") -> dict:
    """Every op of the family, and the ways of the kernels that those arguments don't take."""
    generator = torch.Generator().manual_seed(8)
    logits, u = (
        torch.randn(rows, vocab, generator=generator).to(device) * 3,
        torch.rand(rows, generator=generator).to(device),
    )
    sample = OPS.top_k_top_p_sampling_from_logits
    return {
        **family_calls(rows, vocab, device),
        "logits, top-p": lambda r: sample(logits[r], u[r], top_p=0.95),
        "logits, top-p, min-p": lambda r: sample(logits[r], u[r], top_p=0.95, min_p=0.01),
        "logits, top-p, bf16": lambda r: sample(logits[r].bfloat16(), u[r], top_p=0.9),
        "logits, top-k 50, top-p, min-p": lambda r: sample(logits[r], u[r], top_k=50, top_p=0.9, min_p=0.02),
        "top_k 50": lambda r: OPS.top_k(logits[r], 50),
        "top_k 50, by id": lambda r: OPS.top_k(logits[r], 50, sorted=False),
        "mask 50": lambda r: OPS.top_k_mask_logits(logits[r], top_k=50),
        "softmax, top-p": lambda r: OPS.top_k_top_p_softmax(logits[r], top_p=0.9),
    }


@pytest.mark.parametrize("name", calls(1, 2))
def test_launch_shapes(name, monkeypatch, pytestconfig):
    """Bit for bit, however many blocks a row has and whatever they keep of it: emulated GPUs of several sizes."""
    if not pytestconfig.getoption("--emulate-cuda"):
        pytest.skip("for emulated kernels: how a GPU's rows are spread over it, it decides itself")
    call, results = calls(3, 20_011)[name], []
    for multiprocessors in (1, 2, 132):
        monkeypatch.setenv("FI_EMULATION_SMS", str(multiprocessors))
        results.append(outputs(call(torch.arange(3))))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def outputs(result) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 40}, {"top_k": 5000, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.01}], ids=str
)
@pytest.mark.parametrize("spread", [0.05, 3.0])
def test_the_cpus_tokens(options, spread):
    """The same uniforms draw the same tokens but where rounding moves a boundary across one: its chance is at most the
    tokens' number times the rounding of their probabilities (2^-22, at 32,000 tokens below 1e-2; seen on an H100: within it)."""
    logits = torch.randn(4, 32_000, generator=torch.Generator().manual_seed(3)) * spread
    rows = torch.arange(4096) % 4
    uniform = fi_ops.philox_uniform(5, 0, 4096)
    probs = logits.softmax(-1)
    for op, x in ((OPS.top_k_top_p_sampling_from_logits, logits), (OPS.top_k_top_p_sampling_from_probs, probs)):
        mine, valid = op(x.cuda(), uniform.cuda(), indices=rows.cuda(), **options)
        theirs, _ = op(x, uniform, indices=rows, **options)
        assert valid.all()
        assert (mine.cpu() != theirs).sum() <= 41


@pytest.mark.gpu
@pytest.mark.parametrize("name", calls(1, 2))
@pytest.mark.parametrize(("vocab", "batch"), [(70_001, 60), (400_003, 60), (128_256, 140)])
def test_a_row_depends_on_itself_alone(name, vocab, batch):
    """Bit for bit, whatever the batch: one row has other blocks than one of many, and short rows are kept on chip."""
    call = calls(batch, vocab, "cuda")[name]
    expected = outputs(call(torch.arange(batch, device="cuda")))
    for rows in ([17], [3, 58], list(range(20, 40)), list(range(50))):
        for actual, whole in zip(outputs(call(torch.tensor(rows, device="cuda"))), expected, strict=True):
            assert torch.equal(actual, whole[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("name", calls(1, 2))
def test_graph_capture(name):
    """No call waits for the device or keeps anything: replays give what calls give."""
    call, rows = calls(3, 30_001, "cuda")[name], torch.arange(3, device="cuda")
    expected = outputs(call(rows))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(call(rows))
    for _ in range(3):
        for t in captured:
            t.fill_(1)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_large_k_in_order():
    x = torch.randint(-50, 50, (2, 128_256), device="cuda").bfloat16()
    for k in (2048, 2049, 50_000, 128_256):
        values, indices = OPS.top_k(x, k)
        expected = torch.sort(x, dim=-1, descending=True, stable=True)
        assert torch.equal(values, expected.values[:, :k]) and torch.equal(indices, expected.indices[:, :k])
