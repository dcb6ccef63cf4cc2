"""Real models: every layer is rewritten, to the grade written down here, and the answers stay what they were.

Golden counts: a change in torch, in transformers or in a recogniser that makes a rewrite stop matching fails here.
"""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch
from inductor_capture import DEVICES, Capture, call_target, compiled_for_capture

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
from gpt_fast_model import ModelArgs, Transformer, sample

transformers = pytest.importorskip("transformers")

LAYERS = 2
FULL, ROPE, PLAIN = "rope + append + attention", "rope + attention", "attention"
COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch.set_num_threads(threads)


def build(family: str, implementation: str = "sdpa", device: str = "cpu", **sizes):
    special = {
        "Qwen3": dict(head_dim=8),
        "Mistral": dict(head_dim=8, sliding_window=12),
        "Gemma2": dict(head_dim=8, sliding_window=12),
        "Glm": dict(head_dim=8),
    }
    config = getattr(transformers, f"{family}Config")(**COMMON | special.get(family, {}) | sizes)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval().to(device)


def new_cache(model, kind: str):
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=24)
    return transformers.DynamicCache(config=model.config)


def prefill_and_decode(model, forward, cache_kind: str, left_padding: bool, compile_prefill: bool, steps: int = 3):
    """Logits of a prefill of 5 tokens and of some decode steps, greedy."""
    cache = new_cache(model, cache_kind)
    ids = torch.randint(1, 64, (2, 5), generator=torch.Generator().manual_seed(1)).to(model.device)
    keep = torch.ones(2, 5, dtype=torch.long, device=model.device)
    if left_padding:
        keep[0, :2] = 0
    logits = []
    with torch.no_grad():
        for i in range(1 + steps):
            extra = dict(attention_mask=keep) if left_padding else {}
            run = model.forward if i == 0 and not compile_prefill else forward
            output = run(ids, past_key_values=cache, **extra).logits
            logits.append(output)
            ids = output[:, -1:].argmax(-1)
            keep = torch.cat((keep, keep.new_ones(2, 1)), dim=1)
    return logits


def check_model(model, cache_kind, grades, *, dynamic=None, left_padding=False, compile_prefill=False):
    """Every graph has one site a layer, rewritten to one of `grades`; the logits agree with eager."""
    case = (cache_kind, left_padding, compile_prefill)
    reference = prefill_and_decode(model, model.forward, *case)
    result = Capture()
    got = prefill_and_decode(model, compiled_for_capture(model.forward, result, dynamic=dynamic), *case)
    assert result.reports, "nothing was compiled"
    for report in result.reports:
        found = [s.grade for s in report.sites if s.kind == "attention"]
        assert len(found) == LAYERS and set(found) <= set(grades), report.sites
    for ours, stock in zip(got, reference, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    return result


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
@pytest.mark.parametrize("device", DEVICES)
def test_static_cache_decode(family, implementation, dynamic, device):
    check_model(build(family, implementation, device), "static", {FULL}, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
@pytest.mark.parametrize("device", DEVICES)
def test_dynamic_cache(family, implementation, dynamic, device):
    """Keys are rotated before `torch.cat`: RoPE stays Inductor's. Prefill and decode are both compiled."""
    check_model(build(family, implementation, device), "dynamic", {PLAIN}, dynamic=dynamic, compile_prefill=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("cache_kind", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
@pytest.mark.parametrize("device", DEVICES)
def test_left_padding(family, cache_kind, implementation, device):
    grades = {FULL} if cache_kind == "static" else {PLAIN}
    check_model(build(family, implementation, device), cache_kind, grades, left_padding=True)


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
def test_prefill_into_a_static_cache(family, implementation, dynamic):
    """A second prompt: the cache exists already, so its compiled prefill writes to it in place."""
    model, result = build(family, implementation), Capture()
    prompts = torch.randint(1, 64, (2, 2, 5), generator=torch.Generator().manual_seed(3))

    def second_prefill(forward):
        cache = new_cache(model, "static")
        with torch.no_grad():
            model(prompts[0], past_key_values=cache)
            return forward(prompts[1], past_key_values=cache).logits

    reference = second_prefill(model)
    got = second_prefill(compiled_for_capture(model.forward, result, dynamic=dynamic))
    assert result.grades() == [FULL] * LAYERS
    torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral"])
def test_bfloat16_error_budget(family, device):
    """bf16 logits of prefill and decode are as near to fp64 as stock's are (twice its error, plus rounding)."""
    model, precise = build(family, device=device).bfloat16(), build(family, device=device).double()
    precise.load_state_dict(model.state_dict())
    tokens = torch.randint(1, 64, (4, 2, 1), generator=torch.Generator().manual_seed(4)).to(device)

    def logits(model, forward):
        cache = new_cache(model, "static")
        with torch.no_grad():
            return [forward(ids, past_key_values=cache).logits for ids in (tokens[:, :, 0].T.contiguous(), *tokens)]

    ours = logits(model, compiled_for_capture(model.forward, Capture()))
    for a, b, e in zip(ours, logits(model, model), logits(precise, precise), strict=True):
        allowed = 2 * ((b.double() - e).abs().max() + torch.finfo(torch.bfloat16).eps * e.abs().max())
        assert (a.double() - e).abs().max() <= allowed


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_static_cache_made_and_filled_in_the_graph(implementation):
    """The first compiled prefill makes the cache itself; sdpa then looks at the part that is filled."""
    check_model(build("Llama", implementation), "static", {PLAIN, FULL}, compile_prefill=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_cache(implementation):
    model, result = build("Llama", implementation), Capture()
    ids = torch.randint(1, 64, (2, 7))
    with torch.no_grad():
        got = compiled_for_capture(model.forward, result)(ids, use_cache=False).logits
        torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert result.grades() == [ROPE] * LAYERS


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("family", "implementation", "grades"),
    [
        ("Gemma2", "eager", {FULL}),
        ("Olmo2", "sdpa", {FULL}),
        ("Cohere", "sdpa", {FULL}),
        ("Glm", "sdpa", {FULL}),
        ("Phi", "sdpa", {FULL}),
        ("Qwen2", "sdpa", {FULL}),
    ],
)
def test_other_families(family, implementation, grades, device):
    """Soft cap, norms before RoPE, interleaved and partial RoPE."""
    check_model(build(family, implementation, device), "static", grades)


@pytest.mark.parametrize("device", DEVICES)
def test_sliding_window_over_its_whole_life(device):
    """Mistral's static cache compiles other graphs when it gets full and rolls: all keep the attention rewritten."""
    model = build("Mistral", device=device)
    case = ("static", False, False)
    reference = prefill_and_decode(model, model.forward, *case, steps=14)
    result = Capture()
    got = prefill_and_decode(model, compiled_for_capture(model.forward, result), *case, steps=14)
    assert {FULL} <= set(result.grades()) <= {FULL, PLAIN}
    for ours, stock in zip(got, reference, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_training_step_is_left_alone():
    model, result = build("Llama"), Capture()
    ids = torch.randint(1, 64, (2, 7))
    loss = compiled_for_capture(model.forward, result)(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert result.grades() == [""] * LAYERS and "gradients" in result.reasons()[0]
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected)


# ---- the gpt-fast style model of examples/ ----


def gpt_fast(dtype=torch.float32, device="cpu", **options):
    torch.manual_seed(0)
    sizes = dict(n_layer=LAYERS, dim=64, n_head=4, n_kv_head=2, vocab_size=96, intermediate_size=96)
    args = ModelArgs(**sizes | options)
    model = Transformer(args).eval().to(dtype)
    model.setup_caches(max_batch_size=2, max_seq_length=32)
    return model.to(device)


def clear(model):
    for layer in model.layers:
        layer.attention.kv_cache.k_cache.zero_()
        layer.attention.kv_cache.v_cache.zero_()


def gpt_fast_logits(model, forward):
    clear(model)
    device = model.output.weight.device
    ids = torch.randint(0, 96, (2, 6), generator=torch.Generator().manual_seed(2)).to(device)
    positions = torch.arange(8, device=device)
    with torch.no_grad():
        return [
            forward(ids, positions[:6]),
            forward(ids[:, :1], positions[6:7].clone()),
            forward(ids[:, 1:2], positions[7:].clone()),
        ]


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("gqa", ["repeat_interleave", "enable_gqa"])
@pytest.mark.parametrize("device", DEVICES)
def test_gpt_fast(gqa, dynamic, device):
    model, result = gpt_fast(device=device, gqa=gqa), Capture()
    reference = gpt_fast_logits(model, model)
    got = gpt_fast_logits(model, compiled_for_capture(model, result, dynamic=dynamic))
    assert set(result.grades()) == {FULL} and len(result.reports) == 2
    for ours, stock in zip(got, reference, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_gpt_fast_tables_are_made_once():
    """cos and sin, which every layer takes out of the same table, are brought into the op's layout once."""
    model, result = gpt_fast(), Capture()
    gpt_fast_logits(model, compiled_for_capture(model, result))
    calls = [n for n in result.graphs[0].nodes if call_target(n) == torch.ops.fi.rope_append_attention.default]
    assert len(calls) == LAYERS
    assert len({n.kwargs["cos"] for n in calls}) == len({n.kwargs["sin"] for n in calls}) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_gpt_fast_bfloat16_error_budget(device):
    """bf16 logits are as near to fp64 as stock's are (twice its error, plus rounding)."""
    model = gpt_fast(torch.bfloat16, device)
    precise = gpt_fast(torch.float64, device)
    precise.load_state_dict(model.state_dict())
    exact = gpt_fast_logits(precise, precise)
    stock = gpt_fast_logits(model, model)
    ours = gpt_fast_logits(model, compiled_for_capture(model, Capture()))
    for a, b, e in zip(ours, stock, exact, strict=True):
        allowed = 2 * ((b.double() - e).abs().max() + torch.finfo(torch.bfloat16).eps * e.abs().max())
        assert (a.double() - e).abs().max() <= allowed


def test_gpt_fast_decode_with_sampler():
    model, result = gpt_fast(), Capture()

    def decode(ids, positions):
        return sample(model(ids, positions), temperature=0.8, top_k=1)[0]

    with torch.no_grad():
        token = compiled_for_capture(decode, result)(torch.tensor([[3], [4]]), torch.tensor([0]))
        clear(model)
        assert torch.equal(token, decode(torch.tensor([[3], [4]]), torch.tensor([0])))
    assert result.grades("sampling") == ["top_k_top_p_sampling_from_logits"]
    assert result.grades() == [FULL] * LAYERS
