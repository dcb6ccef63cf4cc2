"""What only a GPU can show of the sampling family: how rows are spread over blocks, captured graphs."""

from __future__ import annotations

import pytest
import torch
from sampling_statistics import assert_distributed, row_of
from test_sampling_family import calls as family_calls

import fi_ops
from fi_ops.library._sampling import kept_probs

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


def captured(call) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"min_p": 0.01, "temperature": 1.5}], ids=str)
def test_replays_draw_new_and_right_tokens(options):
    """Fifty replays of 20,000 draws, numbers from torch's generator: no two alike, all together distributed as they must be
    (false-alarm rate 1e-6 each); then from other logits, in the same place."""
    row = row_of("heavy-tailed").cuda()
    rows = torch.zeros(20_000, dtype=torch.int32, device="cuda")
    graph, out = captured(lambda: fi_ops.top_k_top_p_sampling_from_logits(row, 50, 0.9, rows, **options))
    for logits in (row.clone(), row.flip(1)):
        row.copy_(logits)
        replays = []
        for _ in range(50):
            graph.replay()
            replays.append(out.clone())
        tokens = torch.stack(replays).cpu()
        assert (tokens[1:] != tokens[:-1]).any(1).all() and len(tokens.unique(dim=0)) == 50
        probs = kept_probs(logits.cpu(), 50, 0.9, **options)[0]
        assert_distributed(tokens.flatten().long(), probs)


@pytest.mark.gpu
@pytest.mark.parametrize("per_row", [False, True])
def test_replays_follow_seed_and_offset(per_row):
    """A graph that counts its offset up draws what calls with those offsets draw, on either device."""
    logits = torch.randn(300, 5000, generator=torch.Generator().manual_seed(5)) * 2
    seed = torch.arange(300) if per_row else torch.tensor([12])
    x, seeds, offset = logits.cuda(), seed.cuda(), torch.zeros(1, dtype=torch.int64, device="cuda")

    def step():
        tokens = fi_ops.top_k_top_p_sampling_from_logits(x, 0, 0.9, seed=seeds, offset=offset)
        offset.add_(1)
        return tokens

    graph, out = captured(step)
    for at in (0, 1, 2, 2**40):
        offset.fill_(at)
        graph.replay()
        expected = fi_ops.top_k_top_p_sampling_from_logits(x, 0, 0.9, seed=seeds, offset=at)
        assert torch.equal(out, expected) and offset.item() == at + 1
        on_cpu = fi_ops.top_k_top_p_sampling_from_logits(logits, 0, 0.9, seed=seed, offset=at)
        assert (out.cpu() != on_cpu).sum() <= 3  # test_sampling_devices.py says how rarely they differ


@pytest.mark.gpu
def test_large_k_in_order():
    x = torch.randint(-50, 50, (2, 128_256), device="cuda").bfloat16()
    for k in (2048, 2049, 50_000, 128_256):
        values, indices = OPS.top_k(x, k)
        expected = torch.sort(x, dim=-1, descending=True, stable=True)
        assert torch.equal(values, expected.values[:, :k]) and torch.equal(indices, expected.indices[:, :k])
