"""Ahead-of-time build of the native libraries: `python -m fi_ops.build [--device cpu] [--verbose] [--out DIR]`."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from . import _build


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fi_ops.build", description=__doc__)
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="which device's library to build")
    parser.add_argument("--out", type=Path, help="also copy the library to this folder")
    parser.add_argument("--verbose", action="store_true", help="show every compiler command")
    args = parser.parse_args(argv)
    try:
        path = _build.build_cpu(verbose=args.verbose)
    except _build.BuildError as e:
        print(e, file=sys.stderr)
        return 1
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = Path(shutil.copy2(path, args.out))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
