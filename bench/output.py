"""Rows of a report: as a table on the screen, as CSV, as a page of Markdown."""

from __future__ import annotations

import csv
import io
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


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
    ratio: float  # the best peer's time over this one's
    gb_s: float
    gflop_s: float
    percent: float  # of the ceiling that bounds the job
    percent_gemm: float
    percent_read: float
    bound: str = ""
    slower_than: str = ""  # ours alone: the best peer, where ours takes longer by more than the spread
    series: str = ""  # of a plot of time against length
    length: float = float("nan")
    unit: str = "us"
    ours: bool = False
    target_us: float = float("nan")  # ours alone: what it is to take at the most


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    csv: Path | None = None
    markdown: Path | None = None
    plots: list[Path] = field(default_factory=list)
    show: Callable[[list[Row]], None] | None = None  # a case on the screen, where a bench has its own way
    tables: Callable[[Report], str] | None = None  # the page's body, likewise

    def save(self) -> None:
        """After every case, so that a run that is cut off leaves what it has."""
        if self.csv:
            write_csv(self, self.csv)
        if self.markdown:
            write_markdown(self, self.markdown)


def columns(unit: str) -> tuple[str, ...]:
    return (
        "candidate", "check", f"best {unit}", f"median {unit}", "+-", "best peer / this", "GB/s", "FLOP/s", "% of ceiling",
        "x floor",
    )  # fmt: skip


def _number(x: float, digits: int = 1) -> str:
    return "-" if x != x else f"{x:.{digits}f}"


def _flops(gflop_s: float) -> str:
    return (
        "-"
        if gflop_s != gflop_s or gflop_s == 0
        else f"{gflop_s / 1e3:.1f} T"
        if gflop_s >= 1e4
        else f"{gflop_s:.1f} G"
    )


def cells(row: Row) -> tuple[str, ...]:
    known = row.percent == row.percent
    scale, digits = (1e-3, 3) if row.unit == "ms" else (1, 1)
    times = (_number(t * scale, digits) for t in (row.best_us, row.median_us, row.spread_us))
    check = f"{row.check}; SLOWER than {row.slower_than}" if row.slower_than else row.check
    return (
        row.candidate, check, *times, _number(row.ratio, 2), _number(row.gb_s), _flops(row.gflop_s),
        f"{row.percent:.1f} {row.bound}" if known else "-", _number(100 / row.percent, 2) if known and row.percent else "-",
    )  # fmt: skip


def target(row: Row) -> str:
    """A line about it, or nothing."""
    if row.target_us != row.target_us or row.median_us != row.median_us:
        return ""
    verdict = "met" if row.median_us <= row.target_us else "missed"
    return f"target: {row.candidate} in at most {row.target_us:g} us: {verdict} ({row.median_us:.1f} us)"


def print_rows(rows: list[Row]) -> None:
    if not rows:
        return
    print(f"\n{rows[0].bench}: {rows[0].case}")
    table = [columns(rows[0].unit), *map(cells, rows)]
    widths = [max(len(r[i]) for r in table) for i in range(len(table[0]))]
    for r in table:
        left = f"  {r[0]:<{widths[0]}}  {r[1]:<{widths[1]}}"
        print(left + "".join(f"  {cell:>{width}}" for cell, width in zip(r[2:], widths[2:], strict=True)))
    for line in filter(None, map(target, rows)):
        print(f"  {line}")
    sys.stdout.flush()


def print_brief(rows: list[Row]) -> None:
    """One line a case: ours, and the best peer."""
    timed = [row for row in rows if row.median_us == row.median_us]
    ours = next((row for row in timed if row.ours), None)
    peer = min((row for row in timed if not row.ours), key=lambda row: row.median_us, default=None)
    if ours is None or peer is None:
        print_rows(rows)
        return
    note = f"  {ours.check}" if ours.check != "ok" else ""
    note += "  SLOWER" if ours.slower_than else ""
    print(
        f"{ours.case:<74} {ours.median_us:>9.1f} us, {peer.candidate} {peer.median_us:.1f} us, {ours.ratio:.2f} x{note}",
        flush=True,
    )


def write_csv(report: Report, path: Path) -> None:
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(Row.__dataclass_fields__)
        for row in report.rows:
            writer.writerow(getattr(row, name) for name in Row.__dataclass_fields__)


def write_markdown(report: Report, path: Path) -> None:
    """A page for `bench/results/`: hardware, versions, command, plots, tables."""
    text = io.StringIO()
    text.write(f"# {path.stem}\n\n" + "".join(f"{line}  \n" for line in report.header))
    for plot in report.plots:
        text.write(f"\n![{plot.stem}]({os.path.relpath(plot, path.parent)})\n")
    text.write((report.tables or tables_by_case)(report))
    path.write_text(text.getvalue())


def tables_by_case(report: Report) -> str:
    """A table a case, a row a candidate."""
    text = io.StringIO()
    for (bench, case), group in itertools.groupby(report.rows, lambda row: (row.bench, row.case)):
        rows = list(group)
        heading = columns(rows[0].unit)
        text.write(f"\n**{bench}: {case}**\n\n| {' | '.join(heading)} |\n|{'---|' * len(heading)}\n")
        text.writelines(f"| {' | '.join(cells(row))} |\n" for row in rows)
        text.writelines(f"\n{line}\n" for line in map(target, rows) if line)
    return text.getvalue()
