"""Plots of time against length, one PNG a bench: a panel a series, a line a candidate, both axes logarithmic."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from .output import Report, Row


def check_available() -> None:
    """RuntimeError, one clear line, where matplotlib is missing: before the benches run, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("--plot needs matplotlib; pip install 'fi_ops[bench]' or leave --plot out") from error


def write_plots(report: Report, folder: Path) -> list[Path]:
    """`<folder>/<bench>.png` for every bench with a series of two lengths or more; the files written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    benches: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in report.rows:
        if row.series and row.median_us == row.median_us:
            benches[row.bench][row.series].append(row)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for bench, all_series in benches.items():
        series = {name: rows for name, rows in all_series.items() if len({row.length for row in rows}) > 1}
        if not series:
            continue
        figure, axes = plt.subplots(
            1, len(series), figsize=(5.2 * len(series), 4.2), squeeze=False, layout="constrained"
        )
        for axis, (name, rows) in zip(axes[0], series.items(), strict=True):
            _panel(axis, name, rows)
        figure.suptitle(f"{bench} ({report.header[0].split(',')[0]})")
        path = folder / f"{bench}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        written.append(path)
    return written


def _panel(axis, title: str, rows: list[Row]) -> None:
    for candidate in dict.fromkeys(row.candidate for row in rows):
        line = sorted((row.length, row.median_us) for row in rows if row.candidate == candidate)
        ours = any(row.ours for row in rows if row.candidate == candidate)
        axis.plot(*zip(*line, strict=True), marker="o", markersize=4, linewidth=2.4 if ours else 1.2, label=candidate)
    floor = sorted({(row.length, row.median_us * row.percent / 100) for row in rows if row.ours})
    axis.plot(*zip(*floor, strict=True), color="grey", linestyle=":", label="measured ceiling")
    axis.set(title=title, xlabel="length", ylabel="median us", xscale="log", yscale="log")
    axis.set_xscale("log", base=2)
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=8)
