"""Everything that needs a GPU, by one command: tests, compute-sanitizer, benches; logs and tables into one folder.

    python bench/gpu_suite.py --out results/                          # all stages: about 11 minutes on one H100
    python bench/gpu_suite.py --out results/ --quick                  # tests, then the peers: 330 seconds at most
    python bench/gpu_suite.py --out results/ --stages bench --benches peers --peers-seconds 150    # the peers' long run
    python bench/gpu_suite.py --out results/ --stages tests,sanitize
    python bench/gpu_suite.py --out results/ --stages bench --benches single_decode,models --bench-args=--full
    python bench/gpu_suite.py --out results/ --limit 570              # everything that fits in 570 seconds

Stages: `tests` (pytest -m gpu, in parallel where pytest-xdist is installed), `sanitize` (memcheck and racecheck over one
sample of every op), `bench` (each bench in a process of its own, so that one that breaks the device's context doesn't
take the others along). Each stage has its own time limit. The CUDA library is used as it was built.

Written to the folder: tests.log, sanitize.log, bench.log, bench.csv, bench.md, decline.csv, one SVG a bench with a plot.
Short tables come last on the screen. Exit code 0: no stage failed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tests", "sanitize", "bench")
BENCHES = {
    "single_decode": 120,
    "single_prefill": 120,
    "batch_decode": 120,
    "batch_prefill": 120,
    "sparse": 60,
    "mla": 60,
    "peers": 240,
    "sampling": 120,
    "filters": 60,
    "generate": 60,
    "models": 300,
    "families": 300,
    "decline": 120,
    "ops": 60,
    "linear": 60,
    "pages": 60,
}
PLOTTED = ("single_decode", "single_prefill", "peers")
QUICK = {"stages": "tests,bench", "benches": "peers", "bench_args": "--quick", "workers": 15, "limit": 330.0}
LIMITS = {"tests": 420, "sanitize": 240}
SANITIZERS = {
    "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    "racecheck": {},
}


@dataclass
class Result:
    name: str
    verdict: str  # "ok", or what went wrong
    seconds: float
    note: str = ""
    details: list[str] = field(default_factory=list)  # a few lines of what went wrong


class Process:
    """A child in a process group of its own, its output in a file, its time limited."""

    end_of_suite = float("inf")  # no process runs longer

    def __init__(self, name: str, command: list[str], log: Path, limit: float, env: dict[str, str] | None = None):
        self.name, self.log, self.began = name, log, time.monotonic()
        self.deadline = min(self.began + limit, self.end_of_suite)
        self.out = log.open("ab")
        self.out.write(f"$ {' '.join(command)}\n".encode())
        self.out.flush()
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(env or {})}
        self.child = subprocess.Popen(
            command, cwd=ROOT, stdout=self.out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def wait(self) -> Result:
        try:
            code = self.child.wait(max(0.1, self.deadline - time.monotonic()))
            verdict = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            self.stop()
            verdict = "time limit"
        self.out.close()
        return Result(self.name, verdict, time.monotonic() - self.began)

    def stop(self) -> None:
        """End the child and what it started (workers of pytest, of Inductor)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, 9)
        self.child.wait()


# ------------------------------------------------------------------------------------------------ stages


def run_tests(out: Path, args: argparse.Namespace) -> list[Result]:
    log = out / "tests.log"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(args.workers), "--dist", "worksteal"]
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}  # a worker; each would take all cores
    result = Process("tests", [*command, *shlex.split(args.pytest_args)], log, args.tests_limit, env).wait()
    text = log.read_text(errors="replace")
    summary = re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|error|deselected)[^\n]*?) ?=*$", text, re.M)
    result.note = summary[-1] if summary else f"{text.count('PASSED')} passed, {text.count('FAILED')} failed until then"
    result.details = list(dict.fromkeys(re.findall(r"(?:FAILED|ERROR) tests/[^\n]{,200}", text)))[-25:]
    return [result]


def run_sanitizers(out: Path, args: argparse.Namespace) -> list[Result]:
    """Both tools over all ops, each in shards, all at once: the time goes into starting and instrumenting."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return [Result("sanitize", "no compute-sanitizer on the PATH", 0.0)]
    running, folder = [], Path(tempfile.mkdtemp())
    for name, env in SANITIZERS.items():
        for i in range(args.shards):
            command = [tool, "--tool", name, "--error-exitcode", "99", "--print-limit", "20"]
            command += ["--report-api-errors", "no"] if name == "memcheck" else []
            command += [sys.executable, "tests/run_sanitized_gpu.py", "--shard", f"{i + 1}/{args.shards}"]
            log = folder / f"{name}-{i}.log"
            running.append(Process(f"{name} {i + 1}/{args.shards}", command, log, args.sanitize_limit, env))
    results = []
    with (out / "sanitize.log").open("w") as whole:
        for process in running:
            result = process.wait()
            text = process.log.read_text(errors="replace")
            whole.write(text)
            summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: [^\n]*", text)
            calls = text.count("\nran fi::")
            result.note = f"{calls} calls; {summaries[-1] if summaries else 'no summary'}"
            result.verdict = "ran nothing" if result.verdict == "ok" and calls == 0 else result.verdict
            faults = re.findall(
                r"^(?:FAILED |========= (?:Invalid|Error|Race|Misaligned|Program hit))[^\n]{,200}", text, re.M
            )
            result.details = list(dict.fromkeys(faults))[:6]
            results.append(result)
    shutil.rmtree(folder)
    return results


def start_warming(args: argparse.Namespace, parts: Path) -> list[Process]:
    """Compile whole models into Inductor's cache on disk while the stages that time nothing run."""
    running = []
    for name in ("models", "families"):
        if name in args.benches and len(args.stages) > 1:
            command = [sys.executable, "-m", "bench", name, "--device", "cuda", "--warm", *shlex.split(args.bench_args)]
            running.append(Process(f"warming {name}", command, parts / f"warming_{name}.log", 500))
    return running


def run_benches(out: Path, args: argparse.Namespace, parts: Path) -> list[Result]:
    results = []
    for name in args.benches:
        table, page, log = parts / f"{name}.csv", parts / f"{name}.md", parts / f"{name}.log"
        command = [sys.executable, "-m", "bench", name, "--device", "cuda"]
        command += ["--csv", str(table), "--markdown", str(page)]
        if name in PLOTTED:
            command += ["--plot", str(out)]
        if name == "peers":
            command += ["--seconds", str(args.peers_seconds), "--turns", "9"]
        if name == "decline":
            command += ["--turns", "7", "--turn", "0.0005"]
        result = Process(name, [*command, *shlex.split(args.bench_args)], log, BENCHES[name] * args.patience).wait()
        text = log.read_text(errors="replace")
        wrong = text.count("\nWRONG ")
        missed = len(re.findall(r"^ *target: .*: missed", text, re.M))
        result.note = (
            f"{wrong} wrong, {text.count(chr(10) + 'slower than ')} slower than a peer, {missed} targets missed"
        )
        if result.verdict != "ok":
            result.details = re.findall(r"^WRONG [^\n]{,240}", text, re.M)[:8] or text.splitlines()[-4:]
        results.append(result)
        merge(out, args.benches, parts)  # after each: what is cut off later leaves this behind
    return results


def merge(out: Path, names: list[str], parts: Path) -> list[dict[str, str]]:
    """One log, one page and one CSV of what the benches wrote (and decline's CSV by itself); the rows of the CSV."""
    pages, lines, rows = [], [], []
    with (out / "bench.log").open("w") as log:
        for part in sorted(parts.glob("*.log")):
            log.write(part.read_text(errors="replace") + "\n")
    for name in names:
        page, table = parts / f"{name}.md", parts / f"{name}.csv"
        if page.exists() and name != "decline":
            body = page.read_text().split("\n", 1)[1]
            pages.append(f"## {name}\n" + re.sub(r"\]\([^)]*?([^/)]+\.svg)\)", r"](\1)", body))
        if not table.exists():
            continue
        with table.open(newline="") as text:
            rows += csv.DictReader(text)
        if name == "decline":
            shutil.copy(table, out / "decline.csv")
        else:
            header, *body = table.read_text().splitlines()
            lines += ([] if lines else [header]) + body
    (out / "bench.md").write_text("# Benches\n\n" + "\n".join(pages))
    (out / "bench.csv").write_text("\n".join(lines) + "\n")
    return rows


# ------------------------------------------------------------------------------------------------ tables


def print_results(results: list[Result]) -> None:
    print("\nstage                    verdict        seconds  note")
    for r in results:
        print(f"{r.name:<24} {r.verdict:<14} {r.seconds:>7.0f}  {r.note}")
        for line in r.details:
            print(f"    {line}")


def print_bench(rows: list[dict[str, str]]) -> None:
    """One line a case: ours and the best peer. Of ops and decline only what is wrong, and a count."""
    cases: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        cases.setdefault((row["bench"], row["case"]), []).append(row)
    print(
        "\nbench: case                                                       ours us   best peer us            x   % of ceiling"
    )
    declined = slower = 0
    for (bench, case), group in cases.items():
        ours = next(row for row in group if row["ours"] == "True")
        peers = [row for row in group if row["ours"] != "True" and row["median_us"] != "nan"]
        peer = min(peers, key=lambda row: float(row["median_us"]), default=None)
        if bench == "decline":
            declined += 1
            slower += bool(ours["slower_than"])
        if ours["check"] in ("ok", "-") and bench in ("ops", "decline"):
            continue
        beaten = f"{float(peer['median_us']):>9.1f} {peer['candidate'][:22]:<22}" if peer else " " * 32
        mark = "" if ours["check"] in ("ok", "-") else f"  {ours['check'][:60]}"
        mark += "  SLOWER" if ours["slower_than"] else ""
        print(
            f"{(bench + ': ' + case)[:66]:<66} {float(ours['median_us']):>9.1f} {beaten} {float(ours['ratio']):>5.2f} "
            f"{float(ours['percent']):>6.1f} {ours['bound']}{mark}"
        )
    if declined:
        print(f"decline: stock is faster at {slower} of {declined} shapes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of logs and tables")
    parser.add_argument(
        "--quick", action="store_true", help="the tests and a short run of the peers, 330 seconds at most"
    )
    parser.add_argument(
        "--peers-seconds", type=float, default=60, help="of the peers' bench (default 60; all of it: 150)"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help=f"default: {','.join(STAGES)}")
    parser.add_argument("--benches", default=",".join(BENCHES), help=f"default: {','.join(BENCHES)}")
    parser.add_argument("--bench-args", default="", help="more arguments for every bench")
    parser.add_argument("--pytest-args", default="", help="more arguments for pytest")
    parser.add_argument("--workers", type=int, default=8, help="pytest processes (default 8)")
    parser.add_argument("--shards", type=int, default=2, help="processes of each sanitizer tool (default 2)")
    parser.add_argument("--tests-limit", type=float, default=LIMITS["tests"], help="seconds")
    parser.add_argument("--sanitize-limit", type=float, default=LIMITS["sanitize"], help="seconds, all tools together")
    parser.add_argument("--patience", type=float, default=1.0, help="multiplies the benches' time limits")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for everything")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    Process.end_of_suite = time.monotonic() + args.limit
    args.stages, args.benches = args.stages.split(","), [name for name in args.benches.split(",") if name]
    unknown = {*args.stages} - {*STAGES} | {*args.benches} - {*BENCHES}
    if unknown:
        parser.error(f"unknown stage or bench: {', '.join(sorted(unknown))}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("tests.log", "sanitize.log", "bench.log"):
        (out / stale).unlink(missing_ok=True)
    parts = Path(tempfile.mkdtemp())
    results: list[Result] = []
    warming = start_warming(args, parts) if "bench" in args.stages else []
    if "tests" in args.stages:
        results += run_tests(out, args)
    if "sanitize" in args.stages:
        results += run_sanitizers(out, args)
    rows: list[dict[str, str]] = []
    if "bench" in args.stages:
        results += [process.wait() for process in warming]
        results += run_benches(out, args, parts)
        rows = merge(out, args.benches, parts)
        print_bench(rows)
    shutil.rmtree(parts)
    print_results(results)
    return 0 if all(result.verdict == "ok" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
