"""The serving example's engine: its tokens are those of one request at a time, whatever else runs, shares pages or is preempted."""

from __future__ import annotations

import importlib.util
import json
import random
import socket
import sys
import zlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

import serve  # noqa: E402
from serving.engine import Engine, SamplingParams, generate, run  # noqa: E402
from serving.model import Llama, LlamaConfig  # noqa: E402
from serving.pages import PagePool  # noqa: E402
from serving.status import StatusLine  # noqa: E402
from serving.step import Step  # noqa: E402
from serving.text import TextStream, load_tokenizer  # noqa: E402

DEMO = EXAMPLES / "demo_model"
MAX_LEN, NEW = 256, 24
COMMON = 'import os\nimport sys\n\n\nclass Path:\n    """A path."""\n\n    def __init__(self, path):\n        self.path = path\n\n'
TEXTS = [
    COMMON + "    def join(self, other):\n",
    COMMON + "    def exists(self):\n        return",
    COMMON + "    def exists(self):\n        if",
    COMMON,
    "x",
    "for i in range(10):\n    print(",
    "try:\n    import json\nexcept ImportError:\n",
    'def parse(text, encoding=\'utf-8\', errors=None):\n    """Parse text."""\n',
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.fixture(scope="module")
def model():
    return Llama.from_directory(DEMO, torch.float32, "cpu", MAX_LEN)


@pytest.fixture(scope="module")
def make(model, tokenizer):
    """An engine of the demo model, eager where not said otherwise."""

    def make(max_requests=8, step_tokens=64, page_size=16, num_pages=128, sharing=True, compiled=False, of=model):
        step = Step(
            of, num_pages=num_pages, page_size=page_size, kv_dtype=torch.float32, sizes={max_requests, step_tokens},
            max_requests=max_requests, max_pages=max_requests * -(-MAX_LEN // page_size), compiled=compiled,
        )  # fmt: skip
        pool = PagePool(num_pages, page_size, sharing)
        return Engine(step, pool, max_len=MAX_LEN, eos_token_ids=of.config.eos_token_ids, tokenizer=tokenizer)

    return make


def greedy(max_tokens=NEW, **options):
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)


def all_free(engine):
    return engine.pool.used == 0 and engine.pool.available == engine.pool.num_pages and engine.unfinished == 0


@pytest.fixture(scope="module")
def alone(make, prompts):
    """Each prompt's greedy tokens from an engine that runs it alone, its prompt in one piece, nothing shared."""
    engine = make(max_requests=1, step_tokens=128, sharing=False)
    return [generate(engine, [prompt], [greedy()])[0] for prompt in prompts]


def test_alone_is_what_transformers_generates(alone, prompts):
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    for prompt, tokens in zip(prompts, alone, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :]
        assert tokens == expected.tolist()


@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no sharing"])
@pytest.mark.parametrize(
    ("max_requests", "step_tokens", "page_size"), [(1, 1, 16), (4, 4, 1), (4, 7, 5), (3, 32, 16), (8, 200, 64)]
)
def test_together(max_requests, step_tokens, page_size, sharing, make, prompts, alone):
    """Chunks of prompts of any size among decodes, requests that arrive at any step."""
    engine = make(max_requests, step_tokens, page_size, 2048 // page_size, sharing)
    rng, requests, coming = random.Random(step_tokens), {}, list(range(len(prompts)))
    rng.shuffle(coming)
    while coming or engine.unfinished:
        while coming and rng.random() < 0.3:
            i = coming.pop()
            requests[i] = engine.submit(prompts[i], greedy())[0]
        engine.step()
        held = sum(len(request.pages) for request in engine.running)
        assert sum(engine.pool._refs) == held and engine.pool.used <= held
    assert [requests[i].output for i in range(len(prompts))] == alone
    assert (engine.stats.shared_tokens > 0) == sharing and all_free(engine)


def test_preemption(make, prompts, alone):
    """Pages run out: the youngest gives its own back, and later goes on with the same tokens."""
    longest = max(len(prompt) for prompt in prompts) + NEW
    engine = make(num_pages=-(-longest // 16) + 2)
    assert generate(engine, prompts, [greedy()] * len(prompts)) == alone
    assert engine.stats.preempted > 0 and all_free(engine)


def test_what_is_evicted_is_computed_again(make, prompts, alone):
    """A pool that can't keep all prefixes: what is found of them is right, what is not is computed."""
    engine = make(max_requests=2, page_size=4, num_pages=40)
    order = random.Random(0).choices(range(len(prompts)), k=24)
    assert generate(engine, [prompts[i] for i in order], [greedy()] * 24) == [alone[i] for i in order]
    assert 0 < engine.stats.shared_tokens < sum(len(prompts[i]) for i in order) and all_free(engine)


def test_prefixes_are_shared_to_the_token(make, prompts, alone):
    """The second request finds all of the prompt but its last token: whole pages shared, a partly filled one copied."""
    engine, prompt = make(), prompts[0]
    assert len(prompt) % 16 > 1
    assert generate(engine, [prompt], [greedy()]) == [alone[0]]
    assert (engine.stats.computed_tokens, engine.stats.shared_tokens) == (len(prompt) + NEW - 1, 0)
    assert generate(engine, [prompt], [greedy()]) == [alone[0]]
    assert (engine.stats.computed_tokens, engine.stats.shared_tokens) == (len(prompt) + 2 * NEW - 1, len(prompt) - 1)
    turn = prompt + alone[0]  # a conversation goes on: its own last page, as far as it was filled
    generate(engine, [turn], [greedy(1)])
    assert engine.stats.shared_tokens == len(prompt) - 1 + len(turn) - 1


def test_choices_of_one_prompt_compute_it_once(make, prompts, alone):
    engine, prompt = make(), prompts[1]
    requests = engine.submit(prompt, greedy(), 4)
    run(engine)
    assert [request.output for request in requests] == [alone[1]] * 4
    assert engine.stats.shared_tokens == 3 * (len(prompt) - 1) and all_free(engine)
    samples = engine.submit(prompt, SamplingParams(NEW, seed=5), 4)
    run(engine)
    assert len({tuple(request.output) for request in samples}) == 4  # seeds count up
    assert samples[2].output == generate(engine, [prompt], [SamplingParams(NEW, seed=7)])[0]


def test_a_sampled_request_is_its_own(make, prompts):
    """Tokens are a function of prompt, parameters and seed: not of what else runs, of chunks or of preemption."""
    params = [
        SamplingParams(NEW, 0.8, top_k=50, top_p=0.95, seed=1),
        SamplingParams(NEW, 1.3, seed=2),
        SamplingParams(NEW, 1.0, min_p=0.05, seed=-(2**63)),
        SamplingParams(NEW, 0.7, top_p=0.8, seed=2**63 - 1),
    ] * 2
    one = make(max_requests=1, step_tokens=1, sharing=False)
    expected = [generate(one, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]
    assert generate(make(), prompts, params) == expected
    crowded = make(max_requests=4, step_tokens=9, page_size=4, num_pages=24)
    assert generate(crowded, prompts[::-1], params[::-1]) == expected[::-1]
    assert crowded.stats.preempted > 0
    assert generate(make(), prompts[:1], [SamplingParams(NEW, 0.8, top_k=50, top_p=0.95, seed=9)])[0] != expected[0]


@pytest.mark.parametrize("page_size", [16, 64])
def test_a_request_that_needs_every_page(page_size, make, prompts, alone):
    """Also where the page that it would copy from is one of those that it needs."""
    engine = make(page_size=page_size, num_pages=-(-(len(prompts[0]) + NEW) // page_size))
    for _ in range(3):
        assert generate(engine, [prompts[0]] * 2, [greedy()] * 2) == [alone[0]] * 2
    assert all_free(engine)


def test_requests_without_a_seed_differ(make, prompts):
    outputs = generate(make(), [prompts[5]] * 6, [SamplingParams(NEW)] * 6)
    assert len(set(map(tuple, outputs))) == 6


def test_cancel(make, prompts, alone):
    """At any time: while waiting, in the middle of the prompt, while decoding, when finished."""
    engine = make(max_requests=3, step_tokens=8)
    requests = [engine.submit(prompt, greedy())[0] for prompt in prompts]
    rng = random.Random(3)
    for i in rng.sample(range(len(prompts)), 4):
        for _ in range(rng.randrange(6)):
            engine.step()
        engine.cancel(requests[i])
        engine.cancel(requests[i])
    run(engine)
    kept = [i for i, request in enumerate(requests) if request.finish_reason != "cancelled"]
    assert len(kept) >= 4 and all(requests[i].output == alone[i] for i in kept) and all_free(engine)
    leader, *others = engine.submit(prompts[0], greedy(), 3)
    engine.cancel(leader)
    run(engine)
    assert [request.output for request in others] == [alone[0]] * 2 and all_free(engine)


def test_where_a_completion_ends(make, prompts, alone, tokenizer):
    engine, text = make(), tokenizer.decode(alone[0])
    stop = text[9:13]
    cases = [
        (greedy(3), alone[0][:3], tokenizer.decode(alone[0][:3]), "length"),
        (greedy(stop_token_ids=(alone[0][4],)), alone[0][:5], tokenizer.decode(alone[0][:4]), "stop"),
        (greedy(stop=("never", stop)), None, text[: text.index(stop)], "stop"),
    ]
    requests = [engine.submit(prompts[0], params)[0] for params, *_ in cases]
    texts = dict.fromkeys(requests, "")

    def collect(events):
        for event in events:
            texts[event.request] += event.text

    run(engine, collect)
    for request, (_, tokens, expected, reason) in zip(requests, cases, strict=True):
        assert (texts[request], request.finish_reason) == (expected, reason)
        assert tokens is None or request.output == tokens
    assert all_free(engine)


def test_end_of_text_ends_a_completion(make, prompts, alone):
    engine = make()
    engine.eos_token_ids = frozenset([alone[1][6]])
    first = alone[1].index(alone[1][6])
    assert generate(engine, [prompts[1]], [greedy()]) == [alone[1][: first + 1]]
    assert generate(engine, [prompts[1]], [greedy(ignore_eos=True)]) == [alone[1]]


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ([], {}, "the prompt has no tokens"),
        ([1, 2048], {}, "tokens from 0 to 2047"),
        ([1, -1], {}, "tokens from 0 to 2047"),
        ([1] * 200, {"max_tokens": 57}, "200 tokens and max_tokens 57 are more than the 256"),
        ([1], {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ([1], {"temperature": -0.1}, "temperature must be from 0"),
        ([1], {"temperature": float("nan")}, "temperature must be from 0"),
        ([1], {"top_p": 0.0}, "top_p must be above 0"),
        ([1], {"min_p": 1.1}, "min_p must be from 0 to 1"),
        ([1], {"top_k": -1}, "top_k must be 0"),
        ([1], {"seed": 2**63}, "seed must be an integer of 64 bits"),
        ([1], {"stop": ("",)}, "stop must be strings that are not empty"),
        ([1], {"stop_token_ids": (5000,)}, "stop_token_ids must be tokens"),
    ],
)
def test_refused_at_once(prompt, params, reason, make):
    engine = make()
    with pytest.raises(ValueError, match=reason):
        engine.submit(prompt, SamplingParams(**params))
    assert all_free(engine)


def test_a_request_that_could_never_have_its_pages_is_refused(make):
    with pytest.raises(ValueError, match="more than the 64 that a request can have"):
        make(num_pages=4).submit([1] * 60, greedy(5))


class Ledger(Step):
    """A step whose cache holds tokens, and whose next token is a checksum of all that a row's pages hold."""

    def __init__(self, engine, num_pages, page_size):
        self.model, self.max_requests, self.sizes = engine.step_fn.model, *engine.rows
        self.page_size, self.cache = page_size, [[None] * page_size for _ in range(num_pages)]

    def copy_pages(self, pairs):
        assert not {source for source, _ in pairs} & {destination for _, destination in pairs}
        for source, destination in pairs:
            self.cache[destination][:] = self.cache[source]

    def __call__(self, rows):
        assert len(rows) <= self.max_requests and sum(len(row.tokens) for row in rows) <= self.sizes[-1]
        written = set()
        for row in rows:
            assert len(row.pages) == -(-row.kv_len // self.page_size) and len(row.tokens) > 0
            for at, token in enumerate(row.tokens, row.kv_len - len(row.tokens)):
                slot = row.pages[at // self.page_size], at % self.page_size
                assert slot not in written
                written.add(slot)
                self.cache[slot[0]][slot[1]] = token
        return [self.next([t for page in row.pages for t in self.cache[page]][: row.kv_len]) for row in rows]

    @staticmethod
    def next(tokens):
        return zlib.crc32(bytes(tokens)) % 3


@pytest.mark.parametrize("seed", range(40))
def test_pages_at_random(seed, make):
    """Requests of few tokens, so that prefixes meet, over pools of any size; cancellations; every token is checked.

    The model is a ledger: a wrong, stale or overwritten page shows in the next token.
    """
    rng = random.Random(seed)
    page_size, max_requests = rng.choice([1, 2, 3, 4, 8]), rng.randint(1, 6)
    num_pages = rng.randint(40 // page_size + 1, 120 // page_size + 1)
    engine = make(max_requests=max_requests, step_tokens=max_requests + rng.randrange(9))
    engine.rows = max_requests, engine.step_fn.sizes
    engine.pool = PagePool(num_pages, page_size, sharing=rng.random() < 0.8)
    engine.step_fn, engine.eos_token_ids = Ledger(engine, num_pages, page_size), frozenset()
    requests, busy = [], 0
    for _ in range(300):
        while rng.random() < 0.3:
            prompt = [rng.randrange(2) for _ in range(rng.randint(1, 20))]
            if requests and rng.random() < 0.5:
                prompt = rng.choice(requests).tokens[: rng.randint(1, 24)]
            requests += engine.submit(prompt, greedy(rng.randint(1, 16)), rng.choice([1, 1, 3]))
        if requests and rng.random() < 0.1:
            engine.cancel(rng.choice(requests))
        busy += bool(engine.step())
        held = [page for request in engine.running for page in request.pages]
        assert sum(engine.pool._refs) == len(held) and engine.pool.used == len(set(held))
    run(engine)
    assert busy > 100 and all_free(engine)
    for request in requests:
        tokens = request.tokens[: request.prompt_len]
        for token in request.output:
            assert token == Ledger.next(tokens)
            tokens.append(token)
        assert request.finish_reason == "cancelled" or len(request.output) == request.params.max_tokens


# ------------------------------------------------------------------------------------------------ pages, text, status


def test_pool_knows_a_page_until_it_is_needed():
    pool = PagePool(4, 2)
    pages = pool.allocate(3)
    node = pool.learn(pages[0], 0, [1, 2])
    node = pool.learn(pages[1], node, [3, 4])
    pool.learn(pages[2], node, [5])
    pool.release(pages)
    assert pool.available == 4
    found = pool.match([1, 2, 3, 4, 5, 6])
    assert (found.pages, found.fork, found.fork_len) == (pages[:2], pages[2], 1)
    found = pool.match([1, 2, 3, 4])  # the last token is computed in any case
    assert (found.pages, found.fork, found.fork_len) == (pages[:1], pages[1], 1)
    assert pool.match([2, 1, 3]).pages == [] and pool.match([1, 3, 3]).fork_len == 1
    first = pool.allocate(2)  # one that holds nothing, then the end of the prefix
    assert pages[2] in first and pages[0] not in first
    assert pool.match([1, 2, 3, 4, 5, 6]).fork is None
    pool.release(first + pool.allocate(2))
    assert pool.match([1, 2, 3]).pages == [] and pool._edges == {} and pool._known == {}


def test_pool_refuses_to_release_twice():
    pool = PagePool(2, 2)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="released once too often"):
        pool.release(pages)


@pytest.mark.parametrize("text", ["def f(x):\n    return 'naïve – 日本語 🙂'\n", "🙂🙂", "abc"])
def test_text_comes_in_pieces_that_make_the_whole(text, tokenizer):
    ids = tokenizer.encode(text).ids
    stream = TextStream(tokenizer, [5, 6, 7])
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text and "�" not in "".join(pieces)
    cut = TextStream(tokenizer, [])
    assert "".join(map(cut.push, ids[:-1])) + cut.finish() == tokenizer.decode(ids[:-1])


@pytest.mark.parametrize(
    ("stops", "expected"),
    [(["turn x"], "def f(x): re"), (["zz", "(x"], "def f"), (["x + 2"], None), (["1"], "def f(x): return x + ")],
)
def test_stop_strings_across_tokens(stops, expected, tokenizer):
    text = "def f(x): return x + 1"
    stream = TextStream(tokenizer, [], stops)
    out = ""
    for token in tokenizer.encode(text).ids:
        out += stream.push(token)
        assert text.startswith(out)
        if stream.stopped:
            break
    out += stream.finish()
    assert (out, stream.stopped) == (text if expected is None else expected, expected is not None)


def test_status_line(make, prompts, capsys):
    engine = make()
    status = StatusLine(engine, sys.stdout)
    status._every = 0.0
    generate(engine, prompts, [greedy(2)] * len(prompts))
    status.update()
    status.close()
    line = capsys.readouterr().out
    assert "running   0  waiting   0" in line and "pages 0/128" in line and f"done {len(prompts)}" in line


# ------------------------------------------------------------------------------------------------ the step, the model


def test_compiled_step(make, prompts, alone):
    """Two sizes are compiled before the first request, and nothing after."""
    engine = make(max_requests=4, step_tokens=24, compiled=True)
    engine.step_fn.prepare()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert generate(engine, prompts, [greedy()] * len(prompts)) == alone
        sampled = SamplingParams(NEW, 0.8, top_k=50, top_p=0.95, seed=1)
        compiled = generate(engine, prompts[:3], [sampled] * 3)
    assert compiled == generate(make(), prompts[:3], [sampled] * 3)


def test_a_size_is_made_when_it_is_needed(make, prompts, alone, monkeypatch):
    """An engine that was not prepared makes its steps with a batch already in their inputs, and runs them before their time."""
    made = []

    def compiled(step):
        made.append(step)
        return step

    monkeypatch.setattr("serving.step._compiled", compiled)
    engine = make(max_requests=4, step_tokens=24, compiled=True)
    assert generate(engine, prompts, [greedy()] * len(prompts)) == alone and len(made) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [[], ["--eager", "--no-prefix-sharing", "--page-size", "5"]], ids=["compiled", "eager"]
)
def test_on_a_gpu(options, prompts, alone):
    """One captured graph a size: the CPU's tokens, in float32; sharing, chunks and preemption among them."""
    torch.set_float32_matmul_precision("highest")
    arguments = [
        "--device",
        "cuda",
        "--dtype",
        "float32",
        "--max-requests",
        "4",
        "--step-tokens",
        "24",
        "--pages",
        "48",
    ]
    engine = serve.make_engine(serve.arguments([*arguments, "--max-len", str(MAX_LEN), *options]))
    assert generate(engine, prompts, [greedy()] * len(prompts)) == alone
    params = [SamplingParams(NEW, 0.8, top_k=50, top_p=0.95, seed=i) for i in range(len(prompts))]
    together = generate(engine, prompts, params)
    assert [generate(engine, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)] == together
    assert all_free(engine)


TINY = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, eos_token_id=[94, 95], initializer_range=0.3,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        dict(rope_parameters=LLAMA3),
        dict(
            rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0), attention_bias=True, mlp_bias=True
        ),
        dict(tie_word_embeddings=True, num_key_value_heads=4, head_dim=32, rms_norm_eps=1e-5),
    ],
    ids=["llama3 RoPE", "linear RoPE, biases", "tied, no groups, wide heads"],
)
def test_other_checkpoints(options, tmp_path, make):
    """As `save_pretrained` writes them, in several files: the logits decide the same 100 tokens."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TINY | options))).eval()
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = Llama.from_directory(tmp_path, torch.float32, "cpu", 256)
    assert ours.config.eos_token_ids == (94, 95)
    prompt = torch.randint(0, 90, (1, 70))
    options = dict(attention_mask=torch.ones_like(prompt), do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = theirs.generate(prompt, max_new_tokens=100, **options)[0, 70:]
    engine = make(max_requests=1, step_tokens=50, of=ours)
    engine.tokenizer = None
    assert generate(engine, [prompt[0].tolist()], [greedy(100, ignore_eos=True)]) == [expected.tolist()]


def test_older_configurations(tmp_path):
    """`rope_theta` and `rope_scaling` at the top, one end-of-text token, no head counts."""
    old = dict(
        model_type="llama", vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1, eos_token_id=2
    )
    old |= dict(num_attention_heads=4, rope_theta=5e5, rope_scaling=dict(LLAMA3, rope_theta=None))
    del old["rope_scaling"]["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = LlamaConfig.from_directory(tmp_path)
    assert (config.head_dim, config.num_key_value_heads, config.eos_token_ids) == (16, 4, (2,))
    assert config.rope["rope_theta"] == 5e5 and config.rope["old_context_len"] == 32


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "has no config.json"),
        ({"config.json": '{"model_type": "gpt2"}'}, "a model of type 'gpt2'"),
        ({"config.json": None, "rope": "yarn"}, "RoPE scaling 'yarn' is not supported"),
        ({"config.json": None}, "has no tokenizer.json"),
    ],
)
def test_what_is_no_llama_is_refused(files, reason, tmp_path, capsys):
    config = json.loads((DEMO / "config.json").read_text())
    if "rope" in files:
        config["rope_parameters"] = {"rope_type": files["rope"]}
    if "config.json" in files:
        (tmp_path / "config.json").write_text(files["config.json"] or json.dumps(config))
    assert serve.main(["--model", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert serve.main(["--port", port, "--eager", "--device", "cpu", "--pages", "64", "--max-requests", "4"]) == 2
    err = capsys.readouterr().err
    assert f"127.0.0.1:{port}: " in err and "choose another --port" in err


def test_bench_mode(capsys):
    arguments = ["--bench", "4", "--eager", "--device", "cpu", "--max-requests", "4", "--pages", "64"]
    assert serve.main(arguments) == 0
    out = capsys.readouterr().out
    assert "this engine, all at once" in out and "one at a time: 1 of 1 outputs the same" in out
    if importlib.util.find_spec("transformers"):
        assert "against transformers: 1 of 1 outputs the same" in out
    assert serve.main([*arguments, "--random-weights", "--kv-dtype", "float8_e4m3fn"]) == 0
    assert "all at once" in capsys.readouterr().out
