"""Samplers: a draw, and the logits and filters that its distribution is made of.

From the draw up to the logits, each step is one of
    weights    softmax(x)                       probabilities of scores x
               w / sum(w)                       the same distribution
               where(removed, 0, w)             top-k, top-p or min-p
    scores     where(removed, -inf, x)          top-k, top-p or min-p
               x / t                            temperature
               x - c[:, None], log(softmax(x))  the same distribution (log_softmax)
    either     sort(x).values, put back later   the same, in another order in between

Where the steps end, or where one comes that the op can't do in that place (`_fits`), the rest stays in the graph, as the logits
that the op is given: a partial match is still right.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from ..walk import aten, commuted, is_call, is_tensor, number, same_shape, shape
from .draw import Draw, match_draw
from .min_p import match_min_p
from .order import put_back, strip_widening
from .removal import Stage, without_removed
from .row_number import Number, RowNumber, is_one_a_row, row_number
from .softmax import match_normalised, match_softmax
from .top_k import match_top_k
from .top_p import match_top_p

_FILTERS = {"top_k": match_top_k, "top_p": match_top_p, "min_p": match_min_p}
_LEAST = {"top_k": 1, "top_p": 0.0, "min_p": 0.0}


@dataclass(frozen=True)
class Filter:
    """One step that the op can do."""

    name: str
    """temperature, top_k, top_p or min_p: the op's argument."""
    number: Number
    ties: str = "threshold"
    """Of a top-k."""


@dataclass(frozen=True)
class Start:
    """Where the op may start from: logits, and what it has to do to them, from the last step to the first."""

    logits: Node
    filters: tuple[Filter, ...]
    tokens: Node | None
    """What becomes of the ids, where that is another node than the draw's (`Draw.tokens`)."""


@dataclass
class Sampler:
    draw: Draw
    starts: tuple[Start, ...]
    """From the draw on upwards; empty where it draws from weights that are no softmax's."""


def match_sampler(node: Node) -> Sampler | None:
    """The sampler that `node` is the draw of; None if it is not a draw at all."""
    draw = match_draw(node)
    return None if draw is None else Sampler(draw, tuple(_starts(draw)))


def _starts(draw: Draw) -> Iterator[Start]:
    stage, filters = draw.stage, ()
    home = stage.order
    while True:
        stage = replace(stage, kept=strip_widening(stage.kept))
        # filters in the order of a sort are filters only if the rows do come out of that sort
        if not stage.is_weights and (stage.order is None or (stage.order is home and not filters)):
            yield Start(stage.kept, filters, draw.tokens if stage.order is not home else None)
        step = _step(stage, filters)
        if step is None:
            return
        stage, filters = step[0], (*filters, *step[1:])


def _step(stage: Stage, filters: tuple[Filter, ...]) -> tuple | None:
    """(the stage before, the filter between if there is one); None where no step is known."""
    node, order = stage.kept, stage.order
    if order is not None and order.has_values(node):
        before = Stage(order.source, stage.is_weights)
        if order.k is None:
            return (before,)
        top_k = Filter("top_k", order.k if isinstance(order.k, int) else RowNumber(order.k), ties="exact")
        return (before, top_k) if _fits(top_k, filters) else None
    back = put_back(node) if order is None else None
    if back is not None:
        return (Stage(back[0], stage.is_weights, back[1]),)
    before = _same_distribution(stage)
    if before is not None:
        return (before,)
    removed = without_removed(stage)
    if removed is not None:
        condition, kept, is_infinite = removed
        before = replace(stage, kept=strip_widening(kept))
        if not is_infinite and any(f.name == "temperature" for f in filters) and not stage.is_weights:
            return None
        for name, match in _FILTERS.items():
            found = match(condition, before)
            if found is not None:
                return (before, Filter(name, found)) if _fits(Filter(name, found), filters) else None
        return None
    cooled = _temperature(node) if not stage.is_weights else None
    if cooled is not None and _fits(Filter("temperature", cooled[1]), filters):
        return (replace(stage, kept=cooled[0]), Filter("temperature", cooled[1]))
    return None


def _fits(new: Filter, filters: tuple[Filter, ...]) -> bool:
    """The op, which has each filter once, can apply `new` before those that come after it.

    Top-p and min-p look at the distribution, so the temperature must be applied before them. Top-k and min-p keep the same
    tokens wherever they stand; which mass top-p measures is told by the op's `top_k_first` and `min_p_first`.
    """
    names = [f.name for f in filters]
    if new.name in names or (new.name in ("top_p", "min_p") and "temperature" in names):
        return False
    if isinstance(new.number, RowNumber):
        return True
    if new.name == "temperature":
        return new.number > 0
    return new.number >= _LEAST[new.name] and (new.name != "min_p" or new.number <= 1)


def _same_distribution(stage: Stage) -> Stage | None:
    """The stage before a step that changes nothing of the distribution."""
    node = stage.kept
    if stage.is_weights:
        scores = match_softmax(node)
        if scores is not None:
            return replace(stage, kept=scores, is_weights=False)
        weights = match_normalised(node)
        return replace(stage, kept=weights) if weights is not None else None
    if is_call(node, aten.log.default):
        scores = match_softmax(node.args[0])
        return replace(stage, kept=scores) if scores is not None else None
    if is_call(node, aten.sub.Tensor, aten.add.Tensor) and not node.kwargs:
        scores, shift = node.args
        moved = (
            is_tensor(scores) and is_tensor(shift) and is_one_a_row(shift) and same_shape(shape(scores), shape(node))
        )
        return replace(stage, kept=scores) if moved else None
    return None


def _temperature(node: Node) -> tuple[Node, Number] | None:
    """(x, t) where the node is x / t."""
    if is_call(node, aten.div.Tensor, aten.div.Scalar) and not node.kwargs:
        x, divisor = node.args
        if not is_tensor(x) or not same_shape(shape(x), shape(node)):
            return None
        divisor = row_number(divisor)
        return None if divisor is None else (x, divisor)
    if is_call(node, aten.mul.Tensor, aten.mul.Scalar):
        for x, factor in commuted(node):
            factor = number(factor)
            if is_tensor(x) and factor is not None and factor > 0:
                return x, 1.0 / factor
    return None
