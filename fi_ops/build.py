"""Ahead-of-time build of the native libraries: `python -m fi_ops.build [--device cpu|cuda|all] [--verbose] [--out DIR]`.

`--out fi_ops/_lib` makes libraries that this package finds there on another machine too, without a compiler or nvcc, as
long as its sources are the same.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from . import _build, _build_cuda


def _library(device: str, verbose: bool) -> tuple[Path, str]:
    """The library's path, built where needed, and its name among prebuilt ones."""
    if device == "cpu":
        return _build.build_cpu(verbose=verbose), _build.prebuilt_name(device)
    archs = _build_cuda.selected_archs()
    path = _build_cuda.build_cuda(verbose=verbose, archs=archs)
    return path, _build.prebuilt_name(device, _build_cuda.prebuilt_variant(archs))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fi_ops.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda", "all"], default="cpu", help="whose library (default: cpu)")
    parser.add_argument("--out", type=Path, help="also copy it to this folder, under the name of a prebuilt library")
    parser.add_argument("--verbose", action="store_true", help="show every compiler command")
    args = parser.parse_args(argv)
    for device in ("cpu", "cuda") if args.device == "all" else (args.device,):
        try:
            path, name = _library(device, args.verbose)
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
