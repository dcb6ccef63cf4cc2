"""Plots of the rate against length, one SVG a bench: a panel a series, a line a candidate, the measured ceiling dotted.

The rate is that of the ceiling which bounds the series at its longest: FLOP/s of matrix products, or bytes read a second. The
SVG is written here, so that a plot needs no package.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path

from .output import Report, Row

WIDTH, HEIGHT, MARGIN, COLUMNS = 380, 270, (52, 34, 12, 40), 3  # of a panel; left, top, right, bottom
OURS, CEILING = "#d62728", "#888888"
PEERS = ("#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22")
TICKS = 5


def write_plots(report: Report, folder: Path, prefix: str = "") -> list[Path]:
    """`<folder>/<prefix><bench>.svg` for every bench with a series of two lengths or more; the files written."""
    benches: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in report.rows:
        if row.series and row.median_us == row.median_us:
            benches[row.bench][row.series].append(row)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for bench, every in benches.items():
        series = {name: rows for name, rows in every.items() if len({row.length for row in rows}) > 1}
        if series:
            path = folder / f"{prefix}{bench}.svg"
            path.write_text(_figure(f"{bench} ({report.header[0].split(',')[0]})", series))
            written.append(path)
    return written


def _figure(title: str, series: dict[str, list[Row]]) -> str:
    """All panels, with one legend: a candidate has one colour throughout."""
    rows = [row for each in series.values() for row in each]
    peers = dict.fromkeys(row.candidate for row in rows if not row.ours)
    colours = {name: PEERS[i % len(PEERS)] for i, name in enumerate(peers)}
    colours |= {row.candidate: OURS for row in rows if row.ours}
    columns = min(COLUMNS, len(series))
    width, legend = columns * WIDTH, 20 * (len(colours) + 1)
    height = 30 + HEIGHT * -(-len(series) // columns) + legend
    parts = [_text(width / 2, 20, title, 15, "middle")]
    for i, (name, of_series) in enumerate(series.items()):
        left, top = i % columns * WIDTH, 30 + i // columns * HEIGHT
        parts.append(f'<g transform="translate({left} {top})">{_panel(name, of_series, colours)}</g>')
    for i, (name, colour) in enumerate([*colours.items(), ("measured ceiling", CEILING)]):
        y = height - legend + 20 * i + 6
        parts += [_line([(14, y), (40, y)], colour, dotted=colour == CEILING), _text(48, y + 4, name, 12)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _panel(title: str, rows: list[Row], colours: dict[str, str]) -> str:
    longest = max((row for row in rows if row.ours), key=lambda row: row.length, default=rows[-1])
    by_flops = longest.bound == "gemm"

    def rate(row: Row) -> float:
        return row.gflop_s / 1e3 if by_flops else row.gb_s

    lengths = sorted({row.length for row in rows})
    ceilings = [(row.length, 100 * rate(row) / row.percent) for row in rows if row.ours and row.bound == longest.bound]
    step = _round_step(max([rate(row) for row in rows] + [y for _, y in ceilings]) / TICKS)
    left, top, right, bottom = MARGIN
    inner_width, inner_height = WIDTH - left - right, HEIGHT - top - bottom
    low, high = math.log2(lengths[0]), math.log2(lengths[-1])
    highest = step * (TICKS + 1)

    def place(length: float, y: float) -> tuple[float, float]:
        return left + inner_width * (math.log2(length) - low) / (high - low), top + inner_height * (1 - y / highest)

    parts = [_text(WIDTH / 2, top - 8, title, 13, "middle")]
    for i in range(TICKS + 2):
        (x0, y), (x1, _) = place(lengths[0], i * step), place(lengths[-1], i * step)
        parts += [_line([(x0, y), (x1, y)], "#dddddd", 1), _text(left - 5, y + 4, f"{i * step:g}", 10, "end")]
    for length in lengths:
        parts.append(_text(place(length, 0)[0], HEIGHT - bottom + 14, f"{length:g}", 10, "middle"))
    unit = "TFLOP/s" if by_flops else "GB/s"
    parts.append(_text(WIDTH / 2, HEIGHT - bottom + 29, f"{unit} against length", 11, "middle"))
    parts.append(_line([place(*point) for point in sorted(ceilings)], CEILING, dotted=True))
    for candidate in dict.fromkeys(row.candidate for row in rows):
        points = [place(row.length, rate(row)) for row in sorted(rows, key=_length) if row.candidate == candidate]
        colour = colours[candidate]
        parts.append(_line(points, colour, 2.4 if colour == OURS else 1.4))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points]
    return "".join(parts)


def _length(row: Row) -> float:
    return row.length


def _round_step(least: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is not below `least`."""
    power = 10 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next((factor * power for factor in (1, 2, 2.5, 5) if factor * power >= least), 10 * power)


def _line(points: Iterable[tuple[float, float]], colour: str, width: float = 1.4, dotted: bool = False) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="2 3"' if dotted else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>'


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
