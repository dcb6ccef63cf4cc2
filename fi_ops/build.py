"""Ahead-of-time build of the native libraries: `python -m fi_ops.build [--device cpu|cuda|all] [--report] [--out DIR]`.

Each CUDA kernel that is compiled gets a line: what ptxas gave it of registers, spills, stack and static shared memory.
`--report` prints those lines for the whole library, also for what was compiled before.

`--out fi_ops/_lib` makes libraries that this package finds there on another machine too, without a compiler or nvcc, as
long as its sources are the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from . import _build, _build_cuda, _build_report


def _library(device: str, verbose: bool, report: bool) -> tuple[Path, str]:
    """The library's path, built where needed, and its name among prebuilt ones."""
    if device == "cpu":
        return _build.build_cpu(verbose=verbose), _build.prebuilt_name(device)
    archs = _build_cuda.selected_archs()
    path = _build_cuda.build_cuda(verbose=verbose, archs=archs, every_kernel=not report)
    if report:
        plan = _build_cuda.cuda_plan(archs)
        print("\n".join(_build_report.kernel_lines(plan, plan.jobs)), file=sys.stderr)
    return path, _build.prebuilt_name(device, _build_cuda.prebuilt_variant(archs))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fi_ops.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda", "all"], default="cpu", help="whose library (default: cpu)")
    parser.add_argument("--out", type=Path, help="also copy it to this folder, under the name of a prebuilt library")
    parser.add_argument("--report", action="store_true", help="cuda: a line for every kernel of the library")
    parser.add_argument("--verbose", action="store_true", help="show every compiler command")
    args = parser.parse_args(argv)
    for device in ("cpu", "cuda") if args.device == "all" else (args.device,):
        try:
            path, name = _library(device, args.verbose, args.report)
        except _build.BuildError as e:
            print(e, file=sys.stderr)
            return 1
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            path = Path(shutil.copy2(path, args.out / name))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
