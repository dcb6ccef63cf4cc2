"""Greedy decoding on the CPU: the argmax of a whole vocabulary becomes a top-k of one.

    argmax(logits, -1)
->  %values, %ids = fi.top_k(logits, 1)

Both take NaN for the largest, and the lowest id among equals. Inductor's argmax on the CPU compares one by one; the op took 0.75
to 0.1 of its time at every size and number of threads that is rewritten (`docs/rewrites.md`). On CUDA it is left to Inductor. So it
is wherever logits are computed by pointwise code, in whose loop Inductor compares them.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from ..normalize.order import over_last
from ..sites import GraphReport, Site, attempt, check_switched_on
from ..subclasses import check_no_subclasses
from ..support import DTYPES, has_kernels
from ..walk import argument, at_least, aten, erase_dead, is_call, is_cast, shape, source_line, strip, value
from .emit import Emitter, replace, viewed

MIN_VOCAB, MIN_LOGITS = 32_000, 64_000
"""Below, nothing was measured to be gained: a call of an op takes as long as the argmax of a small row."""

_IN_MEMORY = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
"""Calls whose result Inductor stores, whatever reads it."""


def rewrite_greedy(graph: Graph, emitter: Emitter, report: GraphReport) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.argmax.default):
        logits = _logits(node)
        if logits is None:
            continue
        site = Site("sampling", node.name, source_line(node))
        with attempt(site):
            check_switched_on("sampling")
            check_no_subclasses()
            _apply(node, logits, emitter)
            erase_dead(graph, [node])
            site.grade, site.pieces = "top_k", ("greedy",)
        report.sites.append(site)


def _logits(node: Node) -> Node | None:
    """The rows, [B, V] or [V], that the node is the argmax of, where the op is known to be faster."""
    logits = strip(node.args[0])
    while is_cast(logits) and _keeps_order(value(logits.args[0]).dtype, value(logits).dtype):
        logits = strip(logits.args[0])
    known, dim = value(logits), argument(node, 1, "dim", None)
    if known.device.type != "cpu" or known.dtype not in DTYPES or known.dim() not in (1, 2):
        return None
    if not has_kernels(known.device) or (known.dim() != 1 if dim is None else not over_last(logits, dim)):
        return None
    if not at_least(shape(logits)[-1], MIN_VOCAB) or not at_least(known.numel(), MIN_LOGITS):
        return None
    source = viewed(logits)
    in_memory = source.op == "placeholder" or is_call(source, *_IN_MEMORY) or _is_ours(source)
    return logits if in_memory and known.stride(-1) == 1 else None


def _keeps_order(source: torch.dtype, target: torch.dtype) -> bool:
    return source.is_floating_point and target.is_floating_point and source.itemsize <= target.itemsize


def _is_ours(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "fi"


def _apply(node: Node, logits: Node, emitter: Emitter) -> None:
    emitter.at(node)
    rows = emitter.call(aten.unsqueeze.default, logits, 0) if len(shape(logits)) == 1 else logits
    ids = emitter.item(emitter.call(torch.ops.fi.top_k.default, rows, 1), 1)
    wanted = len(shape(node))
    if len(shape(logits)) == 1:
        ids = emitter.call(aten.select.int, ids, 0, 0)
    if wanted < len(shape(ids)):
        ids = emitter.call(aten.select.int, ids, -1, 0)
    replace(node, ids, emitter.fake_mode)
