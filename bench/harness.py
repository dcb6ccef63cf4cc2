"""One way to time: candidates take turns in one process, each is checked first, and the machine's ceiling stands beside.

A bench yields `Case`s: the same job done by several `Candidate`s, its least cost (`fi_ops.library.Cost`), and a check of
an output against float64. `run` checks every candidate, then times them in turns: a turn calls one candidate for about
`turn` seconds, so that drift of the machine (clocks, neighbours) falls on all alike. Reported: the median over turns, the
spread (half the distance between the quartiles), and in the last column the percentage of what this machine reached
between the same turns for reading memory or multiplying matrices in torch, whichever bounds the job. The best turn
stands there too: on a machine that others use it says more than the median, and the header says how loaded it was.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fi_ops
from fi_ops.library import Cost


@dataclass
class Candidate:
    """One way to do a job. `fn` takes no arguments and returns the output."""

    name: str
    fn: Callable[[], object]
    ours: bool = False


@dataclass
class Case:
    """One job. `check(output)` returns "ok" or what is wrong; the first candidate that is not ours is the peer to beat."""

    name: str
    candidates: list[Candidate]
    cost: Cost | None = None
    check: Callable[[object], str] | None = None
    dtype: torch.dtype = torch.float32


@dataclass
class Options:
    """What the command line sets."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    threads: int | None = None
    quick: bool = False
    batch: int | None = None
    length: int | None = None
    compiled: bool = True
    turns: int = 15
    turn: float = 0.03

    def pick(self, default: torch.dtype) -> torch.dtype:
        return self.dtype or default


@dataclass
class Row:
    """One line of a table."""

    bench: str
    case: str
    candidate: str
    check: str
    best_us: float
    median_us: float
    spread_us: float
    ratio: float  # the peer's time over this one's
    gb_s: float
    gflop_s: float
    percent: float  # of the ceiling that bounds the job
    bound: str = ""


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    header: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ the machine


def describe() -> list[str]:
    """What the numbers were taken on."""
    model = platform.processor() or platform.machine()
    try:
        info = Path("/proc/cpuinfo").read_text()
        model = next(line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return [
        f"{model}, {torch.get_num_threads()} threads, fi_ops ISA {fi_ops.cpu_isa()}; load average before: "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        f"torch {torch.__version__}, fi_ops {fi_ops.__version__}, Python {platform.python_version()}",
    ]


@functools.cache
def _read_probe() -> tuple[Callable[[], object], int]:
    """(a pass over 256 MiB with torch's threads, its bytes): much more than any cache holds."""
    x = torch.ones(2**26, dtype=torch.float32)
    return x.sum, x.nbytes


@functools.cache
def _gemm_probe(dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """(a 1024 x 2048 x 2048 product in torch, its floating-point operations).

    float16 stands by the float32 product: torch multiplies halves on one scalar thread where the CPU has no AVX512-FP16.
    """
    dtype = torch.float32 if dtype == torch.float16 else dtype
    a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return lambda: a @ b, 2 * 1024 * 2048 * 2048


class Ceilings:
    """What the machine does at the moment: bytes read and floating-point operations a second, probed between the turns.

    A shared machine's bus gives half as much from one minute to the next, so a ceiling measured once says little.
    """

    def __init__(self, dtype: torch.dtype):
        self.probes = {"read": _read_probe(), "gemm": _gemm_probe(dtype)}
        self.times: dict[str, list[float]] = {name: [] for name in self.probes}
        for fn, _ in self.probes.values():
            fn()

    def probe(self) -> None:
        for name, (fn, _) in self.probes.items():
            began = time.perf_counter()
            fn()
            self.times[name].append(time.perf_counter() - began)

    def rate(self, name: str) -> float:
        """Units a second, by the median probe."""
        return self.probes[name][1] / statistics.median(self.times[name])


def cold(copies: list[tuple], fn: Callable[..., object]) -> Callable[[], object]:
    """`fn` over the argument tuples in turn, so that no call finds its inputs in a cache. See `copies_beyond_caches`."""
    turns = itertools.cycle(copies)
    return lambda: fn(*next(turns))


def copies_beyond_caches(arguments: tuple, nbytes: int, beyond: int = 2**28) -> list[tuple]:
    """`arguments` and as many copies of their tensors as are `beyond` bytes together (256 MiB)."""
    count = max(1, -(-beyond // max(nbytes, 1)))
    clones = [tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments) for _ in range(count - 1)]
    return [arguments, *clones]


# ------------------------------------------------------------------------------------------------ checks


def within_budget(
    expected: torch.Tensor, same_dtype: torch.Tensor, part: Callable = lambda t: t
) -> Callable[[object], str]:
    """Check by the package's error budget: at most twice the error of stock torch in the same dtype, plus a rounding."""
    from fi_ops.testing import deviation

    def check(output) -> str:
        result = deviation(part(output), expected, same_dtype)
        return "ok" if result.ok else f"error {result.error:.2g} over budget {result.limit:.2g}"

    return check


# ------------------------------------------------------------------------------------------------ timing


def _calls_a_turn(fn: Callable[[], object], turn: float) -> int:
    began = time.perf_counter()
    fn()
    return max(1, min(1000, int(turn / max(time.perf_counter() - began, 1e-7))))


def run(bench: str, cases: Iterable[Case], options: Options, report: Report) -> None:
    """Check, time and print each case as it is done."""
    turns = max(5, options.turns // 3) if options.quick else options.turns
    for case in cases:
        checks, calls, failed = {}, {}, []
        for candidate in case.candidates:
            try:
                output = candidate.fn()
            except Exception as e:  # a peer that cannot do the job is a row too (torch.compile of some samplers)
                checks[candidate.name] = f"fails: {type(e).__name__}"
                failed.append(candidate)
                continue
            checks[candidate.name] = case.check(output) if case.check else "-"
            del output
            candidate.fn()
            calls[candidate.name] = _calls_a_turn(candidate.fn, options.turn)
        live = [c for c in case.candidates if c not in failed]
        times: dict[str, list[float]] = {c.name: [] for c in live}
        ceilings = Ceilings(case.dtype)
        for _ in range(turns):
            ceilings.probe()
            for candidate in live:
                count = calls[candidate.name]
                began = time.perf_counter()
                for _ in range(count):
                    candidate.fn()
                times[candidate.name].append((time.perf_counter() - began) / count)
        peer = next((statistics.median(times[c.name]) for c in live if not c.ours), float("nan"))
        rows = []
        for candidate in case.candidates:
            if candidate in failed:
                nan = float("nan")
                rows.append(Row(bench, case.name, candidate.name, checks[candidate.name], *[nan] * 7))
                continue
            rows.append(_row(bench, case, candidate, checks[candidate.name], times[candidate.name], peer, ceilings))
        report.rows += rows
        print_rows(rows)


def _row(
    bench: str, case: Case, candidate: Candidate, check: str, times: list[float], peer: float, ceilings: Ceilings
) -> Row:
    median = statistics.median(times)
    quartiles = statistics.quantiles(times, n=4)
    cost = case.cost or Cost(0)
    by_bytes, by_flops = cost.bytes / ceilings.rate("read"), cost.flops / ceilings.rate("gemm")
    bound = "read" if by_bytes >= by_flops else "gemm"
    percent = 100 * max(by_bytes, by_flops) / median if case.cost else float("nan")
    spread = (quartiles[2] - quartiles[0]) / 2
    return Row(
        bench, case.name, candidate.name, check, min(times) * 1e6, median * 1e6, spread * 1e6, peer / median,
        cost.bytes / median / 1e9, cost.flops / median / 1e9, percent, bound if case.cost else "",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ output

COLUMNS = ("candidate", "check", "best us", "median us", "+-", "stock / this", "GB/s", "GFLOP/s", "% of ceiling")


def _number(x: float, digits: int = 1) -> str:
    return "-" if x != x else f"{x:.{digits}f}"


def _cells(row: Row) -> tuple[str, ...]:
    percent = _number(row.percent) + (f" {row.bound}" if row.percent == row.percent else "")
    return (
        row.candidate, row.check, _number(row.best_us), _number(row.median_us), _number(row.spread_us), _number(row.ratio, 2),
        _number(row.gb_s), _number(row.gflop_s), percent,
    )  # fmt: skip


def print_rows(rows: list[Row]) -> None:
    if not rows:
        return
    print(f"\n{rows[0].bench}: {rows[0].case}")
    table = [COLUMNS, *map(_cells, rows)]
    widths = [max(len(r[i]) for r in table) for i in range(len(COLUMNS))]
    for r in table:
        left = f"  {r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}"
        print(left + "".join(f"  {cell:>{width}}" for cell, width in zip(r[2:], widths[2:], strict=True)))
    sys.stdout.flush()


def write_csv(report: Report, path: Path) -> None:
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(Row.__dataclass_fields__)
        for row in report.rows:
            writer.writerow(getattr(row, name) for name in Row.__dataclass_fields__)


def write_markdown(report: Report, path: Path) -> None:
    """A page for `bench/results/`: hardware, versions, command, one table a case."""
    text = io.StringIO()
    text.write(f"# {path.stem}\n\n" + "".join(f"{line}  \n" for line in report.header))
    last = None
    for row in report.rows:
        if (row.bench, row.case) != last:
            last = (row.bench, row.case)
            text.write(f"\n**{row.bench}: {row.case}**\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n")
        text.write(f"| {' | '.join(_cells(row))} |\n")
    path.write_text(text.getvalue())
