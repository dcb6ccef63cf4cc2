"""Samplers become one fi op that makes one pass over the logits: no sort, no softmax in memory, one random number a row.

    %e = exponential(...); argmax(softmax(where(%l / t < topk(%l / t, k)[-1], -inf, %l / t)) / %e)
->  %u = rand([B]); %id, %ok = fi.top_k_top_p_sampling_from_logits(%l, %u, top_k=k, temperature=t, top_k_ties="threshold")

Where the probabilities are used as well, they are computed once, and drawn from:

->  %p = fi.top_k_top_p_softmax(%l, top_k=k, temperature=t, top_k_ties="threshold"); %id, %ok = fi.sampling_from_probs(%p, %u)

and without filters by the graph's own softmax, which Inductor fuses with its neighbours. Other weights that are not negative are
drawn from in the same way (`normalize/non_negative.py`), such as what speculative decoding is left with after a rejection. Either
way the draw is one read of the probabilities in place of a random number, a logarithm and a comparison for each.

Ties at the k-th value are all kept ("threshold"), as in the graphs this replaces. The distribution is the same, the random
numbers are other ones: where `config.fallback_random` asks for torch's own, nothing is rewritten.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch._inductor.config as inductor_config
from torch.fx import Graph, Node

from ..normalize.draw import Draw
from ..normalize.non_negative import known_weights
from ..normalize.row_number import RowNumber
from ..normalize.sampler import Sampler, Start, match_sampler
from ..normalize.softmax import match_normalised, match_softmax
from ..sites import Declined, GraphReport, Site, attempt, check_switched_on
from ..subclasses import check_no_subclasses
from ..support import DTYPES, has_kernels
from ..walk import at_least, aten, erase_dead, is_call, prims, same_size, shape, source_line, value
from .attention import exclusive_to
from .emit import Emitter, replace

FROM_LOGITS, FROM_PROBS = "top_k_top_p_sampling_from_logits", "sampling_from_probs"
SOFTMAX_AND_DRAW = "top_k_top_p_softmax + sampling_from_probs"
MIN_VOCAB_TO_FILTER = 1024
"""Filtered probabilities are written by the op from this vocabulary on: Inductor takes about as long for shorter rows."""
_FILTERS = ("top_k", "top_p", "min_p")
_ARGUMENTS = (*_FILTERS, "temperature")


@dataclass
class Plan:
    """What one draw will be rewritten to."""

    draw: Draw
    grade: str
    start: Start | None
    """What the probabilities are made of; None where the graph's own are drawn from."""
    probs: Node | None = None
    """The graph's probabilities, which something else uses as well."""

    @property
    def pieces(self) -> tuple[str, ...]:
        names = {f.name for f in self.start.filters} if self.start is not None else set()
        found = [name for name in ("temperature", *_FILTERS) if name in names]
        return (self.draw.spelling, *(name.replace("_", "-") for name in found))


def rewrite_samplers(graph: Graph, emitter: Emitter, report: GraphReport) -> None:
    for node in list(graph.nodes):
        if node._erased or not is_call(node, aten.multinomial.default, aten.argmax.default, aten.max.dim):
            continue
        site = Site("sampling", node.name, source_line(node))
        with attempt(site):
            sampler = match_sampler(node)
            if sampler is None:
                continue
            check_switched_on("sampling")
            check_no_subclasses()
            if inductor_config.fallback_random:
                raise Declined(f"{node.name}: config.fallback_random asks for torch's own random numbers")
            plan = plan_sampler(sampler)
            erase_dead(graph, apply_sampler(plan, emitter))
            site.grade, site.pieces = plan.grade, plan.pieces
        report.sites.append(site)


def plan_sampler(sampler: Sampler) -> Plan:
    draw = sampler.draw
    one_hot, *after = draw.straight_through or (None,)
    ends = [end for end in (draw.ids, draw.tokens, *after) if end is not None]
    gone = exclusive_to(*ends, keep=(one_hot,))
    if draw.noise is not None and draw.noise not in gone:
        raise Declined(f"{draw.noise.name}: the random numbers that race are used elsewhere too")
    if not sampler.starts:
        plan = Plan(draw, FROM_PROBS, None, known_weights(draw.stage.kept, gone))
    elif draw.weights is None or draw.weights in gone:
        plan = Plan(draw, FROM_LOGITS, _farthest(sampler.starts, gone))
    else:
        plan = _plan_for_shared(sampler, draw.weights)
    _check_rows(plan)
    return plan


def _farthest(starts: tuple[Start, ...], gone: Collection[Node]) -> Start:
    """The last one before which all goes with the draw: what is computed in any case, the op can read."""
    for start in starts:
        if start.logits not in gone:
            return start
    return starts[-1]


def _plan_for_shared(sampler: Sampler, probs: Node) -> Plan:
    """The probabilities are used as well: computed once, by the op where there is something to filter."""
    start = _farthest(sampler.starts, exclusive_to(probs))
    is_filtered = any(f.name != "temperature" for f in start.filters)
    sums_to_one = match_softmax(probs) is not None or match_normalised(probs) is not None
    is_long = at_least(shape(probs)[-1], MIN_VOCAB_TO_FILTER)
    if sampler.draw.tokens is None and is_filtered and sums_to_one and is_long:
        return Plan(sampler.draw, SOFTMAX_AND_DRAW, start, probs)
    return Plan(sampler.draw, FROM_PROBS, None, probs)


def _check_rows(plan: Plan) -> None:
    source = plan.start.logits if plan.start is not None else plan.probs
    rows = value(source)
    if not has_kernels(rows.device):
        raise Declined(f"{source.name}: no kernels for device {rows.device.type}")
    if rows.dtype not in DTYPES:
        raise Declined(f"{source.name}: {'logits' if plan.start is not None else 'probabilities'} are {rows.dtype}")
    if rows.dim() not in (1, 2):
        raise Declined(f"{source.name}: logits have {rows.dim()} dimensions")
    for f in plan.start.filters if plan.start is not None else ():
        if isinstance(f.number, RowNumber):
            _check_row_number(f.name, f.number, rows)


def _check_row_number(name: str, number: RowNumber, rows: torch.Tensor) -> None:
    for node in (number.node, number.unless):
        known = value(node)
        if not isinstance(known, torch.Tensor):
            continue
        batch = rows.shape[0] if rows.dim() == 2 else 1
        if known.dim() != 0 and known.device != rows.device:
            raise Declined(f"{node.name}: {name} is on {known.device.type}")
        one_for_all = all(same_size(size, 1) for size in known.shape)
        if not one_for_all and (not same_size(known.shape[0], batch) or known.dim() > 2):
            raise Declined(f"{node.name}: {name} is {list(known.shape)} for {batch} rows")


def apply_sampler(plan: Plan, emitter: Emitter) -> list[Node]:
    """Put the plan's ops into the graph; returns the nodes that may be unused now."""
    draw, written = plan.draw, None
    if plan.grade == SOFTMAX_AND_DRAW:
        written = _write_probs(plan, emitter.at(plan.probs))
    emitter.at(draw.ids)
    if plan.grade == FROM_LOGITS:
        rows = _rows(plan.start.logits, emitter)
        options = _options(plan.start, rows, emitter)
        op = torch.ops.fi.top_k_top_p_sampling_from_logits.default
        drawn = emitter.call(op, rows, _uniform(rows, emitter), **options)
    else:
        rows = written if written is not None else _as_dtype(_rows(plan.probs, emitter), torch.float32, emitter)
        drawn = emitter.call(torch.ops.fi.sampling_from_probs.default, rows, _uniform(rows, emitter))
    unused = _replace_ids(plan, emitter.item(drawn, 0), emitter)
    if written is not None:
        unused.append(plan.probs)
    return unused


def _write_probs(plan: Plan, emitter: Emitter) -> Node:
    """The op's probabilities [rows, vocab_size] in place of the graph's own."""
    rows = _rows(plan.start.logits, emitter)
    options = _options(plan.start, rows, emitter)
    written = emitter.call(torch.ops.fi.top_k_top_p_softmax.default, rows, **options)
    seen = _as_dtype(written, value(plan.probs).dtype, emitter)
    if len(shape(plan.probs)) == 1:
        seen = emitter.call(aten.select.int, seen, 0, 0)
    replace(plan.probs, seen, emitter.fake_mode)
    return written


def _replace_ids(plan: Plan, ids: Node, emitter: Emitter) -> list[Node]:
    draw = plan.draw
    tokens = plan.start.tokens if plan.start is not None else None
    replaced = draw.ids if tokens is None else tokens
    ids = emitter.call(prims.convert_element_type.default, ids, torch.int64)
    added = len(shape(replaced)) - len(shape(draw.stage.kept)) + 1
    if added == 1:
        ids = emitter.call(aten.unsqueeze.default, ids, 1)
    if len(shape(draw.stage.kept)) == 1:
        ids = emitter.call(aten.select.int, ids, 0, 0)
    replace(replaced, ids, emitter.fake_mode)
    if draw.straight_through is None:
        return [replaced, draw.ids]
    one_hot, _, total = draw.straight_through
    replace(total, one_hot, emitter.fake_mode)
    return [total, replaced, draw.ids]


def _rows(node: Node, emitter: Emitter) -> Node:
    """[rows, vocab_size] with a contiguous last dimension, as the ops take them."""
    if len(shape(node)) == 1:
        node = emitter.call(aten.unsqueeze.default, node, 0)
    if value(node).stride(-1) != 1:
        node = emitter.call(aten.clone.default, node, memory_format=torch.contiguous_format)
    return node


def _uniform(rows: Node, emitter: Emitter) -> Node:
    size, device = [emitter.size(rows, 0)], value(rows).device
    return emitter.call(aten.rand.default, size, dtype=torch.float32, device=device, pin_memory=False)


def _options(start: Start, rows: Node, emitter: Emitter) -> dict:
    """The filters as arguments of an op."""
    options: dict = {}
    by_name = {f.name: f for f in start.filters}
    for name in (name for name in _ARGUMENTS if name in by_name):
        number = by_name[name].number
        if isinstance(number, RowNumber):
            options[f"{name}_arr"] = _row_numbers(name, number, rows, emitter)
        else:
            options[name] = number if name == "top_k" else float(number)
    applied = [f.name for f in reversed(start.filters)]
    before_top_p = applied[: applied.index("top_p")] if "top_p" in applied else []
    if "top_p" in applied and "top_k" in applied and "top_k" not in before_top_p:
        options["top_k_first"] = False
    if "min_p" in before_top_p:
        options["min_p_first"] = True
    if "top_k" in applied:
        options["top_k_ties"] = by_name["top_k"].ties
    return options


def _row_numbers(name: str, number: RowNumber, rows: Node, emitter: Emitter) -> Node:
    """A parameter [rows] as the ops take it."""
    dtype = torch.float32
    if name == "top_k":
        known = value(number.node)
        is_int32 = isinstance(known, torch.Tensor) and known.dtype == torch.int32
        dtype = torch.int32 if is_int32 else torch.int64
    node = _one_a_row(number.node, dtype, rows, emitter)
    if number.sign != 1:
        node = emitter.call(aten.neg.default, node)
    if number.offset != 0:
        node = emitter.call(aten.add.Tensor, node, number.offset)
    if name == "top_k":
        _check_top_k(node, number, rows, emitter)
    elif name != "temperature":  # what no row can be asked for says that all, or only the most probable token, are kept
        node = emitter.call(aten.clamp_min.default, node, 0.0)
        node = emitter.call(aten.clamp_max.default, node, 1.0)
    if number.unless is not None:  # there is only a top-k that may be unset
        nothing = emitter.call(aten.full.default, [], 0, dtype=dtype, device=value(rows).device, pin_memory=False)
        node = emitter.call(aten.where.self, _one_a_row(number.unless, torch.bool, rows, emitter), nothing, node)
    return node


def _check_top_k(k: Node, number: RowNumber, rows: Node, emitter: Emitter) -> None:
    """On the CPU, raise where the gather that looks up the k-th of each row does; on CUDA nobody waits for the values."""
    if number.at_most is None or value(rows).device.type != "cpu":
        return
    outside = emitter.call(aten.lt.Scalar, k, 1)
    if isinstance(number.at_most, int):
        outside = emitter.call(aten.bitwise_or.Tensor, outside, emitter.call(aten.gt.Scalar, k, number.at_most))
    is_right = emitter.call(aten.logical_not.default, emitter.call(aten.any.default, outside))
    most = number.at_most if isinstance(number.at_most, int) else "vocab_size"
    emitter.call(aten._assert_async.msg, is_right, f"fi_ops: top-k must be in [1, {most}] in every row; clamp it")


def _one_a_row(node: Node, dtype: torch.dtype, rows: Node, emitter: Emitter) -> Node:
    """[rows] of `[rows]`, `[rows, 1]`, one element, or a symbolic size."""
    known, batch, device = value(node), emitter.size(rows, 0), value(rows).device
    if not isinstance(known, torch.Tensor):
        return emitter.call(aten.full.default, [batch], node, dtype=dtype, device=device, pin_memory=False)
    node = _as_dtype(node, dtype, emitter)
    if known.dim() == 0 and known.device != device:  # a number that the host knows
        ones = emitter.call(aten.full.default, [batch], 1, dtype=dtype, device=device, pin_memory=False)
        return emitter.call(aten.mul.Tensor, ones, node)
    if known.dim() != 1:
        node = emitter.call(aten.reshape.default, node, [-1])
    return node if same_size(shape(node)[0], shape(rows)[0]) else emitter.call(aten.expand.default, node, [batch])


def _as_dtype(node: Node, dtype: torch.dtype, emitter: Emitter) -> Node:
    if value(node).dtype == dtype:
        return node
    return emitter.call(prims.convert_element_type.default, node, dtype)
