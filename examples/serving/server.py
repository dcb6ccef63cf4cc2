"""The HTTP endpoint: `/v1/completions`, `/v1/models`, `/health`, in the shape of OpenAI's API.

Requests are read and answered on an asyncio loop; the engine runs in its own thread. A client that closes its connection takes its
requests out of the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from functools import partial

from . import api
from .engine import Engine, Event, Request
from .wire import IDLE_SECONDS, Connection, HTTPError, HTTPRequest
from .worker import Stopped, Worker


class _Full(Exception):
    """More requests than the engine shall hold."""


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Server:
    """An engine's HTTP endpoint.

    Args:
        engine: with a tokenizer; from now on this server's alone.
        model_name: what `/v1/models` says; a request for another model is refused.
        max_unfinished: requests in the engine at the most, waiting ones included; more are refused with 429.
        on_step: called in the engine's thread after each step.
    """

    def __init__(
        self,
        engine: Engine,
        model_name: str,
        max_unfinished: int = 1024,
        on_step: Callable[[], object] = lambda: None,
    ) -> None:
        self.engine, self.model_name, self.max_unfinished = engine, model_name, max_unfinished
        self._on_step, self._created = on_step, int(time.time())
        self._queues: dict[Request, asyncio.Queue] = {}
        self._tasks: set[asyncio.Task] = set()
        self._routes = {
            "/v1/completions": ("POST", self._completions),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._health),
        }

    async def start(self, host: str, port: int) -> tuple[str, int]:
        """Listen; the address, with the port that was free where port is 0."""
        loop = asyncio.get_running_loop()
        self._worker = Worker(
            self.engine, lambda events: loop.call_soon_threadsafe(self._deliver, events), self._on_step
        )
        self._listener = await loop.create_server(lambda: Connection(self._serve), host, port, backlog=1024)
        return self._listener.sockets[0].getsockname()[:2]

    async def stop(self) -> None:
        """Refuse new connections, end those there are, stop the engine."""
        self._listener.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self._worker.stop)

    # ---- one connection ----

    async def _serve(self, connection: Connection) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._serve_one(connection):
                pass
        except (ClientGone, ConnectionError, TimeoutError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # there is nobody to answer, or the server stops
        finally:
            self._tasks.discard(task)
            with contextlib.suppress(ConnectionError):
                connection.writer.close()

    async def _serve_one(self, connection: Connection) -> bool:
        """Answer a request; whether the connection stays."""
        keep = False
        try:
            request = await asyncio.wait_for(connection.read_request(), IDLE_SECONDS)
            if request is None:
                return False
            keep = request.keep_alive
            if request.path not in self._routes:
                raise HTTPError(404, f"there is nothing at {request.path}; try {', '.join(self._routes)}")
            method, answer = self._routes[request.path]
            if request.method != method:
                raise HTTPError(405, f"{request.path} takes {method}, not {request.method}", {"Allow": method})
            await answer(connection, request)
        except HTTPError as error:
            keep &= not error.close
            connection.send_json(
                error.status, api.error_body(error.status, error.message), error.headers, close=not keep
            )
        await connection.writer.drain()
        return keep

    async def _health(self, connection: Connection, request: HTTPRequest) -> None:
        engine, alive = self.engine, self._worker.alive
        body = {"status": "ok" if alive else "stopped", "running": len(engine.running), "waiting": len(engine.waiting)}
        body |= {"pages_used": engine.pool.used, "pages": engine.pool.num_pages}
        connection.send_json(200 if alive else 503, body, close=not request.keep_alive)

    async def _models(self, connection: Connection, request: HTTPRequest) -> None:
        model = {"id": self.model_name, "object": "model", "created": self._created, "owned_by": "fi_ops"}
        body = {"object": "list", "data": [model | {"max_model_len": self.engine.max_len}]}
        connection.send_json(200, body, close=not request.keep_alive)

    # ---- completions ----

    async def _completions(self, connection: Connection, http: HTTPRequest) -> None:
        call = api.parse_completion(http.body)
        if call.model not in (None, self.model_name):
            raise HTTPError(404, f"there is no model {call.model!r}; this server has {self.model_name!r}")
        prompts = await asyncio.to_thread(lambda: [self._tokens(prompt) for prompt in call.prompts])
        queue: asyncio.Queue = asyncio.Queue()
        requests: list[Request] = []
        connection.on_gone = partial(queue.put_nowait, ClientGone())
        try:
            await self._submit(prompts, call, requests, queue)
            if connection.gone:
                raise ClientGone
            prompt_tokens = sum(map(len, prompts))
            await (self._stream if call.stream else self._answer)(
                connection, http, call, requests, queue, prompt_tokens
            )
        finally:
            connection.on_gone = lambda: None
            self._worker.call(partial(self._withdraw, requests))

    def _tokens(self, prompt: api.Prompt) -> list[int]:
        return self.engine.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt

    async def _submit(
        self, prompts: list[list[int]], call: api.CompletionCall, requests: list[Request], queue: asyncio.Queue
    ) -> None:
        """Put all of the call's requests into the engine, and into `requests`; their events go to the queue."""

        def submit() -> None:  # in the engine's thread: no event can come before its queue is known
            if self.engine.unfinished + len(prompts) * call.n > self.max_unfinished:
                raise _Full
            for prompt in prompts:
                for request in self.engine.submit(prompt, call.params, call.n):
                    self._queues[request] = queue
                    requests.append(request)

        try:
            await asyncio.wrap_future(self._worker.call(submit))
        except ValueError as error:
            raise HTTPError(400, str(error)) from None
        except _Full:
            raise HTTPError(429, "the server is full; try again later", {"Retry-After": "1"}) from None
        except Stopped as error:
            raise HTTPError(503, str(error), close=True) from None

    def _withdraw(self, requests: list[Request]) -> None:
        """Take out of the engine what is not finished, in its thread."""
        for request in requests:
            self.engine.cancel(request)
            self._queues.pop(request, None)

    async def _answer(self, connection, http, call, requests, queue, prompt_tokens: int) -> None:
        """The whole text of all choices at once."""
        texts: dict[Request, list[str]] = {request: [] for request in requests}
        try:
            async for event in _events(queue, len(requests)):
                texts[event.request].append(event.text)
        except Stopped as error:
            raise HTTPError(503, str(error), close=True) from None
        choices = [api.choice(i, "".join(texts[r]), r.finish_reason) for i, r in enumerate(requests)]
        totals = api.usage(prompt_tokens, sum(r.output_len for r in requests))
        connection.send_json(200, api.Answer(self.model_name).body(choices, totals), close=not http.keep_alive)

    async def _stream(self, connection, http, call, requests, queue, prompt_tokens: int) -> None:
        """Pieces of text as they come, as server-sent events."""
        answer, index = api.Answer(self.model_name), {request: i for i, request in enumerate(requests)}
        send = connection.begin_events(http)
        try:
            async for event in _events(queue, len(requests)):
                if event.text or event.finish_reason:
                    piece = api.choice(index[event.request], event.text, event.finish_reason)
                    send(json.dumps(answer.body([piece])))
                    await connection.writer.drain()
            if call.include_usage:
                totals = api.usage(prompt_tokens, sum(r.output_len for r in requests))
                send(json.dumps(answer.body([], totals)))
            send("[DONE]")
        except Stopped as error:
            send(json.dumps(api.error_body(503, str(error))))
        send("")

    def _deliver(self, events: list[Event] | None) -> None:
        """Events of a step to those who wait for them."""
        if events is None:
            for waiting in set(self._queues.values()):
                waiting.put_nowait(Stopped("the engine has stopped"))
            return
        for event in events:
            if queue := self._queues.get(event.request):
                queue.put_nowait(event)


async def _events(queue: asyncio.Queue, unfinished: int) -> AsyncIterator[Event]:
    """Events until all requests are finished."""
    while unfinished:
        event = await queue.get()
        if isinstance(event, Exception):
            raise event
        unfinished -= event.finish_reason is not None
        yield event
