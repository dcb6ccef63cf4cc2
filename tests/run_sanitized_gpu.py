"""Every op of the registry on the GPU, once for each dtype on its first sample: the program to run under compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/run_sanitized_gpu.py
    compute-sanitizer --tool racecheck python tests/run_sanitized_gpu.py --shard 1/4 --samples 2

Not collected by pytest, and results are not compared (`test_every_op.py` does that): the sanitizer is the judge here.
Under memcheck set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation with bounds of its own.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

import torch

import fi_ops  # noqa: F401  (defines torch.ops.fi)
from fi_ops.library import SPECS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="1/1", help="i/n: only every n-th call, from the i-th on")
    parser.add_argument("--samples", type=int, default=1, help="samples of each op and dtype (default 1)")
    parser.add_argument("--only", default="", help="only ops with this in their name")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("run_sanitized_gpu: torch sees no CUDA device", file=sys.stderr)
        return 2
    first, count = (int(part) for part in args.shard.split("/"))
    todo = [(spec, dtype) for spec in SPECS.values() if args.only in spec.name for dtype in spec.dtypes]
    failures = 0
    for spec, dtype in todo[first - 1 :: count]:
        label = f"fi::{spec.name} {str(dtype).removeprefix('torch.')}"
        for sample in itertools.islice(spec.samples(torch.device(args.device), dtype), args.samples):
            began = time.perf_counter()
            try:
                spec.overload(*sample.args, **sample.kwargs)
                if args.device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:
                failures += 1
                print(f"FAILED {label} [{sample.name}]: {type(error).__name__}: {error}", flush=True)
            else:
                print(f"ran {label} [{sample.name}] in {time.perf_counter() - began:.2f} s", flush=True)
    print(f"{len(todo[first - 1 :: count])} calls, {failures} failures", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
