"""Cases side by side: one row a case, one column a candidate, on the screen and as Markdown.

What `output.py` shows in a table a case is here a line: our time, its rate, its share of what the machine multiplied and read
between the same turns, and each peer's time. A candidate that was wrong or failed says so in its cell and has no time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from .output import Report, Row, target


def is_peer(row: Row) -> bool:
    """Not ours in another form (`fi.attention, same work`)."""
    return not row.ours and not row.candidate.startswith("fi.")


def was_timed(row: Row) -> bool:
    return row.median_us == row.median_us


def rate(row: Row) -> str:
    return f"{row.gflop_s / 1e3:.3g} TFLOP/s" if row.bound == "gemm" else f"{row.gb_s:.4g} GB/s"


def best_peer(rows: Iterable[Row]) -> Row | None:
    return min(filter(was_timed, filter(is_peer, rows)), key=lambda row: row.median_us, default=None)


def show(rows: list[Row]) -> None:
    print(line(rows), flush=True)


def line(rows: list[Row]) -> str:
    """A case in one line, and what was not timed in lines of its own."""
    peer, lines = best_peer(rows), []
    for row in rows:
        if row.ours and was_timed(row):
            against = f"{peer.median_us / row.median_us:.2f} x {peer.candidate} ({peer.median_us:.1f})" if peer else ""
            lines.append(
                f"{row.case:<60} {row.median_us:>9.1f} us {rate(row):>13} {row.percent_gemm:>5.1f}% gemm "
                f"{row.percent_read:>5.1f}% read  {against}"
            )
            lines += [f"    {text}" for text in [target(row)] if text]
        elif not was_timed(row):
            lines.append(f"{row.case:<60} {row.candidate}: {row.check}")
    return "\n".join(lines)


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    if not was_timed(row):
        return row.check.partition(":")[0] if row.check.startswith("fails") else f"wrong: {row.check}"
    return f"{row.median_us:.1f} ± {row.spread_us:.1f}"


def _cells(rows: list[Row], columns: list[str]) -> list[str]:
    by_name = {row.candidate: row for row in rows}
    ours = next(row for row in rows if row.ours)
    peer = best_peer(rows)
    shares = [rate(ours), f"{ours.percent_gemm:.1f}", f"{ours.percent_read:.1f}"] if was_timed(ours) else ["", "", ""]
    ratio = f"**{peer.median_us / ours.median_us:.2f}** {peer.candidate}" if peer and was_timed(ours) else ""
    return [ours.case, _time(ours), *shares, ratio, *(_time(by_name.get(name)) for name in columns)]


def tables(report: Report) -> str:
    """Markdown: a table a bench, times in us (median, half the distance of the quartiles), ours first."""
    parts = []
    for bench, group in itertools.groupby(report.rows, lambda row: row.bench):
        rows = list(group)
        columns = list(dict.fromkeys(row.candidate for row in rows if row.candidate != "fi_ops"))
        heading = ["case", "fi_ops", "its rate", "% of GEMM", "% of read", "best peer / fi_ops", *columns]
        parts.append(f"\n## {bench}\n\n| {' | '.join(heading)} |\n|{'---|' * len(heading)}\n")
        for _, case in itertools.groupby(rows, lambda row: row.case):
            parts.append(f"| {' | '.join(_cells(list(case), columns))} |\n")
        parts += [f"\n{row.case}: {text}\n" for row in rows if (text := target(row))]
    return "".join(parts)
