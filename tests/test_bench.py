"""The benches run: each on a small shape, with its correctness checks, and the pages they write."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import __main__ as command_line
from bench import bench_families, harness, output, plot, stock
from bench.clock import HostClock
from fi_ops.library import Cost

SVG = "{http://www.w3.org/2000/svg}"


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
        ["mla", "--length", "70", "--batch", "2"],
        ["linear", "--batch", "2"],
        ["pages", "--length", "70", "--batch", "2"],
        ["ops"],
        ["decline"],
        ["peers", "--length", "70", "--batch", "2"],
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
    """The rate against length, in the folder and on the page: what is drawn is where its number says."""
    page, folder = tmp_path / "page.md", tmp_path / "plots"
    report = output.Report(header=["A machine, 4 threads"], markdown=page)
    for length, median in ((1024, 10.0), (4096, 35.0)):
        for name in ("torch SDPA", "fi_ops"):
            numbers = [median, median, 0.1, 1.0, 8000 / median, 10.0, 50.0, 5.0, 50.0]
            report.rows.append(
                output.Row(
                    "single_decode", f"n={length}", name, "ok", *numbers, "read", series="B=1 & more", length=length,
                    ours=name == "fi_ops",
                )
            )  # fmt: skip
    report.plots = plot.write_plots(report, folder, "2026-01-01-")
    report.save()
    assert "![2026-01-01-single_decode](plots/2026-01-01-single_decode.svg)" in page.read_text()
    drawing = ElementTree.fromstring((folder / "2026-01-01-single_decode.svg").read_text())
    texts = [element.text for element in drawing.iter(SVG + "text")]
    assert {"B=1 & more", "1024", "4096", "fi_ops", "torch SDPA", "GB/s against length"} <= set(texts)
    ours = [tuple(map(float, (dot.get("cx"), dot.get("cy")))) for dot in drawing.iter(SVG + "circle")][-2:]
    ticks = {element.text: float(element.get("y")) - 4 for element in drawing.iter(SVG + "text")}
    for (_, y), rate in zip(ours, (800.0, 8000 / 35.0), strict=True):
        assert y == pytest.approx(ticks["0"] + (ticks["500"] - ticks["0"]) * rate / 500, abs=0.2)
    assert ours[0][0] < ours[1][0]


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


def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path, capsys):
    """Neither on the screen nor on the page of the peers; the rest of the case is."""
    from bench import bench_peers

    def maker(options):
        def right():
            return 1

        names = ("torch flash", "torch cuDNN", "fi_ops")
        fns = (right, lambda: 2, right)
        candidates = [harness.Candidate(n, fn, n == "fi_ops") for n, fn in zip(names, fns, strict=True)]
        check = {1: "ok", 2: "error 1 over budget 0"}.get
        return [lambda: harness.Case("a job", candidates, Cost(1000, 1000), check)]

    monkeypatch.setattr(bench_peers, "FAMILIES", {"prefill": bench_peers.Family(maker, 1)})
    page = tmp_path / "page.md"
    assert command_line.main(["peers", "--quick", "--turn", "0", "--markdown", str(page)]) == 1
    screen = capsys.readouterr()
    assert (
        "WRONG peers_prefill: a job: torch cuDNN" in screen.err and "torch cuDNN: error 1 over budget 0" in screen.out
    )
    heading, _, row = (line.split(" | ") for line in page.read_text().splitlines() if line.startswith("|"))
    cells = dict(zip(heading, row, strict=True))
    assert cells["torch cuDNN |"] == "wrong: error 1 over budget 0 |" and "±" in cells["torch flash"]
    assert "torch flash" in cells["best peer / fi_ops"]


def test_peers_keep_their_time(monkeypatch, tmp_path, capsys):
    """Each family has its share of what is left; what it does not reach is said, on the page too. By a clock that cases move."""
    from bench import bench_peers

    now = [0.0]

    def taking(seconds):
        def make():
            now[0] += seconds
            return harness.Case("a job", [harness.Candidate("fi_ops", lambda: None, ours=True)])

        return lambda options: [make] * 10

    families = {"prefill": bench_peers.Family(taking(2.0), 3), "decode": bench_peers.Family(taking(0.5), 1)}
    monkeypatch.setattr(bench_peers, "FAMILIES", families)
    monkeypatch.setattr(bench_peers, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    cases = bench_peers.cases(options := harness.Options(seconds=8.0))
    assert [case.family for case in cases] == ["prefill"] * 3 + ["decode"] * 4
    assert options.left_out == [
        "prefill: 7 of 10 cases were left out: no time",
        "decode: 6 of 10 cases were left out: no time",
    ]
    with pytest.raises(SystemExit, match="no family 'mlb' of peers; pass one of prefill, decode"):
        next(bench_peers.cases(harness.Options(family="mlb")))


def test_prefill_is_checked_row_by_row():
    """A wrong row of any head among those compared is seen, in short prompts every row is; so is a wrong mask."""
    from bench import bench_single_prefill as prefill

    query, key, value = (torch.randn(1, heads, 100, 64) for heads in (4, 2, 2))
    right = torch.ops.fi.attention(query, key, value, causal=True)
    check = prefill.check(query, key, value, True)
    assert check(right) == "ok" and "over budget" in check(torch.ops.fi.attention(query, key, value))
    for head in range(4):
        wrong = right.clone()
        wrong[0, head, 50] += 0.1
        assert "over budget" in check(wrong)
    rows = prefill.some_rows(5000)
    assert rows.numel() == prefill.CHECKED_ROWS == rows.unique().numel() and {0, 31, 4968, 4999} <= set(rows.tolist())


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
