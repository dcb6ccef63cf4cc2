"""The benches run: each on a small shape, with its correctness checks, and the pages they write."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import __main__ as command_line
from bench import harness


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """No 256 MiB of copies for a smoke test."""
    monkeypatch.setattr(harness.copies_beyond_caches, "__defaults__", (2**16,))


@pytest.mark.parametrize(
    "arguments",
    [
        ["sampling", "--length", "3000", "--batch", "2"],
        ["single_decode", "--length", "100", "--batch", "2"],
        ["single_prefill", "--length", "70"],
        ["ops"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_bench(arguments, tmp_path, capsys):
    page, table = tmp_path / "page.md", tmp_path / "rows.csv"
    options = ["--quick", "--no-compile", "--turns", "1", "--turn", "0", "--markdown", str(page), "--csv", str(table)]
    assert command_line.main([*arguments, *options]) == 0, capsys.readouterr().err
    rows = table.read_text().splitlines()
    assert rows[0].startswith("bench,case,candidate,check") and len(rows) > 2
    assert "| fi_ops |" in page.read_text()


def test_a_wrong_answer_is_reported(monkeypatch, capsys):
    from bench import bench_sampling

    def wrong(options):
        yield harness.Case("wrong", [harness.Candidate("a", lambda: 1)], check=lambda out: "error 1 over budget 0")

    monkeypatch.setattr(bench_sampling, "cases", wrong)
    assert command_line.main(["sampling", "--turns", "1", "--quick"]) == 1
    assert "WRONG sampling: wrong: a" in capsys.readouterr().err
