"""The body of `POST /v1/completions`, in the shape of OpenAI's API: what is taken, what is refused, what comes back.

Beyond OpenAI's fields: `top_k`, `min_p`, `stop_token_ids`, `ignore_eos`, as vLLM names them.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .engine import SamplingParams
from .wire import HTTPError

MOST_CHOICES, MOST_STOPS = 128, 16
Prompt = str | list[int]


@dataclass(frozen=True)
class CompletionCall:
    prompts: list[Prompt]
    params: SamplingParams
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    model: str | None = None


@dataclass
class Answer:
    """What names a completion in all its pieces."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, choices: list[dict], usage: dict | None = None) -> dict:
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return head | {"choices": choices} | ({} if usage is None else {"usage": usage})


def choice(index: int, text: str, finish_reason: str | None) -> dict:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}


def usage(prompt_tokens: int, completion_tokens: int) -> dict:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def error_body(status: int, message: str) -> dict:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


# ------------------------------------------------------------------------------------------------ what is taken


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_int, value))


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (_is_tokens(value) and len(value) > 0)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda v: isinstance(v, str), "a string"),
    "prompt": (
        lambda v: _is_prompt(v) or (isinstance(v, list) and len(v) > 0 and all(map(_is_prompt, v))),
        "a string, a list of tokens, or a list of these",
    ),
    "max_tokens": (_is_int, "an integer"),
    "temperature": (_is_number, "a number"),
    "top_p": (_is_number, "a number"),
    "top_k": (_is_int, "an integer"),
    "min_p": (_is_number, "a number"),
    "seed": (_is_int, "an integer"),
    "stop": (lambda v: isinstance(v, str) or (_is_texts(v) and len(v) <= MOST_STOPS), "a string or a few of them"),
    "stop_token_ids": (_is_tokens, "a list of tokens"),
    "ignore_eos": (lambda v: isinstance(v, bool), "true or false"),
    "n": (lambda v: _is_int(v) and 1 <= v <= MOST_CHOICES, f"an integer from 1 to {MOST_CHOICES}"),
    "stream": (lambda v: isinstance(v, bool), "true or false"),
    "stream_options": (lambda v: isinstance(v, dict) and set(v) <= {"include_usage"}, "{include_usage: true or false}"),
    "user": (lambda v: isinstance(v, str), "a string"),
}
# Fields of the API that change the answer in ways this engine can't: refused, unless they ask for nothing.
NEUTRAL: dict[str, tuple] = {
    "best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0,),
    "frequency_penalty": (0,),
}  # fmt: skip


def parse_completion(body: bytes) -> CompletionCall:
    """HTTPError 400 with the reason for what is not a request that can be answered as it says."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPError(400, "the body is not JSON") from None
    if not isinstance(given, dict):
        raise HTTPError(400, "the body must be a JSON object")
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise HTTPError(400, f"{name} is not supported; leave it out")
        elif name not in FIELDS:
            raise HTTPError(400, f"unknown field {name!r}")
        elif not FIELDS[name][0](value):
            raise HTTPError(400, f"{name} must be {FIELDS[name][1]}")
    if "prompt" not in given:
        raise HTTPError(400, "prompt is missing")
    prompt, stop = given["prompt"], given.get("stop", [])
    prompts = prompt if isinstance(prompt, list) and not _is_int(prompt[0]) else [prompt]
    n = given.get("n", 1)
    if len(prompts) * n > MOST_CHOICES:
        raise HTTPError(400, f"{len(prompts)} prompts of {n} choices are more than {MOST_CHOICES}; send fewer")
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos")
    try:
        params = SamplingParams(
            **{name: given[name] for name in names if name in given},
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(given.get("stop_token_ids", ())),
        )
    except ValueError as error:
        raise HTTPError(400, str(error)) from None
    include_usage = bool(given.get("stream_options", {}).get("include_usage", False))
    return CompletionCall(prompts, params, n, given.get("stream", False), include_usage, given.get("model"))
