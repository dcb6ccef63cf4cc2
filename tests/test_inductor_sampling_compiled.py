"""Rewritten samplers in generated code, at the size of a real vocabulary, on both devices; over CUDA graphs on CUDA."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch._inductor.config as inductor_config
from inductor_capture import DEVICES, without_caches
from sampler_oracle import check_draws, stock_probabilities
from snippets import gumbel, samplers, vllm
from torch._dynamo.utils import counters

import fi_ops
from fi_ops.inductor.sites import recording

B, V = 16, 128_256
CALLS = 200


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    counters.clear()
    with without_caches(), torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.fixture
def one_row():
    """Logits with some dozen tokens in the first nine tenths of the mass, and one of each group of 8 equal ones ahead."""
    generator = torch.Generator().manual_seed(3)
    row = torch.randn(1, V, generator=generator)
    row[:, :: V // 40] += torch.linspace(9, 14, row[:, :: V // 40].shape[1])
    return row


def numbers(device):
    """Of each row temperature, k, p, m: vLLM's requests."""
    k = torch.tensor([V, 50, 7, 1]).repeat(B // 4)
    values = ([0.8, 1.2, 1.0, 0.5], [0.9, 0.95, 1.0, 0.5], [0.0, 0.02, 0.1, 0.0])
    t, p, m = (torch.tensor(v).repeat(B // 4) for v in values)
    return [n.to(device) for n in (t, k, p, m)]


def huggingface_top_p(x):
    """Stock torch 2.11 fails to compile this on CUDA at [16, 128256]."""
    return torch.multinomial(torch.softmax(samplers.top_p_mask(x / 0.9, 0.9), -1), 1)


def huggingface_all(x):
    return samplers.multinomial(samplers.min_p_mask(samplers.top_p_mask(samplers.top_k_mask(x / 0.8, 200), 0.95), 0.02))


def gpt_fast_with_probabilities(x):
    probs = torch.softmax(samplers.top_k_mask(x / 0.8, 200), -1)
    return samplers.exponential_trick(probs), probs


def vllm_everything(x, t, k, p, m):
    return vllm.sample(vllm.apply_top_k_top_p(vllm.apply_min_p(vllm.apply_temperature(x, t), m), k, p))


@contextlib.contextmanager
def rewritten(grade: str):
    with fi_ops.enabled(), recording() as reports:
        yield
    assert [site.grade for report in reports for site in report.sites] == [grade], reports


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("fn", "grade"),
    [
        (huggingface_top_p, samplers.SAMPLER),
        (huggingface_all, samplers.SAMPLER),
        (samplers.meta, samplers.SAMPLER),
        (samplers.nano_gpt, samplers.SAMPLER),
        (gpt_fast_with_probabilities, samplers.SOFTMAX_AND_DRAW),
        (samplers.plain_probabilities_returned, samplers.FROM_PROBS),
        (gumbel.categorical_filtered, samplers.SAMPLER),
    ],
)
def test_a_real_vocabulary(fn, grade, device, one_row):
    """[16, 128256]: chi-square of 3,200 draws of one distribution (a right sampler fails one seed in a million)."""
    x = one_row.expand(B, -1).contiguous().to(device)
    expected = stock_probabilities(fn, one_row)[0]
    if fn is samplers.meta:
        ids = one_row[0].argsort(descending=True)
        expected = torch.zeros(V, dtype=torch.float64).scatter(0, ids, expected)
    torch.manual_seed(4)
    with rewritten(grade):
        compiled = torch.compile(fn, fullgraph=True)
        outputs = [compiled(x) for _ in range(CALLS)]
    tokens = [o[0] if isinstance(o, tuple) else o for o in outputs]
    check_draws(torch.stack(tokens), expected)
    if isinstance(outputs[0], tuple):
        torch.testing.assert_close(outputs[0][1][0].double().cpu(), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numbers_of_each_row(dtype, device, one_row):
    """vLLM's sampler; other numbers in the second half of the calls, without a second compile."""
    x = one_row.to(dtype).float().expand(B, -1).contiguous()
    with rewritten(samplers.SAMPLER):
        compiled = torch.compile(lambda x, *n: vllm_everything(x.float(), *n), fullgraph=True)
        for turn in range(2):
            given = [n.roll(turn) for n in numbers("cpu")]
            expected = stock_probabilities(vllm_everything, x[:4], *(n[:4] for n in given))
            on_device = [x.to(dtype).to(device), *(n.to(device) for n in given)]
            tokens = torch.stack([compiled(*on_device) for _ in range(CALLS)])
            for row in range(4):
                check_draws(tokens[:, row::4], expected[row])


def same_code(x, top_k: int):
    return vllm.sample(samplers.top_k_mask(x / 0.8, top_k))


@pytest.mark.parametrize("device", DEVICES)
def test_symbolic_batch(device, one_row):
    with rewritten(samplers.SAMPLER):
        compiled = torch.compile(same_code, fullgraph=True, dynamic=True)
        for rows in (3, 16, 5):
            x = one_row.expand(rows, -1).contiguous().to(device)
            tokens = torch.stack([compiled(x, 3) for _ in range(20)])
            assert tokens.shape == (20, rows) and set(tokens.flatten().tolist()) <= set(
                one_row[0].topk(3).indices.tolist()
            )


@pytest.mark.gpu
def test_numbers_of_each_row_over_cuda_graphs(one_row):
    """Replays read the numbers of the moment, and draw anew."""
    x = one_row.expand(B, -1).contiguous().cuda()
    given = numbers("cuda")
    with rewritten(samplers.SAMPLER), inductor_config.patch({"triton.cudagraph_or_error": True}):
        compiled = torch.compile(vllm_everything, fullgraph=True, mode="reduce-overhead")
        for turn in range(2):
            for n in given:
                n.copy_(n.roll(turn))
            tokens = torch.stack([compiled(x, *given).clone() for _ in range(CALLS)]).cpu()
            expected = stock_probabilities(vllm_everything, x[:4].cpu(), *(n[:4].cpu() for n in given))
            for row in range(4):
                check_draws(tokens[:, row::4], expected[row])
    assert counters["inductor"]["cudagraph_skips"] == 0
