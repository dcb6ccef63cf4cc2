"""Linear layers of few rows, whose cost is reading the weights, become one op that reads them as fast as memory gives them.

    %t = permute(%weight, [1, 0]); %y = mm(%x, %t)
->  %y = fi.linear(%x, %weight)

Only where that was measured to be faster than stock, in whole models (`docs/kernels/linear_cpu.md`, `linear_cuda.md`). Layers of
many rows, or of a number of rows that is not known, small ones and those of other dtypes are no sites: they are not even counted.
"""

from __future__ import annotations

import torch
import torch._inductor.config as inductor_config
from torch.fx import Graph

from ..normalize.linear import Linear, is_input, is_written, match_linear
from ..sites import Declined, GraphReport, Site, attempt
from ..subclasses import check_no_subclasses
from ..support import has_kernels
from ..walk import at_least, aten, divides, erase_dead, is_call, same_size, shape, source_line, value
from .decline import capability_of
from .emit import Emitter, replace

MAX_ROWS = 16
"""Rows that share one reading of the weights."""

LEAST_BYTES = {"cpu": 2 * 2**20, "cuda": 8 * 2**20}
"""Of a weight, by device. On the CPU whole steps were measured to gain nothing below; on CUDA nothing smaller was measured."""

DTYPES = {"cpu": (torch.bfloat16, torch.float16, torch.float32), "cuda": (torch.bfloat16, torch.float16)}
"""By device, those in which our kernel was measured to be faster."""


def rewrite_linears(graph: Graph, emitter: Emitter, report: GraphReport) -> None:
    for node in list(graph.nodes):
        if node._erased or not is_call(node, aten.mm.default, aten.addmm.default):
            continue
        site = Site("linear", node.name, source_line(node))
        with attempt(site):
            linear = match_linear(node)
            if linear is None or not reads_weights(linear):
                continue
            site.pieces = (_size_text(linear),)
            check_no_subclasses()
            check_linear(linear)
            arguments = [linear.input, linear.weight] + ([] if linear.bias is None else [linear.bias])
            replace(node, emitter.at(node).call(torch.ops.fi.linear.default, *arguments), emitter.fake_mode)
            erase_dead(graph, [node])
            site.grade = "linear"
        report.sites.append(site)


def reads_weights(linear: Linear) -> bool:
    """Few rows, known when the graph is compiled, and many weights."""
    rows, weight = shape(linear.input)[0], value(linear.weight)
    few = at_least(rows, 1) and at_least(MAX_ROWS, rows)
    taken = weight.dtype in DTYPES.get(weight.device.type, ())
    return few and taken and at_least(weight.numel() * weight.element_size(), LEAST_BYTES[weight.device.type])


def check_linear(linear: Linear) -> None:
    """Refuse what is no weight as it lies in memory, and what stock does as fast."""
    weight, name = linear.weight, linear.weight.name
    if not is_input(weight):
        raise Declined(f"{name}: the weight is computed in the graph")
    if is_written(weight):
        raise Declined(f"{name}: the graph writes to the weight")
    tensors = {"input": linear.input, "weight": weight, "bias": linear.bias}
    for what, node in tensors.items():
        if node is not None and not same_size(value(node).stride(-1), 1):
            raise Declined(f"{node.name}: {what} has no contiguous last dimension")
    device = value(weight).device
    if not has_kernels(device):
        raise Declined(f"{linear.node.name}: no kernels for device {device.type}")
    if device.type == "cuda":
        if (capability_of(device) or (0, 0)) < (8, 0):
            raise Declined(f"{linear.node.name}: no kernels for compute capability below 8.0")
        for node in (linear.input, weight):
            if not divides(8, shape(node)[1]) or not divides(8, value(node).stride(0)):
                raise Declined(f"{node.name}: its rows are not at 16-byte boundaries, as the fast kernel needs them")
    if device.type == "cpu" and not is_measured_cpu():
        raise Declined(
            f"{linear.node.name}: measured to be faster than stock torch only on CPUs with AVX-512 and no AMX"
        )
    for option in ("max_autotune", "max_autotune_gemm", "freezing"):
        if getattr(inductor_config, option):
            raise Declined(f"{linear.node.name}: config.{option} has stock torch choose or repack products")


def is_measured_cpu() -> bool:
    """Stock torch has other products on CPUs with AMX, without AVX-512 or of other makes, and it is not known whose are faster."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()


def _size_text(linear: Linear) -> str:
    out_features, in_features = shape(linear.weight)
    bias = "" if linear.bias is None else ", bias"
    return f"{shape(linear.input)[0]} x {in_features} to {out_features}{bias}"
