"""The rewrite tests and the registry sweep under several releases of torch: `make test-matrix`, TORCH="2.11.0 2.15.0" for those.

Each version has a virtual environment of its own, `.venvs/torch-<version>`, which later runs use again; everything but torch is
as in constraints.txt. The native library is compiled with that version's headers, too. A version that can't be installed is an
error only where it was asked for by name. SUBSET=6 runs a sixth of each test's cases.

At the end stands a table, test files by versions, of how many cases passed, failed and were skipped; what pytest said of each
version is kept in `.venvs/results-<version>.xml`.
"""

from __future__ import annotations

import argparse
import collections
import os
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

VERSIONS = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
TESTS = ("test_inductor_*.py", "test_zoo.py", "test_every_op.py")
LEFT_OUT = "tests/test_every_op.py::test_lower_isa_levels"  # slow, and about kernels: the release of torch is no matter
NEEDED = ("ninja", "pytest>=8", "pytest-xdist", "expecttest>=0.2", "transformers>=5", "hypothesis>=6", "numpy")

Counts = dict[str, collections.Counter[str]]  # of a test file: how many "passed", "failed", "skipped"


def install(version: str) -> str | None:
    """Set up the environment of one version; what went wrong, or None."""
    folder, constraints = VENVS / f"torch-{version}", VENVS / f"constraints-{version}.txt"
    # pip takes the CPU build of a version (2.13.0+cpu) where it finds one
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("torch==")]
    text, ready = "\n".join([*pins, ""]), folder / ".ready"
    if ready.exists() and ready.read_text() == text:
        return None
    print(f"fi_ops: installing torch {version} into {folder.relative_to(ROOT)} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints.write_text(text)
    pip = [python(version), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
    for wanted in (
        [f"torch=={version}", "ninja", "setuptools"],
        ["--no-build-isolation", "--no-deps", "-e", str(ROOT)],
        [f"torch=={version}", *NEEDED],
    ):
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return (errors or done.stderr.splitlines() or ["pip failed"])[-1]
    ready.write_text(text)
    return None


def python(version: str) -> str:
    return str(VENVS / f"torch-{version}" / "bin" / "python")


def test(version: str, pytest_args: list[str]) -> tuple[str | None, Counts]:
    """(what went wrong, or None; what became of each file's cases)."""
    files = [str(path) for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    results = VENVS / f"results-{version}.xml"
    results.unlink(missing_ok=True)
    environment = os.environ | {
        "FI_OPS_CACHE_DIR": str(VENVS / f"torch-{version}" / "fi_ops"),
        "TORCHINDUCTOR_CACHE_DIR": str(VENVS / f"torch-{version}" / "inductor"),
    }
    build = [python(version), "-m", "fi_ops.build", "--device", "cpu"]
    if subprocess.run(build, cwd=ROOT, env=environment).returncode:
        return "the CPU library does not build", {}
    command = [python(version), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={results}"]
    command += [f"--deselect={LEFT_OUT}", *files, *pytest_args]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    return (None if code == 0 else f"pytest exited with {code}"), counts(results)


def counts(results: Path) -> Counts:
    found: Counts = collections.defaultdict(collections.Counter)
    for case in ElementTree.parse(results).iter("testcase") if results.exists() else ():
        outcomes = {child.tag for child in case}
        said = "failed" if outcomes & {"failure", "error"} else "skipped" if "skipped" in outcomes else "passed"
        # "tests.test_zoo" in the class of a test; a file that can't be imported is the name of its one "case"
        name = next(
            part for part in f"{case.get('classname')}.{case.get('name')}".split(".") if part.startswith("test_")
        )
        found[name][said] += 1
    return found


def table(ran: dict[str, tuple[str, Counts]]) -> str:
    """Test files by versions, in a cell what passed, `+ 1 FAILED`, `(3 skipped)`; the last rows are sums and how it went."""

    def cell(counter: collections.Counter[str]) -> str:
        failed, skipped = counter["failed"], counter["skipped"]
        return f"{counter['passed']}" + f" + {failed} FAILED" * bool(failed) + f" ({skipped} skipped)" * bool(skipped)

    names = sorted({name for _, files in ran.values() for name in files})
    rows = [["", *(f"torch {version}" for version in ran)]]
    rows += [[name, *(cell(files.get(name, collections.Counter())) for _, files in ran.values())] for name in names]
    rows.append(["all", *(cell(sum(files.values(), collections.Counter())) for _, files in ran.values())])
    rows.append(["", *(said for said, _ in ran.values())])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--one-in", type=int, default=1, metavar="N", help="an Nth of each test's cases")
    parser.add_argument("--pytest-args", default="", help="more for pytest, e.g. '-n 4'")
    args = parser.parse_args()
    VENVS.mkdir(exist_ok=True)
    failed, ran = False, {}
    for version in args.versions or VERSIONS:
        if error := install(version):
            failed |= bool(args.versions)
            print(f"fi_ops: torch {version} is not installed: {error}", flush=True)
            ran[version] = ("not installed", {})
            continue
        print(f"fi_ops: torch {version}", flush=True)
        start = time.monotonic()
        error, files = test(version, [f"--one-in={args.one_in}", *shlex.split(args.pytest_args)])
        failed |= error is not None
        ran[version] = (f"{'FAILED: ' + error if error else 'passed'}, {time.monotonic() - start:.0f} s", files)
    print(f"\n{table(ran)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
