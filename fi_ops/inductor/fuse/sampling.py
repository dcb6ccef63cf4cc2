"""Samplers become one fi op that makes one pass over the logits: no sort, no softmax in memory, one random number a row.

    %e = exponential(...); argmax(softmax(where(%l / t < topk(%l / t, k)[-1], -inf, %l / t)) / %e)
->  %u = rand([B]); %id, %ok = fi.top_k_top_p_sampling_from_logits(%l, %u, top_k=k, temperature=t, top_k_ties="threshold")

Ties at the k-th value are all kept ("threshold"), as in the graphs this replaces. The distribution is the same, the random
numbers are other ones: where `config.fallback_random` asks for torch's own, nothing is rewritten.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import torch
import torch._inductor.config as inductor_config
from torch.fx import Graph

from ..normalize.sampler import Sampler, match_sampler
from ..sites import Declined, GraphReport, Site, attempt, check_switched_on
from ..subclasses import check_no_subclasses
from ..walk import argument, aten, erase_dead, is_call, prims, shape, source_line, value
from .attention import exclusive_to
from .emit import Emitter, replace


def rewrite_samplers(graph: Graph, emitter: Emitter, report: GraphReport) -> None:
    for node in list(graph.nodes):
        if node._erased or not is_call(node, aten.multinomial.default, aten.argmax.default):
            continue
        site = Site("sampling", node.name, source_line(node))
        with attempt(site):
            sampler = match_sampler(node)
            if sampler is None:
                continue
            check_switched_on("sampling")
            check_no_subclasses()
            _check_exclusive(sampler)
            if inductor_config.fallback_random:
                raise Declined(f"{node.name}: config.fallback_random asks for torch's own random numbers")
            apply_sampler(sampler, emitter)
            erase_dead(graph, [node])
            site.grade, site.pieces = "top_k_top_p_sampling_from_logits", _pieces(sampler)
        report.sites.append(site)


def _check_exclusive(sampler: Sampler) -> None:
    if sampler.weights not in exclusive_to(sampler.node):
        raise Declined(f"{sampler.weights.name}: the probabilities are used elsewhere too, so they are computed anyway")


def _pieces(sampler: Sampler) -> tuple[str, ...]:
    pieces = [sampler.spelling]
    if sampler.temperature != 1.0:
        pieces.append("temperature")
    if sampler.top_k:
        pieces.append("top-k")
    if sampler.top_p != 1.0:
        pieces.append("top-p")
    return tuple(pieces)


def apply_sampler(sampler: Sampler, emitter: Emitter) -> None:
    node = sampler.node
    emitter.at(node)
    logits = sampler.logits
    if len(shape(logits)) == 1:
        logits = emitter.call(aten.unsqueeze.default, logits, 0)
    if value(logits).stride(-1) != 1:
        logits = emitter.call(aten.clone.default, logits, memory_format=torch.contiguous_format)
    rows = shape(logits)[0]
    batch = rows if isinstance(rows, int) else emitter.call(aten.sym_size.int, logits, 0)
    uniform = emitter.call(
        aten.rand.default, [batch], dtype=torch.float32, device=value(logits).device, pin_memory=False
    )
    draw = emitter.call(
        torch.ops.fi.top_k_top_p_sampling_from_logits.default,
        logits,
        uniform,
        top_k=sampler.top_k,
        top_p=sampler.top_p,
        temperature=sampler.temperature,
        top_k_ties="threshold",
    )
    ids = emitter.call(prims.convert_element_type.default, emitter.item(draw, 0), torch.int64)
    keeps_dim = is_call(node, aten.multinomial.default) or argument(node, 2, "keepdim", False)
    has_batch = len(shape(sampler.logits)) == 2
    if keeps_dim and has_batch:
        ids = emitter.call(aten.unsqueeze.default, ids, 1)
    elif not keeps_dim and not has_batch:
        ids = emitter.call(aten.select.int, ids, 0, 0)
    replace(node, ids, emitter.fake_mode)
