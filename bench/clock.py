"""Timing a candidate on a device: the host's clock on the CPU; on CUDA, replays of a captured graph between events.

A clock's `prepare(candidate, seconds)` returns a turn: a function that runs the candidate for about `seconds` and returns
the seconds of one call. Calls go over the candidate's inputs in rotation; more of them than the caches hold keep every
call cold.

On CUDA a graph of many calls is captured once and replayed, so that launches from Python are not what is measured; what
can't be captured (it waits for the device, or is a CUDA graph itself) is called in a loop. Either way an untimed run goes
first, so that the device is still busy when the first event and the calls behind it are queued.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

CALLS_A_GRAPH = 256


class HostClock:
    """Wall time around a loop of calls."""

    def seconds(self, fn: Callable[[], object], count: int = 1) -> float:
        """Of one call, over `count` of them."""
        began = time.perf_counter()
        for _ in range(count):
            fn()
        return (time.perf_counter() - began) / count

    def finish(self) -> None:
        """Wait until all queued work is done (an error of it is raised here)."""

    def prepare(self, candidate: Any, seconds: float) -> Callable[[], float]:
        call = in_rotation(candidate)
        call()
        count = max(1, min(1000, int(seconds / max(self.seconds(call), 1e-7))))
        return lambda: self.seconds(call, count)


class CudaClock:
    """Device time between two events."""

    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.side_stream = torch.cuda.Stream()
        # Scratch of all graphs, which never run at once; a pool lives as long as one graph of it does.
        self.pool = torch.cuda.graph_pool_handle()
        self.anchor = self._graph(lambda: torch.ones(1, device="cuda"), 1)

    def seconds(self, fn: Callable[[], object], count: int = 1) -> float:
        """Of one call, over `count` of them, after one that is not timed."""
        fn()
        self.start.record()
        for _ in range(count):
            fn()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3 / count

    def finish(self) -> None:
        torch.cuda.synchronize()

    def prepare(self, candidate: Any, seconds: float) -> Callable[[], float]:
        call, copies = in_rotation(candidate), len(candidate.inputs)
        once = max(self.seconds(call, 3), 1e-6)
        if not candidate.capture or self._waits_for_the_device(call):
            count = max(1, min(1000, int(seconds / once)))
            return lambda: self.seconds(call, count)
        rounds = max(1, round(min(seconds / once, CALLS_A_GRAPH) / copies))
        graph = self._graph(in_rotation(candidate), rounds * copies)
        replays = max(1, round(seconds / (once * rounds * copies)))
        return lambda: self.seconds(graph.replay, replays) / (rounds * copies)

    @staticmethod
    def _waits_for_the_device(call: Callable[[], object]) -> bool:
        """Whether a call synchronises, which a capture forbids (a capture that fails breaks torch's random numbers)."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return False

    def _graph(self, call: Callable[[], object], count: int) -> torch.cuda.CUDAGraph:
        """`count` calls as one graph. (`torch.cuda.graph` empties torch's cache each time: too slow for hundreds of graphs.)"""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.side_stream):
            call()  # what libraries and compiled code keep for a stream is made now
            torch.cuda.synchronize()
            graph.capture_begin(pool=self.pool)
            try:
                for _ in range(count):
                    call()
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return graph


def clock_of(device: str) -> HostClock | CudaClock:
    return CudaClock() if device == "cuda" else HostClock()


def in_rotation(candidate: Any) -> Callable[[], object]:
    """The candidate as a call without arguments, over its inputs in turn."""
    fn, turns = candidate.fn, itertools.cycle(candidate.inputs)
    return lambda: fn(*next(turns))
