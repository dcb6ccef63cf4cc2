"""Continuous batching: requests arrive and leave at any step, each step takes tokens of as many of them as fit.

A step has at most `step_tokens` tokens: one of each request that decodes, then chunks of prompts, the oldest first. A request
gets the pages of its whole prompt when it starts, and one more whenever it needs it; where none is left the request that
started last gives its pages back and starts again later, with what it has generated as part of its prompt. It goes on with the
same tokens: a draw depends on its request's seed and its place in the output alone.

Nothing here knows threads: `submit`, `cancel` and `step` are called from one.
"""

from __future__ import annotations

import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .pages import ROOT, PagePool
from .step import Row, Step
from .text import TextStream


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled; temperature 0 is greedy. ValueError for what makes no sense."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0  # 0: no filter
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None  # None: a random one
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        limits = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            "top_k": (0 <= self.top_k < 2**31, "0 (no filter) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "seed": (self.seed is None or -(2**63) <= self.seed < 2**63, "an integer of 64 bits"),
            "stop": (all(self.stop), "strings that are not empty"),
        }
        for name, (good, wanted) in limits.items():
            if not good:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")


@dataclass(eq=False)
class Request:
    """One completion that is under way."""

    prompt_len: int
    params: SamplingParams
    tokens: list[int]  # the prompt, then what was generated
    seed: int
    text: TextStream | None = None
    leader: Request | None = None  # has the same prompt, and computes it for both
    pages: array = field(default_factory=lambda: array("i"))
    computed: int = 0  # tokens whose keys and values are in the pages
    learnt: int = 0  # whole pages that are in the pool's index
    node: int = ROOT  # of the last of them
    started: bool = False  # its whole prompt has been computed once
    finish_reason: str | None = None

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len


@dataclass(frozen=True)
class Event:
    """What a step did for a request: a token (None: cancelled), its text, and at the end why."""

    request: Request
    token: int | None
    text: str
    finish_reason: str | None


@dataclass
class Stats:
    steps: int = 0
    prompt_tokens: int = 0  # of prompts that started (again, after a preemption)
    shared_tokens: int = 0  # of these, found in the cache
    computed_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    preempted: int = 0
    busy_seconds: float = 0.0


class Engine:
    """Requests over one model.

    Args:
        step: the compiled step and its caches.
        pool: its pages.
        max_len: tokens of a request, prompt and output.
        eos_token_ids: end a completion.
        tokenizer: makes text of tokens; None: tokens alone.
    """

    def __init__(
        self, step: Step, pool: PagePool, *, max_len: int, eos_token_ids: Sequence[int] = (), tokenizer: Any = None
    ) -> None:
        self.step_fn, self.pool, self.max_len, self.tokenizer = step, pool, max_len, tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_requests, self.step_tokens = step.max_requests, step.sizes[-1]
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the one that started first stands first
        self.stats = Stats()
        if self.step_tokens < self.max_requests:
            raise ValueError(f"a step of {self.step_tokens} tokens can't hold {self.max_requests} requests")

    @property
    def unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    # ---- requests ----

    def submit(self, prompt: Sequence[int], params: SamplingParams, count: int = 1) -> list[Request]:
        """Queue `count` completions of a prompt (seeds count up). ValueError for what can never run."""
        if not prompt:
            raise ValueError("the prompt has no tokens")
        vocab_size = self.step_fn.model.config.vocab_size
        if not all(0 <= token < vocab_size for token in (*prompt, *params.stop_token_ids)):
            raise ValueError(f"the prompt and stop_token_ids must be tokens from 0 to {vocab_size - 1}")
        longest = min(self.max_len, self.pool.num_pages * self.pool.page_size)
        if len(prompt) + params.max_tokens > longest:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and max_tokens {params.max_tokens} are more than the {longest} that a request "
                "can have; shorten one of them"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; pass stop_token_ids")
        seed = int.from_bytes(os.urandom(7), "little") if params.seed is None else params.seed
        requests: list[Request] = []
        for i in range(count):
            text = TextStream(self.tokenizer, prompt, params.stop) if self.tokenizer else None
            request = Request(len(prompt), params, list(prompt), (seed + i + 2**63) % 2**64 - 2**63, text)
            request.leader = requests[0] if requests else None
            requests.append(request)
        self.waiting += requests
        return requests

    def cancel(self, request: Request) -> None:
        """Forget a request; nothing happens where it is finished."""
        if request.finish_reason is None:
            request.finish_reason = "cancelled"
            if request in self.running:
                self._leave(request)
            else:
                self.waiting.remove(request)

    # ---- one step ----

    def step(self) -> list[Event]:
        """Run one step; nothing where no request is left."""
        began = time.monotonic()
        work, copies = self._schedule()
        if not work:
            return []
        if copies:
            self.step_fn.copy_pages(copies)
            self.pool.release([source for source, _ in copies])
        sampled = self.step_fn([self._row(request, count) for request, count in work])
        events = []
        for (request, count), token in zip(work, sampled, strict=True):
            request.computed += count
            self.stats.computed_tokens += count
            if request.computed == len(request.tokens):
                events.append(self._extend(request, token))
            else:
                self._learn(request)
        self.stats.steps += 1
        self.stats.busy_seconds += time.monotonic() - began
        return events

    def _row(self, request: Request, count: int) -> Row:
        p, begin, end = request.params, request.computed, request.computed + count
        return Row(
            request.tokens[begin:end], request.pages[: self.pool.pages_for(end)], end, p.temperature, p.top_k, p.top_p, p.min_p,
            request.seed, request.output_len,
        )  # fmt: skip

    def _schedule(self) -> tuple[list[tuple[Request, int]], list[tuple[int, int]]]:
        """(request, how many of its tokens) for each row of the next step; pages to copy before."""
        work: list[tuple[Request, int]] = []
        for request in list(self.running):
            one_left = request.computed == len(request.tokens) - 1
            if one_left and request in self.running and self._grow(request):
                work.append((request, 1))
        budget, scheduled = self.step_tokens - len(work), {id(request) for request, _ in work}

        def take(request: Request) -> None:
            nonlocal budget
            count = min(budget, len(request.tokens) - request.computed)
            if count > 0:
                work.append((request, count))
                budget -= count

        for request in self.running:
            if id(request) not in scheduled:
                take(request)
        copies: list[tuple[int, int]] = []
        for request in list(self.waiting):
            if budget == 0 or len(self.running) == self.max_requests:
                break
            if request.leader and not request.leader.started and request.leader.finish_reason is None:
                continue
            if not self._start(request, copies):
                break
            take(request)
        return work, copies

    def _start(self, request: Request, copies: list[tuple[int, int]]) -> bool:
        """Give a waiting request its pages, those that hold its prompt's beginning where there are any."""
        found = self.pool.match(request.tokens)
        missing = self.pool.pages_for(len(request.tokens)) - len(found.pages)
        self.pool.retain(found.pages)
        if found.fork is not None:
            self.pool.retain([found.fork])
            if missing > self.pool.available:  # it may be the very page that is missing
                self.pool.release([found.fork])
                found.fork, found.fork_len = None, 0
        if missing > self.pool.available:
            self.pool.release(found.pages)
            return False
        request.pages.extend(found.pages)
        request.pages.extend(self.pool.allocate(missing))
        if found.fork is not None:
            copies.append((found.fork, request.pages[len(found.pages)]))  # its reference goes when it is copied
        request.node, request.learnt = found.node, len(found.pages)
        request.computed = len(found.pages) * self.pool.page_size + found.fork_len
        self.stats.prompt_tokens += len(request.tokens)
        self.stats.shared_tokens += request.computed
        self.waiting.remove(request)
        self.running.append(request)
        return True

    def _grow(self, request: Request) -> bool:
        """A page for the request's next token where it needs one. False: it had to give its own back."""
        while self.pool.pages_for(request.computed + 1) > len(request.pages):
            if self.pool.available:
                request.pages.extend(self.pool.allocate(1))
                continue
            last = self.running[-1]
            self._leave(last)
            self.waiting.appendleft(last)
            self.stats.preempted += 1
            if last is request:
                return False
        return True

    def _leave(self, request: Request) -> None:
        """Give back a running request's pages. What they hold stays known until they are given away."""
        self._learn(request, partly=True)
        self.pool.release(request.pages)
        self.running.remove(request)
        request.pages, request.computed, request.learnt, request.node = array("i"), 0, 0, ROOT

    def _learn(self, request: Request, partly: bool = False) -> None:
        """Put pages that have become full into the pool's index, and the last one, as far as it is."""
        size, begin = self.pool.page_size, request.learnt * self.pool.page_size
        while begin + size <= request.computed:
            page = request.pages[request.learnt]
            request.node = self.pool.learn(page, request.node, request.tokens[begin : begin + size])
            request.learnt, begin = request.learnt + 1, begin + size
        if partly and begin < request.computed:
            self.pool.learn(request.pages[request.learnt], request.node, request.tokens[begin : request.computed])

    def _extend(self, request: Request, token: int) -> Event:
        """Append a sampled token, and see whether it was the last."""
        self._learn(request, partly=not request.started)
        request.started = True
        request.tokens.append(token)
        self.stats.generated_tokens += 1
        params, text, reason = request.params, "", None
        if token in params.stop_token_ids or (token in self.eos_token_ids and not params.ignore_eos):
            reason = "stop"
        elif request.text:
            text = request.text.push(token)
            reason = "stop" if request.text.stopped else None
        if reason is None and request.output_len == params.max_tokens:
            reason = "length"
        if reason:
            if request.text:
                text += request.text.finish()
            request.finish_reason = reason
            self.stats.finished += 1
            self._leave(request)
        return Event(request, token, text, reason)


def generate(engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]) -> list[list[int]]:
    """The output tokens of each prompt, all in flight together."""
    requests = [engine.submit(prompt, p)[0] for prompt, p in zip(prompts, params, strict=True)]
    run(engine)
    return [request.output for request in requests]


def run(engine: Engine, each: Callable[[list[Event]], object] = lambda events: None) -> None:
    """Step until nothing is left."""
    while engine.unfinished:
        each(engine.step())
