"""One way to time: candidates take turns in one process, each is checked first, and the machine's ceiling stands beside.

A bench yields `Case`s: the same job done by several `Candidate`s, its least cost (`fi_ops.library.Cost`), and a check of
an output against a reference of higher precision. `run` checks every candidate, says what is wrong, which is not timed, and times
the others in turns: a turn calls one candidate for about `turn` seconds (`clock.py` says how), so that drift of the machine
(clocks, neighbours) falls on all alike. Reported: the median over turns, the spread (half the distance between the quartiles),
and the percentage of what this machine reached between the same turns for reading memory or multiplying matrices in torch,
whichever bounds the job ("x floor" is its inverse). The best turn stands there too: on a machine that others use it says more
than the median, and the header says how loaded it was. Ours is marked SLOWER where the best peer's median is lower by more than
the spread (and by more than 1%: replays of a graph hardly spread at all).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fi_ops.library import Cost

from .clock import CudaClock, HostClock, clock_of
from .kernels import print_kernels
from .machine import Ceilings
from .output import Report, Row, print_brief, print_rows

NAN = float("nan")
# A candidate that has taken this many times the time of all its turns gets no more than these: one call of a slow peer can take
# longer than all turns of ours.
SLOW, FEW_TURNS = 4, 5


@dataclass
class Candidate:
    """One way to do a job: `fn` over the argument tuples of `inputs` in turn; returns the output."""

    name: str
    fn: Callable[..., object]
    ours: bool = False
    inputs: Sequence[tuple] = ((),)
    capture: bool = True  # on CUDA: time it as a captured graph (False: it is one, or the launch is what is measured)
    rewind: Callable[[], object] | None = None  # not timed: before the check, and before each turn


@dataclass
class Case:
    """One job. `check(output)` returns "ok" or what is wrong; all candidates that are not ours are peers to beat."""

    name: str
    candidates: list[Candidate]
    cost: Cost | None = None
    check: Callable[[object], str] | None = None
    dtype: torch.dtype = torch.float32
    unit: str = "us"
    turn: float = 0.0  # seconds of a turn at the least
    series: str = ""
    length: float = NAN
    brief: bool = False  # one line on the screen
    family: str = ""  # of a bench with several tables: which
    target_us: float = NAN  # what ours is to take at the most


@dataclass
class Options:
    """What the command line sets."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    threads: int | None = None
    quick: bool = False
    full: bool = False
    batch: int | None = None
    length: int | None = None
    vocab: int | None = None
    only: str | None = None
    family: str | None = None
    seconds: float | None = None
    compiled: bool = True
    turns: int = 15
    turn: float = 0.03
    warm: bool = False
    kernels: bool = False
    left_out: list[str] = field(default_factory=list)  # what a bench had no time for

    def pick(self, default: torch.dtype) -> torch.dtype:
        return self.dtype or default


# ------------------------------------------------------------------------------------------------ inputs and checks


def copies_beyond_caches(arguments: tuple, nbytes: int, beyond: int = 2**28, *, at_most: int = 2**20) -> list[tuple]:
    """`arguments` and as many copies of their tensors as are `beyond` bytes together (256 MiB), `at_most` in all.

    `nbytes`: what a call reads of them.
    """
    count = min(at_most, max(1, -(-beyond // max(nbytes, 1))))
    clones = [tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments) for _ in range(count - 1)]
    return [arguments, *clones]


def within_budget(
    expected: torch.Tensor, same_dtype: torch.Tensor, part: Callable = lambda t: t
) -> Callable[[object], str]:
    """Check by the package's error budget: at most twice the error of stock torch in the same dtype, plus a rounding."""
    from fi_ops.testing import deviation

    def check(output) -> str:
        try:
            result = deviation(part(output), expected, same_dtype)
        except AssertionError as error:  # another shape, or infinities where there are none
            return str(error)
        return "ok" if result.ok else f"error {result.error:.2g} over budget {result.limit:.2g}"

    return check


# ------------------------------------------------------------------------------------------------ the run


def run(bench: str, cases: Iterable[Case], options: Options, report: Report) -> None:
    """Check, time and print each case as it is done."""
    clock = clock_of(options.device)
    for case in cases:
        checks = {id(candidate): _check(case, candidate, clock) for candidate in case.candidates}
        if options.warm:
            print("\n".join(f"{c.name}: {checks[id(c)]}" for c in case.candidates), flush=True)
            continue
        if options.kernels:
            for c in case.candidates:
                print_kernels(f"{case.name}, {c.name}", lambda c=c: c.fn(*c.inputs[0]), c.rewind or (lambda: None))
            continue
        name = f"{bench}_{case.family}" if case.family else bench
        rows = _timed(name, case, checks, clock, options)
        report.rows += rows
        (report.show or (print_brief if case.brief else print_rows))(rows)
        report.save()


def _check(case: Case, candidate: Candidate, clock: HostClock | CudaClock) -> str:
    """Run it once: "ok", what is wrong, or "fails: ..."; a peer that can't do the job is a row too."""
    try:
        if candidate.rewind:
            candidate.rewind()
        output = candidate.fn(*candidate.inputs[0])
        clock.finish()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        if not candidate.ours and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return "fails: does not compile"
        return f"fails: {type(error).__name__}" + (f": {lines[0][:200]}" if candidate.ours else "")
    return case.check(output) if case.check else "-"


def _timed(bench: str, case: Case, checks: dict[int, str], clock: HostClock | CudaClock, options: Options) -> list[Row]:
    seconds, turns = (
        max(options.turn, case.turn),
        max(5, options.turns // 3) if options.quick else max(2, options.turns),
    )
    take_turn, times = {}, {}
    for candidate in case.candidates:
        if checks[id(candidate)] not in ("ok", "-"):
            continue
        try:
            take_turn[id(candidate)] = clock.prepare(candidate, seconds)
            times[id(candidate)] = []
        except Exception as error:
            checks[id(candidate)] = f"fails when timed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    ceilings = Ceilings(options.device, case.dtype, clock)
    spent = dict.fromkeys(times, 0.0)
    for turn in range(turns):
        ceilings.probe(ceilings.bound(case.cost or Cost(0))[0])
        for candidate in case.candidates:
            key = id(candidate)
            if key not in times or (turn >= FEW_TURNS and spent[key] > SLOW * turns * seconds):
                continue
            if candidate.rewind:
                candidate.rewind()
            began = time.perf_counter()
            times[key].append(take_turn[key]())
            spent[key] += time.perf_counter() - began
    peers = {c.name: times[id(c)] for c in case.candidates if not c.ours and id(c) in times}
    best = min(peers, key=lambda name: statistics.median(peers[name]), default=None)
    rows = []
    for candidate in case.candidates:
        row = Row(
            bench, case.name, candidate.name, checks[id(candidate)], *[NAN] * 9, series=case.series, length=case.length,
            unit=case.unit, ours=candidate.ours, target_us=case.target_us if candidate.ours else NAN,
        )  # fmt: skip
        if id(candidate) in times:
            _fill(row, case, times[id(candidate)], ceilings)
            if best is not None:
                peer = statistics.median(peers[best]) * 1e6
                row.ratio = peer / row.median_us
                behind = row.median_us - peer
                if candidate.ours and behind > max(row.spread_us, _spread(peers[best]) * 1e6, 0.01 * peer):
                    row.slower_than = best
        rows.append(row)
    return rows


def _spread(times: list[float]) -> float:
    quartiles = statistics.quantiles(times, n=4)
    return (quartiles[2] - quartiles[0]) / 2


def _fill(row: Row, case: Case, times: list[float], ceilings: Ceilings) -> None:
    median = statistics.median(times)
    row.best_us, row.median_us, row.spread_us = min(times) * 1e6, median * 1e6, _spread(times) * 1e6
    if case.cost:
        row.gb_s, row.gflop_s = case.cost.bytes / median / 1e9, case.cost.flops / median / 1e9
        row.percent_gemm, row.percent_read = (100 * least / median for least in ceilings.least(case.cost))
        row.bound, least = ceilings.bound(case.cost)
        row.percent = 100 * least / median
