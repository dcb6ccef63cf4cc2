"""The benches' command line.

python -m bench sampling                       # top-k, top-p samplers against Hugging Face's, gpt-fast's, vLLM's
python -m bench sampling --full --device cuda  # the same at vocabularies of 32000 to 262144, batches of 1 to 512
python -m bench single_decode --batch 8        # attention of one new token
python -m bench batch_decode --batch 16        # decode over a paged cache: lengths, pages, fp8, a shared prefix, the plan
python -m bench batch_prefill --length 4096    # prompts of a batch, paged and ragged; chunked prefill
python -m bench mla                            # DeepSeek's latent attention: decode over a compressed paged cache
python -m bench sparse                         # block-sparse attention, vector-sparse, by head
python -m bench filters                        # softmax, renorm, top-k, log-probabilities, penalties, draft chains
python -m bench generate                       # the sampling step of Hugging Face's generate
python -m bench linear --batch 1               # linear layers of few rows
python -m bench pages --length 4096            # paged caches: append, copies, index tensors
python -m bench single_prefill --dtype float32
python -m bench models --quick                 # whole decode steps, stock torch.compile against fi_ops
python -m bench families --only gemma          # forward, prefill and decode of Hugging Face families
python -m bench peers                          # attention against everybody who is here, a line a case, a page and plots
python -m bench peers --family prefill --device cuda --seconds 60   # one of its families, in a minute
python -m bench ops                            # every op of the registry on its typical sample
python -m bench models --device cuda --kernels     # which kernels a step spends its time in
python -m bench all --quick --markdown bench/results/mine.md
python -m bench all --device cuda --csv rows.csv --plot plots/
python -m bench decline --device cuda --csv decline.csv     # where is stock attention faster? (not part of `all`, nor is `peers`)
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
from pathlib import Path

import torch

from . import comparison, harness, plot
from .clock import clock_of
from .machine import Ceilings, describe, slug
from .output import Report

BENCHES = {
    "single_prefill": "bench_single_prefill",
    "single_decode": "bench_single_decode",
    "batch_prefill": "bench_batch_prefill",
    "batch_decode": "bench_batch_decode",
    "mla": "bench_mla",
    "sparse": "bench_sparse",
    "sampling": "bench_sampling",
    "filters": "bench_filters",
    "generate": "bench_generate",
    "linear": "bench_linear",
    "pages": "bench_pages",
    "models": "bench_models",
    "families": "bench_families",
    "ops": "bench_ops",
    "decline": "bench_decline",
    "peers": "bench_peers",
}
ALL = [name for name in BENCHES if name not in ("decline", "peers")]
RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TURN = {"cpu": 0.03, "cuda": 0.002}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bench", choices=[*BENCHES, "all"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: the bench's own (bfloat16; samplers float32)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: as torch chooses)")
    parser.add_argument("--batch", type=int, help="only this batch size")
    parser.add_argument("--length", type=int, help="only this length (prefill, decode, pages, batches, sparse)")
    parser.add_argument("--vocab", type=int, help="sampling, filters: this vocabulary (default 128256)")
    parser.add_argument("--only", metavar="TEXT", help="families: those whose name has this in it")
    parser.add_argument("--family", metavar="NAME", help="peers: only prefill, batch, decode, mla or fp8")
    parser.add_argument("--seconds", type=float, help="peers: time for everything; what it does not reach is left out")
    parser.add_argument("--no-compile", action="store_true", help="leave out the torch.compile peers")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and turns")
    parser.add_argument(
        "--full", action="store_true", help="more compiled peers, families and cases than fit in 4 minutes"
    )
    parser.add_argument("--turns", type=int, default=15, help="turns of each candidate (default 15)")
    parser.add_argument("--turn", type=float, help="seconds of a turn (default 0.03; CUDA 0.002)")
    parser.add_argument("--warm", action="store_true", help="time nothing: compile and run each candidate once")
    parser.add_argument(
        "--kernels", action="store_true", help="models on CUDA: print the kernels of a step, time nothing"
    )
    parser.add_argument("--csv", type=Path, help="write all rows to this file")
    parser.add_argument("--markdown", type=Path, help="write a page for bench/results/")
    parser.add_argument("--plot", type=Path, help="write SVGs of the rate against length to this folder")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench: torch sees no CUDA device; leave --device out to measure the CPU", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    options = harness.Options(
        device=args.device, dtype=DTYPES.get(args.dtype), threads=args.threads, quick=args.quick, full=args.full,
        batch=args.batch, length=args.length, vocab=args.vocab, only=args.only, family=args.family, seconds=args.seconds,
        compiled=not args.no_compile, turns=args.turns,
        turn=TURN[args.device] if args.turn is None else args.turn, warm=args.warm, kernels=args.kernels,
    )  # fmt: skip
    torch.manual_seed(0)
    report, prefix = Report(csv=args.csv, markdown=args.markdown), ""
    if args.bench == "peers":
        report.show, report.tables = comparison.show, comparison.tables
        if not args.markdown and not args.warm:
            prefix = f"{datetime.date.today()}-{slug(args.device)}-"
            report.markdown, args.plot = RESULTS / f"{prefix}peers.md", args.plot or RESULTS
    _write_header(report, options, sys.argv[1:] if argv is None else argv)
    with torch.no_grad():
        for name in ALL if args.bench == "all" else [args.bench]:
            module = importlib.import_module(f".{BENCHES[name]}", __package__)
            harness.run(name, module.cases(options), options, report)
    if args.plot:
        report.plots = plot.write_plots(report, args.plot, prefix)
    report.header += options.left_out
    report.save()
    print("\n".join([*options.left_out, *(f"wrote {path}" for path in (report.markdown, *report.plots) if path)]))
    return _verdict(report)


def _write_header(report: Report, options: harness.Options, argv: list[str]) -> None:
    dtype = options.pick(torch.bfloat16)
    ceilings = Ceilings(options.device, dtype, clock_of(options.device))
    for name in ("read", "gemm") * 20:
        ceilings.probe(name)
    measured = f"ceilings at the start: {ceilings}, {str(dtype).removeprefix('torch.')}"
    report.header = [*describe(options.device), measured, f"`python -m bench {' '.join(argv)}`"]
    print("\n".join(report.header), flush=True)


def _verdict(report: Report) -> int:
    """1 when an output was wrong, or ours could not do its job; a peer that can't do it is not our fault."""
    wrong = 0
    for row in report.rows:
        failed = row.check.startswith("fails")
        if row.check not in ("ok", "-") and (not failed or row.ours):
            print(f"WRONG {row.bench}: {row.case}: {row.candidate}: {row.check}", file=sys.stderr)
            wrong += 1
        if row.slower_than:
            print(f"slower than {row.slower_than}: {row.bench}: {row.case}: {1 / row.ratio:.2f} x its time")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
