"""Hugging Face `generate` through fi_ops: the same distributions as its own, its arguments, and what is left to it."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from inductor_capture import DEVICES

import fi_ops

transformers = pytest.importorskip("transformers", minversion="5")
from transformers.generation import (  # noqa: E402
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fi_ops.integrations import transformers as integration  # noqa: E402

VOCAB, PAD, EOS = 12, 0, 1


class Alphabet:
    """As much of a tokenizer as stop strings and streamers need: token i is the i-th letter."""

    def get_vocab(self):
        return {chr(ord("a") + i): i for i in range(VOCAB)}

    def __len__(self):
        return VOCAB

    def _convert_id_to_token(self, token):
        return chr(ord("a") + token)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def decode(self, ids, **_):
        return "".join(chr(ord("a") + int(i)) for i in torch.as_tensor(ids).flatten())

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) - ord("a") for c in text]}


class Counting(LogitsProcessor):
    """A processor of the user's own: bans a token, and counts its calls."""

    def __init__(self, banned: int = 3):
        self.banned, self.calls = banned, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, self.banned] = -math.inf
        return scores


def build(device="cpu", **options):
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2, **options,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval().to(device)
    with torch.no_grad():
        model.lm_head.weight.mul_(25)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def model():
    return build()


@pytest.fixture(autouse=True)
def _each_warning_anew():
    integration._warn.cache_clear()


PROMPT = [5, 7, 4, 9]


def prompt(rows=1, device="cpu"):
    return torch.tensor([PROMPT], device=device).expand(rows, -1).contiguous()


def drawn_by_fi(model, *args, **options):
    """generate() under `installed`, which must not leave it to Hugging Face."""
    calls = []
    op = fi_ops.sampling.top_k_top_p_sampling_from_logits

    def counted(*a, **k):
        calls.append(k)
        return op(*a, **k)

    with pytest.MonkeyPatch.context() as patch, integration.installed(model), warnings.catch_warnings():
        warnings.filterwarnings("error", message="fi_ops.integrations")
        patch.setattr(fi_ops.sampling, "top_k_top_p_sampling_from_logits", counted)
        output = model.generate(*args, do_sample=True, **options)
    assert calls, "no token was drawn by fi_ops"
    return output


def exact_probabilities(model, ids, **options):
    """What Hugging Face draws the next token of each row from."""
    out = model.generate(
        ids, do_sample=True, max_new_tokens=1, return_dict_in_generate=True, output_scores=True, **options
    )
    return F.softmax(out.scores[0].double(), -1)


def assert_distributed(counts, expected, false_alarm=1e-6):
    """Chi-square of counts against expected counts (0 is a token that must not come). A right sampler fails at one seed in a
    million: the threshold is the 1 - 1e-6 quantile, by the Wilson-Hilferty approximation (within 1% from 1 degree on)."""
    counts, expected = counts.double().cpu(), expected.double().cpu()
    assert (counts[expected == 0] == 0).all(), "a token outside the support"
    kept = expected > 0
    assert expected[kept].min() > 5, "too few draws for a chi-square"
    freedom = int(kept.sum()) - 1
    assert freedom > 0
    z = -torch.special.ndtri(torch.tensor(false_alarm, dtype=torch.float64)).item()
    limit = freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < limit


CONFIGURATIONS = {
    "plain": dict(top_k=0),
    "default": dict(),
    "temperature": dict(temperature=1.7, top_k=0),
    "top_k": dict(top_k=4),
    "top_p": dict(top_p=0.8, top_k=0),
    "min_p": dict(min_p=0.08, top_k=0),
    "all four": dict(temperature=1.6, top_k=9, top_p=0.95, min_p=0.05),
    "repetition penalty": dict(temperature=1.3, top_k=8, repetition_penalty=2.5),
    "bans": dict(top_p=0.9, suppress_tokens=[6, 8], bad_words_ids=[[10]]),
    "own processor": dict(top_k=6, logits_processor="own"),
    "typical": dict(temperature=1.5, top_k=10, typical_p=0.8),
    "epsilon": dict(top_k=0, epsilon_cutoff=0.05),
    "eta": dict(top_k=0, temperature=1.2, eta_cutoff=0.05),
    "renormalised": dict(top_k=5, renormalize_logits=True),
    "watermark": dict(top_k=8, watermarking_config=transformers.WatermarkingConfig(bias=1.5)),
}


def configured(name):
    options = dict(CONFIGURATIONS[name])
    if options.get("logits_processor") == "own":
        options["logits_processor"] = LogitsProcessorList([Counting()])
    return options


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_distribution_is_huggingfaces(name, device):
    """The first token of 40,000 rows against the probabilities that Hugging Face's own processors leave."""
    model, draws = build(device), 40_000
    expected = exact_probabilities(model, prompt(1, device), **configured(name))[0]
    tokens = drawn_by_fi(model, prompt(draws, device), max_new_tokens=1, **configured(name))[:, -1]
    assert_distributed(torch.bincount(tokens, minlength=VOCAB), expected * draws)


@pytest.mark.parametrize("name", ["all four", "repetition penalty", "typical"])
def test_later_tokens_follow_the_earlier_ones(model, name):
    """The third token of a sequence, given the two that were drawn before it."""
    options = {**configured(name), "top_k": 3}
    ids = drawn_by_fi(model, prompt(60_000), max_new_tokens=3, **options)
    pairs, of_pair = ids[:, :-1].unique(dim=0, return_inverse=True)
    probabilities = exact_probabilities(model, pairs, **options)
    tested = 0
    for i in range(len(pairs)):
        tokens, expected = ids[of_pair == i, -1], probabilities[i] * (of_pair == i).sum()
        if (expected > 0).sum() > 1 and expected[expected > 0].min() > 5:
            assert_distributed(torch.bincount(tokens, minlength=VOCAB), expected)
            tested += 1
    assert tested >= 4


@pytest.mark.parametrize("device", DEVICES)
def test_seeds(device):
    """Reproducible by a generator and by manual_seed; another stream than Hugging Face's."""
    model = build(device)
    options = dict(max_new_tokens=12, top_k=0, temperature=2.0)

    def by_generator(seed):
        return drawn_by_fi(model, prompt(8, device), generator=torch.Generator(device).manual_seed(seed), **options)

    def by_global_seed(seed):
        torch.manual_seed(seed)
        return drawn_by_fi(model, prompt(8, device), **options)

    for tokens in (by_generator, by_global_seed):
        assert torch.equal(tokens(3), tokens(3)) and not torch.equal(tokens(3), tokens(4))
    state = torch.random.get_rng_state()
    by_generator(3)
    assert device == "cuda" or torch.equal(state, torch.random.get_rng_state()), "the default generator is not used"
    torch.manual_seed(3)
    assert not torch.equal(by_global_seed(3), model.generate(prompt(8, device), do_sample=True, **options))


def test_top_k_one_is_greedy(model):
    ids = torch.tensor([[2, 5, 7], [0, 2, 4]])
    options = dict(attention_mask=(ids != 0).long(), max_new_tokens=8)
    greedy = model.generate(ids, do_sample=False, **options)
    assert torch.equal(drawn_by_fi(model, ids, top_k=1, **options), greedy)
    with integration.installed(model):
        assert torch.equal(model.generate(ids, do_sample=False, **options), greedy)


def test_finished_rows_are_padded(model):
    torch.manual_seed(1)
    ids = drawn_by_fi(model, prompt(200), max_new_tokens=10, top_k=0, temperature=3.0, eos_token_id=EOS)[:, 4:]
    ended = (ids == EOS).int().cumsum(1) - (ids == EOS).int() > 0
    assert ended.any() and (ids[ended] == PAD).all()


class Collected(transformers.generation.BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streaming(model):
    streamer = Collected()
    ids = drawn_by_fi(model, prompt(), streamer=streamer, max_new_tokens=6, top_k=5)
    assert streamer.ended and streamer.tokens == ids[0].tolist() and len(streamer.tokens) == 10


def test_stop_strings(model):
    """By the tokenizer, which `generate` does not hand to a loop of one's own; next to another criterion of the caller's."""
    torch.manual_seed(1)
    seen = []

    def watch(ids, scores, **_):
        seen.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    options = dict(max_new_tokens=50, top_k=0, temperature=3.0, tokenizer=Alphabet(), stopping_criteria=[watch])
    ids = drawn_by_fi(model, prompt(), stop_strings=["j"], **options)[0].tolist()
    assert ids[4:].index(9) == len(ids) - 5 < 49 and seen[-1] == len(ids)


def test_return_dict_and_logits(model):
    out = drawn_by_fi(model, prompt(2), max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    assert out.sequences.shape == (2, 7) and [t.shape for t in out.logits] == [(2, VOCAB)] * 3
    expected = model(out.sequences[:, :-1]).logits[:, -3:].transpose(0, 1)
    torch.testing.assert_close(torch.stack(out.logits), expected)


def test_encoder_decoder():
    """And several sequences for a prompt."""
    torch.manual_seed(3)
    small = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=PAD)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=VOCAB, **small)).eval()
    options = dict(max_new_tokens=6, num_return_sequences=2)
    greedy = model.generate(prompt(3), do_sample=False, max_new_tokens=6)
    tokens = drawn_by_fi(model, prompt(3), top_k=1, **options)
    assert torch.equal(tokens, greedy.repeat_interleave(2, 0))
    tokens = drawn_by_fi(model, prompt(3), top_k=0, temperature=9.0, **options)
    assert len(tokens) == 6 and not torch.equal(tokens[0], tokens[1])


def test_generation_config_and_positions(model):
    """Settings from a GenerationConfig, as the second argument by position, and from the model's own."""
    config = transformers.GenerationConfig(do_sample=True, top_k=1, max_new_tokens=5, pad_token_id=PAD)
    greedy = model.generate(prompt(), do_sample=False, max_new_tokens=5)
    calls = Counting()
    with integration.installed(model):
        assert torch.equal(model.generate(prompt(), config, LogitsProcessorList([calls])), greedy)
        assert calls.calls == 5
        model.generation_config.update(do_sample=True, top_k=1)
        with pytest.raises(ValueError, match="generator must come with do_sample=True, got False"):
            model.generate(prompt(), do_sample=False, generator=torch.Generator())
        assert torch.equal(model.generate(prompt(), max_new_tokens=5, generator=torch.Generator()), greedy)


def test_custom_generate_for_one_call(model):
    generator = torch.Generator()
    options = dict(do_sample=True, max_new_tokens=5, custom_generate=integration.sample)
    first = model.generate(prompt(), generator=generator.manual_seed(1), **options)
    assert torch.equal(first, drawn_by_fi(model, prompt(), generator=generator.manual_seed(1), max_new_tokens=5))
    with pytest.raises(ValueError, match="custom_generate=sample must come with plain sampling, got beam sample"):
        model.generate(prompt(), num_beams=2, **options)
    with pytest.raises(ValueError, match="got output_scores=True"):
        model.generate(prompt(), return_dict_in_generate=True, output_scores=True, **options)
    greedy = model.generate(prompt(), do_sample=False, max_new_tokens=5)
    assert torch.equal(model.generate(prompt(), **{**options, "do_sample": False}), greedy)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(num_beams=3), "arguments that ask for beam sample"),
        (dict(prompt_lookup_num_tokens=2, eos_token_id=EOS), "arguments that ask for assisted generation"),
        (dict(assistant_model="self"), "arguments that ask for assisted generation"),
        (dict(return_dict_in_generate=True, output_scores=True), "output_scores=True"),
        (dict(custom_generate=lambda model, input_ids, **_: input_ids), "custom_generate"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_left_to_huggingface(model, options, reason):
    """With a warning, once; what comes out is what comes out without fi_ops."""
    options = {**options, "do_sample": True, "max_new_tokens": 4}
    if options.get("assistant_model"):
        options["assistant_model"] = build()

    def tokens():
        torch.manual_seed(2)
        out = model.generate(prompt(), **options)
        return getattr(out, "sequences", out)

    expected = tokens()
    with integration.installed(model):
        with pytest.warns(UserWarning, match=f"samples as it does without fi_ops: it got {reason}"):
            assert torch.equal(tokens(), expected)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="fi_ops.integrations")
            assert torch.equal(tokens(), expected)
        with pytest.raises(ValueError, match=f"generator must come alone, got {reason}"):
            model.generate(prompt(), generator=torch.Generator(), **options)


def test_one_of_several_processes(model):
    """Which may have to keep in step is for generate() to find out, unless the caller says that they do not."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        options = dict(do_sample=True, top_k=1, max_new_tokens=3)
        expected = model.generate(prompt(), **options)
        assert torch.equal(drawn_by_fi(model, prompt(), top_k=1, max_new_tokens=3), expected)
        with integration.installed(model), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)
            for synced, left in ((True, True), (None, True), (False, False)):
                integration._warn.cache_clear()
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    assert torch.equal(model.generate(prompt(), synced_gpus=synced, **options), expected)
                assert any("it got synced_gpus=True, or several processes" in str(w.message) for w in said) == left
    finally:
        torch.distributed.destroy_process_group()


def test_scores_that_the_op_does_not_take(model):
    """A processor that makes float64 of the scores: Hugging Face's own draw, with a warning."""

    class Double(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.double()

    options = dict(do_sample=True, top_k=3, max_new_tokens=3, logits_processor=LogitsProcessorList([Double()]))
    torch.manual_seed(2)
    expected = model.generate(prompt(), **options)
    with integration.installed(model):
        torch.manual_seed(2)
        with pytest.warns(UserWarning, match=r"it got scores \[1, 12\] of torch.float64 on cpu"):
            assert torch.equal(model.generate(prompt(), **options), expected)
        with pytest.raises(ValueError, match="generator must come with scores that the op takes"):
            model.generate(prompt(), generator=torch.Generator(), **options)


def test_rows_that_can_not_be_drawn_from(model):
    """An error, as in Hugging Face's own loop, not a token."""

    class Broken(LogitsProcessor):
        def __init__(self, value):
            self.value = value

        def __call__(self, input_ids, scores):
            return torch.full_like(scores, self.value)

    for value in (math.nan, -math.inf):
        options = dict(do_sample=True, max_new_tokens=2, logits_processor=LogitsProcessorList([Broken(value)]))
        with pytest.raises(RuntimeError):
            model.generate(prompt(), **options)
        with (
            integration.installed(model),
            pytest.raises(RuntimeError, match="a row of the scores has NaN, or no token"),
        ):
            model.generate(prompt(), **options)


# ---- which processors are fused ----


@pytest.mark.parametrize(
    ("processors", "first", "filters"),
    [
        ([], 0, {}),
        ([TemperatureLogitsWarper(0.5)], 0, dict(temperature=0.5)),
        (
            [TemperatureLogitsWarper(0.5), TopKLogitsWarper(3), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)],
            0,
            dict(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1),
        ),
        ([Counting(), TopKLogitsWarper(3), TopPLogitsWarper(0.9)], 1, dict(top_k=3, top_p=0.9)),
        ([TopPLogitsWarper(0.9), TopKLogitsWarper(3)], 1, dict(top_k=3)),
        ([TopKLogitsWarper(3), TemperatureLogitsWarper(0.5)], 1, dict(temperature=0.5)),
        ([TopKLogitsWarper(5), TopKLogitsWarper(3)], 1, dict(top_k=3)),
        ([TopKLogitsWarper(3), Counting()], 2, {}),
        ([TopPLogitsWarper(0.9, min_tokens_to_keep=2)], 1, {}),
        ([TopKLogitsWarper(1, min_tokens_to_keep=2)], 0, dict(top_k=2)),
        ([TopKLogitsWarper(3, filter_value=-5.0), MinPLogitsWarper(0.1)], 1, dict(min_p=0.1)),
        ([TopKLogitsWarper(3), transformers.LogitNormalization()], 0, dict(top_k=3)),
        ([TopKLogitsWarper(3), transformers.LogitNormalization(), TopPLogitsWarper(0.9)], 2, dict(top_p=0.9)),
    ],
)
def test_filters_at_the_end(processors, first, filters):
    assert integration._filters_at_the_end(LogitsProcessorList(processors)) == (first, filters)


def test_drawn_scores_are_right_for_every_function():
    """Written out, they pick the same tokens; the functions of generate's loop get them without."""
    tokens = torch.tensor([3, 0, 7])
    drawn = integration._Drawn(tokens, 9)
    written = drawn.written_out()
    assert written.shape == (3, 9) and (written == 0).sum() == 3 and torch.equal(written.argmax(-1), tokens)
    probs = F.softmax(drawn, dim=-1)
    assert isinstance(probs, integration._Drawn) and torch.equal(probs.written_out(), F.softmax(written, dim=-1))
    assert torch.equal(torch.multinomial(probs, num_samples=1), tokens[:, None])
    assert torch.equal(torch.argmax(drawn, dim=-1), tokens) and torch.equal(torch.argmax(probs, dim=-1), tokens)
    assert torch.equal(torch.argmax(drawn, dim=0), written.argmax(0))
    assert torch.equal(drawn.argmax(-1), tokens) and drawn.shape == (3, 9)
    assert torch.equal(
        torch.log_softmax(drawn, -1).exp().multinomial(4, replacement=True), tokens[:, None].expand(3, 4)
    )
    assert torch.equal(torch.stack([written, written]), torch.stack([drawn, drawn]))
    gumbel = -torch.empty(3, 9).exponential_().log()
    assert torch.equal(torch.argmax(torch.add(drawn, gumbel), dim=-1), tokens)


# ---- install and uninstall ----


def test_install_and_uninstall(model):
    plain = vars(model).copy()
    integration.uninstall(model)
    integration.install(model)
    integration.install(model)
    with integration.installed(model):
        pass
    assert integration._is_ours(model.generate), "what was installed before stays"
    twin = copy.deepcopy(model)
    assert twin.generate.args[0] is twin, "a copy generates with itself"
    assert pickle.loads(pickle.dumps(model)).generate(prompt(), do_sample=True, top_k=1, max_new_tokens=1).shape == (
        1,
        5,
    )
    integration.uninstall(model)
    assert vars(model).keys() == plain.keys() and integration._is_ours(twin.generate)
    with pytest.raises(KeyError), integration.installed(model):
        raise KeyError
    assert "generate" not in vars(model)


def test_install_on_a_compiled_model(model):
    compiled = torch.compile(model, backend="eager")
    greedy = model.generate(prompt(), do_sample=False, max_new_tokens=3)
    assert torch.equal(drawn_by_fi(compiled, prompt(), top_k=1, max_new_tokens=3), greedy)
    integration.install(compiled)
    assert integration._is_ours(vars(model)["generate"])
    integration.uninstall(compiled)
    assert "generate" not in vars(model)


def test_install_refuses(model):
    with pytest.raises(TypeError, match=r"model must be one with generate\(\), got Linear; pass"):
        integration.install(torch.nn.Linear(2, 2))

    class Own(transformers.LlamaForCausalLM):
        def generate(self, *args, **kwargs):
            return super().generate(*args, **kwargs)

    with pytest.raises(TypeError, match="Own has one of its own; pass the language model inside it"):
        integration.install(Own(model.config))
    model.generate = print
    with pytest.raises(RuntimeError, match=r"model\.generate must be its class's, got <built-in function print>"):
        integration.install(model)
    integration.uninstall(model)
    assert model.generate is print


def test_without_transformers():
    """Importing fi_ops needs no transformers and does not import it; the integration says what it needs."""
    code = """if True:
        import sys, fi_ops, fi_ops.integrations
        assert "transformers" not in sys.modules
        sys.modules["transformers"] = None
        try:
            import fi_ops.integrations.transformers
        except ImportError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "fi_ops.integrations.transformers needs Hugging Face transformers 5.0 or newer; pip install 'transformers>=5'"
    )


@pytest.mark.gpu
def test_with_a_compiled_decode_step_on_cuda():
    """generate() compiles the decode step over a static cache itself; the draw behind it is ours, greedy where k is 1."""
    model = build("cuda")
    options = dict(max_new_tokens=12, cache_implementation="static")
    greedy = model.generate(prompt(2, "cuda"), do_sample=False, **options)
    assert torch.equal(drawn_by_fi(model, prompt(2, "cuda"), top_k=1, **options), greedy)
    with fi_ops.enabled():
        torch._dynamo.reset()
        tokens = drawn_by_fi(build("cuda"), prompt(2, "cuda"), top_k=1, **options)
    assert torch.equal(tokens, greedy)
