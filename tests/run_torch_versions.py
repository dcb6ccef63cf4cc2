"""The rewrite tests and the registry sweep under several releases of torch: `make test-matrix`, TORCH="2.11.0 2.15.0" for those.

Each version has a virtual environment of its own, `.venvs/torch-<version>`, which later runs use again; everything but torch is
as in constraints.txt. A version that can't be installed is an error only where it was asked for by name.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

VERSIONS = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
ROOT = Path(__file__).resolve().parent.parent
VENVS = ROOT / ".venvs"
TESTS = ("test_inductor_*.py", "test_zoo.py", "test_every_op.py")
NEEDED = ("ninja", "pytest>=8", "pytest-xdist", "expecttest>=0.2", "transformers>=5", "hypothesis>=6", "numpy")


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


def test(version: str, pytest_args: list[str]) -> tuple[bool, str]:
    """(whether all passed, pytest's last line)."""
    files = [str(path) for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    built = subprocess.run([python(version), "-m", "fi_ops.build", "--device", "cpu"], cwd=ROOT)
    if built.returncode:
        return False, "the CPU library does not build"
    command = [python(version), "-m", "pytest", "-p", "no:cacheprovider", *files, *pytest_args]
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode == 0, re.sub(r"^=+ | =+$", "", last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help=f"default: {' '.join(VERSIONS)}")
    parser.add_argument("--pytest-args", default="", help="more for pytest, e.g. '-n 4'")
    args = parser.parse_args()
    VENVS.mkdir(exist_ok=True)
    failed, lines = False, []
    for version in args.versions or VERSIONS:
        if error := install(version):
            failed |= bool(args.versions)
            lines.append(f"torch {version}: not installed ({error})")
        else:
            print(f"fi_ops: torch {version}", flush=True)
            passed, said = test(version, shlex.split(args.pytest_args))
            failed |= not passed
            lines.append(f"torch {version}: {'passed' if passed else 'FAILED'} ({said})")
    print("\n".join(["", *lines]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
