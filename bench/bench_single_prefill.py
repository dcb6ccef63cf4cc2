"""Attention of a whole prompt, one sequence: 32 query heads, 8 KV heads, head_dim 128, causal and full."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fi_ops.library import SPECS

from . import stock
from .harness import NAN, Candidate, Case, Options, copies_beyond_caches, within_budget

SPEC = SPECS["attention"]


@dataclass(frozen=True)
class Shape:
    length: int
    causal: bool
    heads: tuple[int, int] = (32, 8)  # of queries, of keys and values
    dims: tuple[int, int] = (128, 128)  # of queries and keys, of values

    @property
    def model(self) -> str:
        """The heads and their width, as `32/8 x 128`."""
        width = "/".join(map(str, dict.fromkeys(self.dims)))
        return f"{self.heads[0]}/{self.heads[1]} x {width}"

    @property
    def kind(self) -> str:
        return "causal" if self.causal else "full"


CPU = [Shape(512, True), Shape(512, False), Shape(2048, True), Shape(2048, False)]
CUDA_QUICK = [Shape(1024, True), Shape(4096, True), Shape(4096, False)]
CUDA = [*[Shape(n, True) for n in (256, 1024, 4096, 16384)], *[Shape(n, False) for n in (1024, 4096, 16384)]]
WITH_FLEX = {Shape(4096, True), Shape(4096, False)}
# On an H100, bfloat16: microseconds, or TFLOP/s.
TARGET_US = {Shape(1024, True): 33.0}
TARGET_TFLOPS = {Shape(4096, True): 550, Shape(4096, False): 640, Shape(16384, True): 630, Shape(16384, False): 650}
CHECKED_ROWS = 256  # of a head


def shapes(options: Options) -> list[Shape]:
    if options.length:
        return [Shape(options.length, True), Shape(options.length, False)]
    if options.device == "cpu":
        return CPU[:2] if options.quick else CPU
    return CUDA_QUICK if options.quick else CUDA


def some_rows(length: int) -> torch.Tensor:
    """At most CHECKED_ROWS of them: the first, the last, and others at random."""
    ends = CHECKED_ROWS // 8
    if length <= CHECKED_ROWS:
        return torch.arange(length)
    middle = ends + torch.randperm(length - 2 * ends)[: CHECKED_ROWS - 2 * ends].sort().values
    return torch.cat([torch.arange(ends), middle, torch.arange(length - ends, length)])


def check(query, key, value, causal: bool) -> Callable[[object], str]:
    """By the reference on some rows of every head, a KV head at a time: float64 scores of all rows would not fit."""
    rows = some_rows(query.shape[2]).to(query.device)
    seen = rows[:, None] >= torch.arange(key.shape[2], device=query.device) if causal else None
    group = query.shape[1] // key.shape[1]
    wide, same = [], []
    for head in range(key.shape[1]):
        parts = query[:, head * group :][:, :group, rows], key[:, head : head + 1], value[:, head : head + 1]
        wide.append(SPEC.reference(*(t.double() for t in parts), seen))
        same.append(SPEC.reference(*parts, seen))
    return within_budget(torch.cat(wide, 1), torch.cat(same, 1), lambda out: out[:, :, rows])


def _ours(query, key, value, causal):
    return torch.ops.fi.attention(query, key, value, causal=causal)


def _target(shape: Shape, flops: int) -> float:
    return TARGET_US.get(shape) or (flops / TARGET_TFLOPS[shape] * 1e-6 if shape in TARGET_TFLOPS else NAN)


def case(shape: Shape, options: Options, with_flex: bool = False) -> Case:
    dtype, device, (dim, dim_vo) = options.pick(torch.bfloat16), options.device, shape.dims

    def rand(heads: int, width: int) -> torch.Tensor:
        return torch.randn(1, heads, shape.length, width, device=device).to(dtype)

    query, key, value = rand(shape.heads[0], dim), rand(shape.heads[1], dim), rand(shape.heads[1], dim_vo)
    cost = SPEC.cost(query, key, value, causal=shape.causal)
    inputs = copies_beyond_caches((query, key, value, shape.causal), cost.bytes, at_most=4)
    return Case(
        f"{shape.model}, n={shape.length} {shape.kind}, {str(dtype).removeprefix('torch.')}",
        [
            *stock.dense_peers(inputs, options, with_flex),
            Candidate("fi_ops", _ours, ours=True, inputs=inputs),
        ],
        cost,
        check(query, key, value, shape.causal),
        dtype,
        target_us=_target(shape, cost.flops) if device == "cuda" and dtype == torch.bfloat16 else NAN,
        series=f"{shape.model}, {shape.kind}",
        length=shape.length,
    )


def cases(options: Options) -> Iterator[Case]:
    for shape in shapes(options):
        yield case(shape, options, options.device == "cuda" and (options.full or shape in WITH_FLEX))
