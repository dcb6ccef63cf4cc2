"""Top-p: tokens with enough mass in front of them, from the most probable one on, are removed.

In ascending order of probability, with the last one kept:
    cumsum(probs) <= 1 - p
In descending order, with the first one kept:
    cumsum(probs) - probs > p
    cumsum(probs) > p, moved on by one place
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from ..walk import END, argument, aten, dim_of, is_call, shape, slice_range, strip_casts
from .order import last_dim, over_last, put_back
from .removal import Condition, Stage, compares, is_kept_constant, written_copy
from .row_number import Number, complement, row_number
from .softmax import match_softmax

IsProbs = Callable[[object], bool]


def match_top_p(condition: Condition, stage: Stage) -> Number | None:
    """p where the condition removes what is not among the fewest tokens whose mass reaches p."""
    if stage.order is not None:
        return _by_order(condition, stage.order.descending, stage.has_probs)
    found = put_back(condition.node)
    if found is None:
        return None
    removed, sort = condition.of(found[0]), found[1]
    if stage.has_probs(sort.source):
        return _by_order(removed, sort.descending, sort.has_values)
    if not stage.is_kept(sort.source) or stage.is_weights:
        return None

    def is_probs(node: object) -> bool:
        scores = match_softmax(node)
        return scores is not None and sort.has_values(scores)

    return _by_order(removed, sort.descending, is_probs)


def _by_order(removed: Condition, descending: bool, is_probs: IsProbs) -> Number | None:
    return _descending(removed, is_probs) if descending else _ascending(removed, is_probs)


def _ascending(removed: Condition, is_probs: IsProbs) -> Number | None:
    removed = _with_one_kept(removed, at_end=True)
    for relation, a, b in compares(removed):
        if relation in ("le", "lt") and _is_cumulated(a, is_probs):
            return complement(1.0, b)
    return None


def _descending(removed: Condition, is_probs: IsProbs) -> Number | None:
    kept_first = _with_one_kept(removed, at_end=False)
    for relation, a, b in compares(kept_first):
        before = strip_casts(a) if isinstance(a, Node) else None
        if relation in ("gt", "ge") and is_call(before, aten.sub.Tensor) and not before.kwargs:
            cumulated, probs = before.args
            return row_number(b) if _is_cumulated(cumulated, is_probs) and is_probs(probs) else None
    past = _moved_on_by_one(kept_first, is_first_kept=kept_first is not removed)
    for relation, a, b in compares(past) if past is not None else ():
        if relation in ("gt", "ge") and _is_cumulated(a, is_probs):
            return row_number(b)
    return None


def _with_one_kept(removed: Condition, *, at_end: bool) -> Condition:
    """What is removed, before the first or the last token was kept in any case; itself where none is."""
    node = removed.node
    if not is_call(node, aten.slice_scatter.default, aten.select_scatter.default):
        return removed
    base, fill = node.args[:2]
    vocab = shape(base)[-1]
    if not over_last(base, argument(node, 2, "dim", 0)) or not is_kept_constant(fill, removed):
        return removed
    start = argument(node, 3, "start", argument(node, 3, "index", 0)) or 0
    end = argument(node, 4, "end", None)
    if node.target is aten.select_scatter.default:
        is_one = start in ((-1, vocab - 1) if at_end else (0, -vocab) if isinstance(vocab, int) else (0,))
    elif at_end:
        is_one = start in (-1, vocab - 1) and (end is None or end == vocab or (isinstance(end, int) and end >= END))
    else:
        is_one = start == 0 and end == 1
    return removed.of(base) if is_one and argument(node, 5, "step", 1) == 1 else removed


def _moved_on_by_one(removed: Condition, *, is_first_kept: bool) -> Condition | None:
    """The condition whose places 0 .. V-2 stand at 1 .. V-1; what stands at 0 instead is kept."""
    node = removed.node
    last = last_dim(node)
    if is_call(node, aten.slice_scatter.default):
        base, written, *place = node.args
        to_end = len(place) > 2 and (place[2] is None or place[2] == shape(base)[-1] or place[2] == END)
        if not is_first_kept or len(place) != 3 or place[:2] != [last, 1] or not to_end:
            return None
        return _all_but_last(written_copy(written), removed)
    if is_call(node, aten.cat.default):
        parts = node.args[0]
        if len(parts) != 2 or dim_of(node, argument(node, 1, "dim", 0)) != last or shape(parts[0])[-1] != 1:
            return None
        return _all_but_last(parts[1], removed) if is_first_kept or is_kept_constant(parts[0], removed) else None
    if is_call(node, aten.constant_pad_nd.default) and list(node.args[1]) == [1, 0]:
        is_kept = is_kept_constant(argument(node, 2, "value", 0), removed)
        return _all_but_last(node.args[0], removed) if is_first_kept or is_kept else None
    return None


def _all_but_last(node: Node, removed: Condition) -> Condition | None:
    """The condition, which `removed` is made of, that the node is without its last place."""
    part = removed.of(node)
    parts = slice_range(part.node)
    if parts is None:
        return None
    source, dim, start, end = parts
    vocab = shape(source)[-1]
    if dim != last_dim(source) or start != 0 or (end != -1 and not (isinstance(vocab, int) and end == vocab - 1)):
        return None
    return part.of(source)


def _is_cumulated(node: object, is_probs: IsProbs) -> bool:
    node = strip_casts(node)
    return is_call(node, aten.cumsum.default) and over_last(node, node.args[1]) and is_probs(node.args[0])
