"""Attention against everybody who is here, one line a case: torch's flash and cuDNN kernels, FlexAttention compiled, FlashInfer.

Families (`--family`): `prefill`, one dense sequence over head widths, head counts and lengths; `batch`, ragged and paged prompts,
appends and chunks; `decode`, dense and over pages; `mla`, decode over a compressed cache; `fp8`, queries, keys and values of 8
bits. FlashInfer's FA2 and FA3 templates take
part where it is installed (what it has to compile it compiles in the check: a first run with `--warm` keeps that out of the
budget). Every result is checked against float64 first; a wrong one is reported and not timed.

`--seconds` is the time for everything, compilation included. Each family gets its share of what is left when it starts and runs
its cases in order of weight; what was left out is said. The page and its plots go to `bench/results/`, named after the day and the
machine, unless `--markdown` and `--plot` say where.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from . import bench_batch_decode, bench_batch_prefill, bench_mla, bench_single_decode, bench_single_prefill, peers_fp8
from .batches import PAGE_SIZE
from .bench_single_prefill import Shape
from .harness import Case, Options

Makers = list[Callable[[], Case]]
BATCH_OPS = ("paged_attention", "ragged_attention")
DIMS = ((128, 128), (64, 64), (256, 256), (192, 128), (96, 96))
HEADS = ((32, 32), (16, 2), (128, 128))
LENGTHS = (4096, 1024, 16384, 2048, 8192, 512)
# Each takes seconds to compile.
WITH_FLEX = {Shape(4096, True), Shape(4096, False), Shape(16384, True), Shape(4096, True, dims=(64, 64))}
WITH_FLEX_QUICK = {Shape(4096, True)}


def prefill_shapes(options: Options) -> list[Shape]:
    if options.length:
        return [Shape(options.length, causal, dims=dims) for dims in DIMS[:4:3] for causal in (True, False)]
    if options.device == "cpu":
        lengths, dims = ((128, 512), DIMS[:2]) if options.quick else ((512, 1024, 2048), DIMS)
        return [Shape(n, causal, dims=d) for d in dims for n in lengths for causal in (True, False)]
    if options.quick:
        usual = [Shape(4096, True), Shape(4096, False), Shape(1024, True), Shape(16384, True)]
        return [*usual, *(Shape(4096, True, dims=d) for d in DIMS[1:]), *(Shape(4096, True, h) for h in HEADS)]
    shapes = [Shape(n, causal) for n in LENGTHS for causal in (True, False)]
    wide = [Shape(n, causal, dims=d) for n, d in itertools.product(LENGTHS, DIMS[1:]) for causal in (True, False)]
    many = [Shape(n, causal, h) for n, h in itertools.product((4096, 1024, 16384), HEADS) for causal in (True, False)]
    deepseek = [Shape(n, True, (128, 128), (192, 128)) for n in (4096, 1024, 16384)]
    # by turns, so that a run cut short has some of each
    mixed = itertools.chain.from_iterable(itertools.zip_longest(wide, many, deepseek))
    return [*shapes, *(shape for shape in mixed if shape)]


def prefill(options: Options) -> Makers:
    flex = WITH_FLEX_QUICK if options.quick else WITH_FLEX
    return [
        partial(bench_single_prefill.case, shape, options, options.device == "cuda" and (options.full or shape in flex))
        for shape in prefill_shapes(options)
    ]


def batch(options: Options) -> Makers:
    make = bench_batch_prefill
    if options.length:
        return [partial(make.prompts, op, options.batch or 2, options.length, options) for op in BATCH_OPS]
    if options.device == "cpu":
        equal, mixed, appends, chunks = [(1, 512), (4, 512)], [(8, 256)], [(4, 16, 1024)], [(15, 512, 256, 512)]
    else:
        equal = [(1, 4096), (16, 1024), (1, 16384), (1, 1024), (4, 4096)]
        mixed, chunks = [(16, 1024)], [(63, 2048, 1024, 3072)]
        appends = [(8, 16, 8192), (8, 128, 8192)]
    if options.quick:
        equal, mixed, appends, chunks = equal[:2], [], appends[:1], []
    makers: Makers = [partial(make.prompts, op, *shape, options) for shape in equal for op in BATCH_OPS]
    makers += [partial(make.mixed_prompts, op, *shape, options) for shape in mixed for op in BATCH_OPS]
    makers += [partial(make.appended, BATCH_OPS[0], *shape, options) for shape in appends]
    return makers + [partial(make.chunked, *shape, options) for shape in chunks]


def decode(options: Options) -> Makers:
    if options.length:
        shapes = [(options.batch or 2, options.length)]
    elif options.device == "cpu":
        shapes = [(1, 4096), (8, 2048)]
    else:
        shapes = [(16, 4096), (1, 2048), (64, 8192), (128, 1024), (1, 32768)]
    dtype = options.pick(bench_batch_decode.DTYPE)
    makers: Makers = []
    for size, length in shapes[:2] if options.quick else shapes:
        makers.append(partial(bench_single_decode.dense, size, length, bench_single_decode.KV_HEADS, options))
        paged = ("decode", [length] * size, PAGE_SIZE, None, dtype, options.device)
        makers.append(partial(bench_batch_decode.attention, *paged))
    return makers


def mla(options: Options) -> Makers:
    return [partial(bench_mla.case, shape, options) for shape in bench_mla.shapes(options)]


@dataclass(frozen=True)
class Family:
    makers: Callable[[Options], Makers]
    weight: float  # of the time


FAMILIES = {
    "prefill": Family(prefill, 5),
    "batch": Family(batch, 2),
    "decode": Family(decode, 1),
    "mla": Family(mla, 2),
    "fp8": Family(peers_fp8.makers, 2),
}


def cases(options: Options) -> Iterator[Case]:
    """All of the families asked for, as far as the time goes; `options.left_out` gets a line for what it does not reach."""
    if options.family and options.family not in FAMILIES:
        raise SystemExit(f"bench: no family {options.family!r} of peers; pass one of {', '.join(FAMILIES)}")
    chosen = {name: family for name, family in FAMILIES.items() if options.family in (None, name)}
    left = sum(family.weight for family in chosen.values())
    until = time.monotonic() + (float("inf") if options.seconds is None else options.seconds)
    for name, family in chosen.items():
        now = time.monotonic()
        end, makers = now + (until - now) * family.weight / left, family.makers(options)
        left -= family.weight
        for i, make in enumerate(makers):
            if time.monotonic() >= end:
                options.left_out.append(f"{name}: {len(makers) - i} of {len(makers)} cases were left out: no time")
                break
            case = make()
            case.family = name
            yield case
