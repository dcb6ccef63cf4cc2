"""The benches' command line.

python -m bench sampling                       # top-k, top-p samplers against stock torch
python -m bench single_decode --batch 8        # attention of one new token
python -m bench single_prefill --dtype float32
python -m bench models --quick                 # whole decode steps, stock torch.compile against fi_ops
python -m bench ops                            # every op of the registry on its typical sample
python -m bench all --quick --markdown bench/results/mine.md
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from . import harness

BENCHES = {
    "single_prefill": "bench_single_prefill",
    "single_decode": "bench_single_decode",
    "sampling": "bench_sampling",
    "models": "bench_models",
    "ops": "bench_ops",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", choices=[*BENCHES, "all"])
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: the bench's own (bfloat16; samplers float32)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: as torch chooses)")
    parser.add_argument("--batch", type=int, help="only this batch size")
    parser.add_argument("--length", type=int, help="only this length (prefill, decode) or vocabulary (sampling)")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile peers")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and turns")
    parser.add_argument("--turns", type=int, default=15, help="turns of each candidate (default 15)")
    parser.add_argument("--turn", type=float, default=0.03, help="seconds of a turn (default 0.03)")
    parser.add_argument("--csv", type=Path, help="write all rows to this file")
    parser.add_argument("--markdown", type=Path, help="write a page for bench/results/")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    options = harness.Options(
        device=args.device, dtype=DTYPES.get(args.dtype), threads=args.threads, quick=args.quick, batch=args.batch,
        length=args.length, compiled=not args.no_compile, turns=args.turns, turn=args.turn,
    )  # fmt: skip
    torch.manual_seed(0)
    command = "python -m bench " + " ".join(sys.argv[1:] if argv is None else argv)
    dtype = options.pick(torch.bfloat16)
    ceilings = harness.Ceilings(dtype)
    for _ in range(20):
        ceilings.probe()
    gb_s, gflop_s = ceilings.rate("read") / 1e9, ceilings.rate("gemm") / 1e9
    measured = (
        f"ceilings at the start: read {gb_s:.1f} GB/s, GEMM {gflop_s:.0f} GFLOP/s ({str(dtype).removeprefix('torch.')})"
    )
    report = harness.Report(header=[*harness.describe(), measured, f"`{command}`"])
    print("\n".join(report.header))
    with torch.no_grad():
        for name in BENCHES if args.bench == "all" else [args.bench]:
            module = importlib.import_module(f".{BENCHES[name]}", __package__)
            harness.run(name, module.cases(options), options, report)
    if args.csv:
        harness.write_csv(report, args.csv)
    if args.markdown:
        harness.write_markdown(report, args.markdown)
    wrong = [row for row in report.rows if row.check not in ("ok", "-") and not row.check.startswith("fails")]
    for row in wrong:
        print(f"WRONG {row.bench}: {row.case}: {row.candidate}: {row.check}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
