"""The serving example over HTTP: nothing is lost or mixed among many clients, those that go free what they had, bad requests
are refused with the reason."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(Path(__file__).resolve().parent)]
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from serving.engine import Engine, SamplingParams, generate, run  # noqa: E402
from serving.model import Llama  # noqa: E402
from serving.pages import PagePool  # noqa: E402
from serving.step import Step  # noqa: E402
from serving.text import load_tokenizer  # noqa: E402
from serving_client import RunningServer, post_bytes, read_chunks, read_head, read_response  # noqa: E402

DEMO, MAX_LEN, NEW = EXAMPLES / "demo_model", 256, 20


@pytest.fixture(scope="module")
def make():
    model, tokenizer = Llama.from_directory(DEMO, torch.float32, "cpu", MAX_LEN), load_tokenizer(DEMO)

    def make(max_requests=16, step_tokens=48, num_pages=256, sharing=True):
        step = Step(
            model, num_pages=num_pages, page_size=16, kv_dtype=torch.float32, sizes={4, max_requests, step_tokens},
            max_requests=max_requests, max_pages=max_requests * 16, compiled=False,
        )  # fmt: skip
        return Engine(step, PagePool(num_pages, 16, sharing), max_len=MAX_LEN, tokenizer=tokenizer)

    return make


@pytest.fixture
def served(make):
    with RunningServer(make()) as server:
        yield server
        settle(server)


def settle(server, seconds=10.0):
    """All requests are gone and all pages free, at the latest a few steps from now."""
    end = time.monotonic() + seconds
    while server.engine.unfinished or server.engine.pool.used or server.server._queues:
        assert time.monotonic() < end, f"{server.engine.unfinished} requests, {server.engine.pool.used} pages in use"
        time.sleep(0.01)


def text_of(engine, prompt, **params):
    """The completion from an engine that runs nothing else."""
    request = engine.submit(engine.tokenizer.encode(prompt).ids, SamplingParams(**params))[0]
    run(engine)
    return engine.tokenizer.decode(request.output)


def body(prompt, **fields):
    return {"prompt": prompt, "max_tokens": NEW, "temperature": 0} | fields


# ------------------------------------------------------------------------------------------------ many clients


def test_64_clients(make):
    """Each has its own prompt and seed, half of them stream, a third hang up on another request first, pages are short."""
    common = "import os\n\n\nclass Path:\n"
    calls, alone = [], make(max_requests=1, step_tokens=128, sharing=False)
    for i in range(64):
        prompt = f"{common * (i % 4)}    def method_{i}(self, x):\n"
        fields = dict(temperature=0.0) if i % 2 else dict(temperature=0.9, top_k=40, top_p=0.95, seed=i)
        expected = text_of(alone, prompt, max_tokens=NEW + i % 5, **fields)
        calls.append((body(prompt, max_tokens=NEW + i % 5, stream=i % 4 < 2, **fields), expected))
    rng, texts = random.Random(7), {}

    async def hang_up(server, call):
        reader, writer = await server.open()
        writer.write(post_bytes(call | {"max_tokens": 100, "stream": True}))
        if patience := rng.randrange(4):
            assert (await read_head(reader))[0] == 200
            async for _ in read_chunks(reader):
                if (patience := patience - 1) == 0:
                    break
        writer.transport.abort()

    async def client(server, i):
        await asyncio.sleep(rng.random() * 0.05)
        call, _ = calls[i]
        if i % 3 == 0:
            await hang_up(server, call)
        reader, writer = await server.open()
        writer.write(post_bytes(call))
        response = await read_response(reader)
        writer.close()
        assert response.status == 200
        pieces = response.events if call["stream"] else [response.json]
        choices = [piece["choices"][0] for piece in pieces]
        assert [choice["finish_reason"] for choice in choices][-1] == "length"
        texts[i] = "".join(choice["text"] for choice in choices)

    with RunningServer(make(num_pages=24)) as server:

        async def all_clients():
            await asyncio.wait_for(asyncio.gather(*(client(server, i) for i in range(64))), 60)

        asyncio.run(all_clients())
        settle(server)
        stats = server.engine.stats
    assert [texts[i] for i in range(64)] == [expected for _, expected in calls]
    assert stats.preempted > 0 and stats.shared_tokens > 0 and stats.finished >= 64


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_its_pages(stream, served):
    """Long before the completion would have ended, and while it waits for its turn too."""

    async def client():
        reader, writer = await served.open()
        writer.write(post_bytes(body("def f(", max_tokens=240, n=40, stream=stream)))
        if stream:
            assert (await read_head(reader))[0] == 200
        while served.engine.pool.used == 0:
            await asyncio.sleep(0.002)
        writer.close()

    asyncio.run(client())
    settle(served)
    assert served.engine.stats.finished < 40
    assert served.post(body("def f(")).status == 200


def test_connections_are_kept(served):
    """Three requests one after the other, the second and the third sent before there is an answer."""
    calls = [body("x ="), body("y =", stream=True), body("z =", n=2)]

    async def client():
        reader, writer = await served.open()
        answers = []
        for batch in (calls[:1], calls[1:]):
            writer.write(b"".join(map(post_bytes, batch)))
            answers += [await read_response(reader) for _ in batch]
        writer.close()
        return answers

    first, second, third = asyncio.run(client())
    assert first.json["choices"][0]["text"] == served.post(calls[0]).json["choices"][0]["text"]
    text = "".join(event["choices"][0]["text"] for event in second.events)
    assert text == served.post(calls[1] | {"stream": False}).json["choices"][0]["text"]
    assert len({choice["text"] for choice in third.json["choices"]}) == 1  # greedy


def test_http_1_0(served):
    """The end of the connection ends the answer."""
    response = served.send(post_bytes(body("x =", stream=True), version="1.0"))
    assert response.headers["connection"] == "close" and "transfer-encoding" not in response.headers
    assert response.events[-1]["choices"][0]["finish_reason"] == "length"


# ------------------------------------------------------------------------------------------------ answers


def test_completion(served, make):
    """Choices, reasons and usage; prompts as texts and as tokens; the pieces of a stream make the same text."""
    engine = make()
    prompts = ["def f(", "class A:\n"]
    tokens = [engine.tokenizer.encode(prompt).ids for prompt in prompts]
    expected = [text_of(engine, prompt, max_tokens=NEW, temperature=0.0) for prompt in prompts]
    answer = served.post(body(prompts, n=2, user="me", best_of=None, echo=False)).json
    assert answer["object"] == "text_completion" and answer["model"] == "demo" and answer["id"].startswith("cmpl-")
    assert [choice["text"] for choice in answer["choices"]] == [expected[0]] * 2 + [expected[1]] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    prompt_tokens = sum(map(len, tokens))
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 4 * NEW, "total_tokens": prompt_tokens + 4 * NEW}
    assert answer["usage"] == usage
    assert [choice["text"] for choice in served.post(body(tokens)).json["choices"]] == expected
    assert served.post(body(tokens[1])).json["choices"][0]["text"] == expected[1]
    events = served.post(body(prompts, n=2, stream=True, stream_options={"include_usage": True})).events
    assert events[-1]["choices"] == [] and events[-1]["usage"] == usage
    pieces = [event["choices"][0] for event in events[:-1]]
    for i in range(4):
        mine = [piece for piece in pieces if piece["index"] == i]
        assert "".join(piece["text"] for piece in mine) == expected[i // 2] and len(mine) > 3
        assert [piece["finish_reason"] for piece in mine] == [None] * (len(mine) - 1) + ["length"]


def test_sampling_fields_are_heard(served, make):
    fields = dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02, seed=11, stop=["\n\n"], max_tokens=60)
    engine = make()
    request = engine.submit(
        engine.tokenizer.encode("def f(").ids,
        SamplingParams(60, 0.9, top_k=20, top_p=0.9, min_p=0.02, seed=11, stop=("\n\n",)),
    )[0]
    text = ""
    while engine.unfinished:
        text += "".join(event.text for event in engine.step())
    choice = served.post(body("def f(", **fields)).json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text, request.finish_reason)
    first = generate(engine, [engine.tokenizer.encode("def f(").ids], [SamplingParams(1, 0.0)])[0]
    ended = served.post(body("def f(", stop_token_ids=first)).json
    assert ended["choices"][0]["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == 1


def test_models_and_health(served):
    (model,) = served.get("/v1/models").json["data"]
    assert model["id"] == "demo" and model["max_model_len"] == MAX_LEN
    assert served.post(body("x", model="demo")).status == 200
    assert served.get("/health?x=1").json == {"status": "ok", "running": 0, "waiting": 0, "pages_used": 0, "pages": 256}


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("call", "status", "reason"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100000, 400, "not JSON"),
        (b"[]", 400, "must be a JSON object"),
        ({}, 400, "prompt is missing"),
        (body(""), 400, "the prompt has no tokens"),
        (body([]), 400, "prompt must be"),
        (body(["a", [1, "b"]]), 400, "prompt must be"),
        (body([1, 99999]), 400, "tokens from 0 to 2047"),
        (body("a", max_tokens=10**6), 400, "more than the 256 that a request can have"),
        (body("a", max_tokens=0), 400, "max_tokens must be at least 1, got 0"),
        (body("a", max_tokens=True), 400, "max_tokens must be an integer"),
        (body("a", temperature="hot"), 400, "temperature must be a number"),
        (body("a", temperature=float("nan")), 400, "temperature must be from 0"),
        (body("a", top_p=2), 400, "top_p must be above 0 and at most 1"),
        (body("a", n=0), 400, "n must be an integer from 1"),
        (body(["a"] * 65, n=2), 400, "65 prompts of 2 choices are more than 128"),
        (body("a", stop=[""]), 400, "stop must be strings that are not empty"),
        (body("a", stop=[1]), 400, "stop must be a string"),
        (body("a", stream_options={"usage": True}), 400, "stream_options must be"),
        (body("a", logprobs=3), 400, "logprobs is not supported"),
        (body("a", presence_penalty=0.5), 400, "presence_penalty is not supported"),
        (body("a", topk=3), 400, "unknown field 'topk'"),
        (body("a", model="gpt-5"), 404, "no model 'gpt-5'; this server has 'demo'"),
    ],
    ids=str,
)
def test_bad_completions(call, status, reason, served):
    response = served.post(call)
    assert response.status == status and reason in response.json["error"]["message"]
    assert response.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"GET /v1 HTTP/1.1\r\n\r\n", 404, "there is nothing at /v1; try /v1/completions"),
        (b"GET /v1/completions HTTP/1.1\r\n\r\n", 405, "/v1/completions takes POST, not GET"),
        (b"hello\r\n\r\n", 400, "not HTTP/1.1"),
        (b"GET / HTTP/2\r\n\r\n", 505, "HTTP/2 is not spoken here"),
        (b"POST /v1/completions HTTP/1.1\r\n\r\n", 411, "Content-Length"),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411, "Content-Length"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400, "must be a number of bytes, got -1"),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 1048577\r\n\r\n", 413, "are more than 1048576"),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 40000 + b"\r\n\r\n", 431, "longer than 32768 bytes"),
    ],
    ids=["404", "405", "400", "505", "411", "411 chunked", "400 length", "413", "431"],
)
def test_bad_http(data, status, reason, served):
    response = served.send(data)
    assert response.status == status and reason in response.json["error"]["message"]
    assert served.get("/health").status == 200


def test_full(make):
    """One more than fits is told to come back; what fits is answered."""
    with RunningServer(make(), max_unfinished=4) as server:
        assert server.post(body("a", n=5)).status == 429
        response = server.post(body(["a", "b"], n=3))
        assert response.status == 429 and "the server is full" in response.json["error"]["message"]
        assert response.headers["retry-after"] == "1"
        assert server.post(body("a", n=4)).status == 200
        settle(server)


def test_one_bad_prompt_takes_none(served):
    """The engine gets all of a call's requests, or keeps none of them."""
    assert served.post(body(["a", [5000]])).status == 400
    settle(served)


def test_a_fault_of_the_engine_is_told(make, capfd):
    """Who waits gets an error, also in the middle of a stream; the server refuses from then on."""
    engine = make()
    steps = iter(range(3))
    working = engine.step_fn.__class__.__call__

    class Failing(Step):
        def __call__(self, rows):
            if next(steps, None) is None:
                raise RuntimeError("the device is lost")
            return working(self, rows)

    engine.step_fn.__class__ = Failing
    with RunningServer(engine) as server:

        async def both():
            connections = [await server.open() for _ in range(2)]
            for (_, writer), stream in zip(connections, (False, True), strict=True):
                writer.write(post_bytes(body("a", stream=stream)))
            return [await read_response(reader) for reader, _ in connections]

        whole, stream = asyncio.run(both())
        assert whole.status == 503 and "the engine has stopped" in whole.json["error"]["message"]
        assert stream.status in (200, 503) and b"the engine has stopped" in stream.body
        assert server.post(body("a")).status == 503 and server.get("/health").status == 503
    assert "the device is lost" in capfd.readouterr().err


def test_the_server_as_a_program():
    """Starts on a free port, answers, and ends on SIGINT while a request runs."""
    arguments = ["--port", "0", "--eager", "--device", "cpu", "--pages", "64", "--max-requests", "4"]
    command = [sys.executable, str(EXAMPLES / "serve.py"), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        line = next(line for line in program.stderr if "serving" in line)
        server = RunningServer.__new__(RunningServer)
        server.host, server.port = "127.0.0.1", int(line.split("127.0.0.1:")[1].split("/")[0])
        assert "demo_model" in line and server.post(body("a")).status == 200

        async def leave_it_running():
            reader, writer = await server.open()
            writer.write(post_bytes(body("a", max_tokens=900, stream=True)))
            await read_head(reader)
            program.send_signal(2)
            await reader.read()
            writer.close()

        asyncio.run(leave_it_running())
        assert program.wait(20) == 0 and "stopping" in program.stderr.read()
