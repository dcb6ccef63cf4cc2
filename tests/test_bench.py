"""The benches run: each on a small shape, with its correctness checks, and the pages they write."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import __main__ as command_line
from bench import bench_families, harness, output, plot, stock
from bench.clock import HostClock


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """No 256 MiB of copies for a smoke test."""
    monkeypatch.setattr(harness.copies_beyond_caches, "__defaults__", (2**16,))


@pytest.mark.parametrize(
    "arguments",
    [
        ["sampling", "--vocab", "3000", "--batch", "2"],
        ["filters", "--vocab", "3000", "--batch", "2"],
        ["generate", "--vocab", "3000", "--batch", "2"],
        ["single_decode", "--length", "100", "--batch", "2"],
        ["single_prefill", "--length", "70"],
        ["batch_decode", "--length", "100", "--batch", "2"],
        ["batch_prefill", "--length", "70", "--batch", "2"],
        ["sparse", "--length", "128"],
        ["linear", "--batch", "2"],
        ["pages", "--length", "70", "--batch", "2"],
        ["ops"],
        ["decline"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bench(arguments, device, tmp_path, capsys):
    page, table = tmp_path / "page.md", tmp_path / "rows.csv"
    options = ["--quick", "--no-compile", "--turns", "1", "--turn", "0", "--markdown", str(page), "--csv", str(table)]
    assert command_line.main([*arguments, "--device", device, *options]) == 0, capsys.readouterr().err
    rows = table.read_text().splitlines()
    assert rows[0].startswith("bench,case,candidate,check") and len(rows) > 2
    assert "| fi_ops |" in page.read_text()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["GptOss", "ViT"])
def test_families(family, device, tmp_path, monkeypatch, capsys):
    """Small models: full layers, and sliding ones whose rings are full; an encoder."""
    pytest.importorskip("transformers")
    small = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=64)
    config = dict(small, num_hidden_layers=2, max_position_embeddings=256, sliding_window=16, image_size=64)
    sizes = dataclasses.replace(bench_families.SIZES[device], config=config, slots=48)
    monkeypatch.setitem(bench_families.SIZES, device, sizes)
    (found,) = (f for f in bench_families.FAMILIES if f.key == family)
    own = {k: v for k, v in found.config.items() if k not in config}
    monkeypatch.setattr(bench_families, "FAMILIES", (dataclasses.replace(found, config=own, cuda={}),))
    table = tmp_path / "rows.csv"
    options = ["--quick", "--turns", "1", "--turn", "0", "--length", "24", "--batch", "2", "--csv", str(table)]
    assert command_line.main(["families", "--only", family, "--device", device, *options]) == 0, capsys.readouterr().err
    rows = table.read_text().splitlines()[1:]
    assert len(rows) == (2 if family == "ViT" else 6) and all(",ok," in row for row in rows)
    assert sum("fi_ops: 2 of 2 attention" in row for row in rows) == len(rows) // 2


def test_plot(tmp_path):
    """Time against length, in the folder and on the page; one clear line where matplotlib is missing."""
    page, folder = tmp_path / "page.md", tmp_path / "plots"
    report = output.Report(header=["A machine, 4 threads"], markdown=page)
    for length, median in ((1024, 10.0), (4096, 35.0)):
        for name in ("torch SDPA", "fi_ops"):
            numbers = [median, median, 0.1, 1.0, 100.0, 10.0, 50.0]
            report.rows.append(
                output.Row(
                    "single_decode", f"n={length}", name, "ok", *numbers, "read", series="B=1", length=length,
                    ours=name == "fi_ops",
                )
            )  # fmt: skip
    try:
        plot.check_available()
    except RuntimeError as error:
        assert "pip install" in str(error)
        pytest.skip("no matplotlib")
    report.plots = plot.write_plots(report, folder)
    report.save()
    assert (folder / "single_decode.png").read_bytes().startswith(b"\x89PNG")
    assert "![single_decode](plots/single_decode.png)" in page.read_text()


@pytest.mark.parametrize(("ours", "marked"), [(1.2e-3, True), (1.005e-3, False), (0.8e-3, False)])
def test_slower_than_stock_is_marked(ours, marked, monkeypatch, capsys):
    """By more than the spread and 1%; the times are given, not measured."""
    from bench import bench_sampling

    times = {"stock": 1e-3, "other stock": 1.1e-3, "fi_ops": ours}

    class GivenTimes(HostClock):
        def prepare(self, candidate, seconds):
            return lambda: times[candidate.name]

    candidates = [harness.Candidate(name, lambda: None, ours=name == "fi_ops") for name in times]
    monkeypatch.setattr(bench_sampling, "cases", lambda options: [harness.Case("a job", candidates)])
    monkeypatch.setattr(harness, "clock_of", lambda device: GivenTimes())
    assert command_line.main(["sampling", "--quick"]) == 0
    assert ("slower than stock: sampling: a job" in capsys.readouterr().out) == marked


@pytest.mark.parametrize(("target", "verdict"), [(1100.0, "met"), (900.0, "missed")])
def test_a_target_is_held_against_ours(target, verdict, monkeypatch, tmp_path, capsys):
    from bench import bench_sampling

    class GivenTimes(HostClock):
        def prepare(self, candidate, seconds):
            return lambda: 1e-3

    candidates = [harness.Candidate("stock", lambda: None), harness.Candidate("fi_ops", lambda: None, ours=True)]
    monkeypatch.setattr(bench_sampling, "cases", lambda options: [harness.Case("a job", candidates, target_us=target)])
    monkeypatch.setattr(harness, "clock_of", lambda device: GivenTimes())
    page = tmp_path / "page.md"
    assert command_line.main(["sampling", "--quick", "--markdown", str(page)]) == 0
    line = f"target: fi_ops in at most {target:g} us: {verdict} (1000.0 us)"
    assert capsys.readouterr().out.count(line) == 1 and page.read_text().count(line) == 1


def test_a_peer_that_does_not_compile_says_so(monkeypatch, capsys):
    from bench import bench_sampling

    def broken(graph, inputs):
        raise RuntimeError("no")

    peer = harness.Candidate("stock, compiled", torch.compile(lambda: torch.ones(2) + 1, backend=broken))
    candidates = [peer, harness.Candidate("fi_ops", lambda: None, ours=True)]
    monkeypatch.setattr(bench_sampling, "cases", lambda options: [harness.Case("a job", candidates)])
    assert command_line.main(["sampling", "--turns", "1", "--turn", "0"]) == 0
    assert "stock, compiled  fails: does not compile" in capsys.readouterr().out


def test_a_slow_peer_gets_few_turns(monkeypatch):
    """By a clock that only the peers' turns move: 15 turns of 0.03 s are ordered, and one of the slow peer's takes a second."""
    turns, now = {"slow": 0, "stock": 0, "fi_ops": 0}, [0.0]

    class GivenTimes(HostClock):
        def prepare(self, candidate, seconds):
            def turn():
                turns[candidate.name] += 1
                now[0] += 1.0 if candidate.name == "slow" else 0.03
                return 1e-3

            return turn

    candidates = [harness.Candidate(name, lambda: None, ours=name == "fi_ops") for name in turns]
    monkeypatch.setattr(harness, "clock_of", lambda device: GivenTimes())
    monkeypatch.setattr(harness, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    rows = output.Report()
    harness.run("sampling", [harness.Case("a job", candidates)], harness.Options(turns=15, turn=0.03), rows)
    assert turns == {"slow": 5, "stock": 15, "fi_ops": 15} and len(rows.rows) == 3


def test_a_wrong_answer_is_reported(monkeypatch, capsys):
    from bench import bench_sampling

    def wrong(options):
        yield harness.Case("wrong", [harness.Candidate("a", lambda: 1)], check=lambda out: "error 1 over budget 0")

    monkeypatch.setattr(bench_sampling, "cases", wrong)
    assert command_line.main(["sampling", "--turns", "1", "--quick"]) == 1
    assert "WRONG sampling: wrong: a" in capsys.readouterr().err


@pytest.mark.parametrize("likeness", [0.1, 3.0])
def test_the_peer_of_draft_chains_accepts_what_the_op_does(likeness):
    """Its last token is another draw; all before it, and how many there are, must be the op's."""
    generator = torch.Generator().manual_seed(1)
    draft = torch.randn(200, 4, 50, generator=generator)
    noise = torch.randn(200, 5, 50, generator=generator) * likeness
    target = (torch.cat([draft, draft[:, :1]], 1) + noise).softmax(-1)
    draft = draft.softmax(-1)
    ids = draft.view(-1, 50).multinomial(1, generator=generator).view(200, 4)
    uniform = torch.rand(200, 5, generator=generator)
    theirs = stock.speculate(draft, ids, uniform, target)
    output, _, emitted = torch.ops.fi.chain_speculative_sampling(draft, ids, uniform, target)
    drawn = torch.arange(5) == emitted[:, None]
    assert torch.equal(theirs.masked_fill(drawn, 0), output.masked_fill(drawn, 0)) and emitted.unique().numel() == 5
    assert (target[torch.arange(200), emitted.long(), theirs[drawn]] > 0).all()
