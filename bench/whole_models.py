"""Compiling a whole model's step for a bench: stock `torch.compile`, or the same with fi_ops enabled for that compile alone."""

from __future__ import annotations

import contextlib
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
import torch._dynamo.utils

import fi_ops

from . import stock


def compiled_step(step: Callable, arguments: tuple, ours: bool, mode: str | None) -> Callable[[], object]:
    """The compiled step as a call without arguments. It is compiled, and run once, here.

    An error of the compile is raised by each call instead: it becomes a row of the table, and the other one is still timed.
    """
    compiled = torch.compile(stock.own_code(step), dynamic=False, fullgraph=True, mode=mode)

    def call():
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*arguments)

    how = "with fi_ops" if ours else "as it is"
    skips, began = _graph_skips(), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fi_ops.enable")
            with fi_ops.enabled() if ours else contextlib.nullcontext():
                call()
    except Exception as error:
        traceback.print_exc()
        return partial(_raise, error)
    print(f"  compiled {how} in {time.perf_counter() - began:.0f} s", flush=True)
    if _graph_skips() > skips:
        print(f"  CUDA GRAPHS SKIPPED {how}: see torch's message", flush=True)
    return call


def _raise(error: Exception) -> None:
    raise error


def _graph_skips() -> int:
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def rewritten() -> Counter:
    """A copy of the counts of sites, by kind and by kind and grade; only fresh compiles count (`docs/rewrites.md`)."""
    return Counter(torch._dynamo.utils.counters["fi_ops"])
