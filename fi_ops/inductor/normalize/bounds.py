"""What a site's masks say about the keys that a query row sees: keys up to its position (causal), keys in a window.

    key <= past + query          position = past + query, causal
    key > position - 16          window_left = 15
    key <= query + 8, key >= query - 8                                       position = query + 8, causal, window_left = 16

What is said by a comparison of places is proven, and needs no mask; the rest stays a mask, of as few dimensions as it has.
Scores that are set to a number which is not -inf keep their meaning, the mean of all values, in a row that sees no key. So
they are only taken where every row is known to see one, and what else is added to the scores is known to be small beside them.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from ..walk import at_least
from .affine import BATCH, HEAD, KEY, QUERY, Affine, along, lowest, never_negative, same
from .clause import Choice, Clause, Term
from .masks import LOWEST, MODERATE, NEVER, Mask
from .predicate import Predicates


@dataclass(frozen=True)
class Bounds:
    """The keys that a row may see."""

    position: Affine | None = None
    """Where the row stands among the keys; of batch and query."""
    causal: bool = False
    """None behind its position."""
    window_left: int = -1
    """None more than this before its position; -1 is no window."""

    @property
    def pieces(self) -> list[str]:
        """In words."""
        words = ["causal by its mask"] if self.causal else []
        return [*words, f"window of {self.window_left + 1} by its mask"] if self.window_left >= 0 else words


@dataclass(frozen=True)
class Proof:
    """A site's masks, taken apart."""

    bounds: Bounds
    rest: tuple[Term, ...]
    """What else must hold for a key to be seen."""
    masks: tuple[Mask, ...]
    """Those that stay as they are."""
    needs_a_key: bool = False
    """It holds as long as no row stands in front of all keys, which the op is to refuse."""


@dataclass(frozen=True)
class Place:
    """What the op that a site becomes can take, and what it sees to by itself."""

    allows: Callable[[Affine], bool]
    """Rows may stand there."""
    written: Affine | None = None
    """The slots of the new keys; the op refuses those outside the cache."""
    refused: frozenset[Affine] = frozenset()
    """What ops before it in the graph have refused where it is negative."""
    refuses: Callable[[Affine], bool] = lambda position: False
    """It can be made to refuse rows in front of all keys when it runs, if rows stand there."""


def prove(masks: tuple[Mask, ...], known: Predicates, place: Place) -> Proof | None:
    """What the masks of a site say; None where they go in as they are."""
    clauses = {mask: _clause(mask, known) for mask in masks}
    proven = {mask: clause for mask, clause in clauses.items() if clause is not None}
    terms = list(dict.fromkeys(term for clause in proven.values() for term in clause.terms))
    left = [term for term in terms if not _is_always(term, known)]
    bounds, rest = _bounds(left, known, place)
    if not proven or (len(rest) == len(terms) and rest):
        return None
    if not all(known.is_in_place(term.node, term.index) for term in rest):
        return None
    others = tuple(mask for mask in masks if mask not in proven)
    if any(_fill(mask, known) != NEVER for mask in masks):
        is_all = not rest and all(_is_moderate(mask, known) for mask in others)
        sees_a_key = _sees_a_key(bounds, known, place)
        is_refused = bounds.window_left < 0 and bounds.position is not None and place.refuses(bounds.position)
        if not is_all or not (sees_a_key or is_refused):
            return None
        return Proof(bounds, tuple(rest), others, needs_a_key=not sees_a_key)
    return Proof(bounds, tuple(rest), others)


def _clause(mask: Mask, known: Predicates) -> Clause | None:
    """Where a mask keeps the score, all of whose terms must hold."""
    if mask.heads_merged:
        return None
    found = known.of_mask(mask.node)
    if mask.is_bool and isinstance(found, Clause):
        clause = found.inverse() if mask.inverted else found
    elif not mask.is_bool and isinstance(found, Choice) and not isinstance(mask.scale.number, Node):
        clause = found.where if found.yes == 0 else found.where.inverse()
        if 0 not in (found.yes, found.no) or mask.scale.factor <= 0 or _fill(mask, known) > LOWEST:
            return None
    elif not mask.is_bool and found == 0.0:
        clause = Clause(True)
    else:
        return None
    if len(clause.terms) == 1:
        clause = Clause(True, clause.terms)
    return clause if clause.all else None


def _fill(mask: Mask, known: Predicates) -> float:
    """What a mask makes of the scores that it does not keep; -inf also where it may be any bias."""
    if mask.is_bool:
        return mask.fill
    found = known.of_mask(mask.node) if not mask.heads_merged else None
    if not isinstance(found, Choice) or 0 not in (found.yes, found.no) or isinstance(mask.scale.number, Node):
        return NEVER
    return (found.no if found.yes == 0 else found.yes) * mask.scale.factor


def _is_moderate(mask: Mask, known: Predicates) -> bool:
    """It adds numbers that are small beside those that exclude a key."""
    found = None if mask.is_bool or isinstance(mask.scale.number, Node) else known.intervals.of(mask.node)
    return found is not None and max(map(abs, found)) * abs(mask.scale.factor) <= MODERATE


def _is_always(term: Term, known: Predicates) -> bool:
    return term.compare is not None and never_negative(term.compare, known.sizes)


def _bounds(terms: list[Term], known: Predicates, place: Place) -> tuple[Bounds, list[Term]]:
    """(the bounds that terms say, the terms that they do not say)."""
    lasts = {term: last for term in terms if (last := _last_key(term)) is not None and place.allows(last)}
    firsts = {term: first for term in terms if (first := _first_key(term)) is not None}
    position = None
    for last in sorted(lasts.values(), key=lambda last: _rank(last, place)):
        if position is None or never_negative(position - last, known.sizes):
            position = last
    causal = position is not None
    if position is None:
        position = next((first for first in firsts.values() if place.allows(first)), None)
    if position is None:
        return Bounds(), terms
    window_left, said = -1, set()
    for term, last in lasts.items():
        if never_negative(last - position, known.sizes):
            said.add(term)
    for term, first in firsts.items():
        distance = (position - first).constant
        if distance is not None and distance >= 0:
            window_left = distance if window_left < 0 else min(window_left, distance)
            said.add(term)
    return Bounds(position, causal, window_left), [term for term in terms if term not in said]


def _rank(last: Affine, place: Place) -> int:
    """Which of the bounds that can't be compared is worth most: what is left of the others is data."""
    if place.written is not None and same(last, place.written):
        return 0
    return 1 if last.depends_on(QUERY) else 2


def _last_key(term: Term) -> Affine | None:
    """The key up to which a term holds."""
    if term.compare is None or term.compare.axes[KEY] != -1:
        return None
    last = term.compare + along(KEY)
    return last if _is_of_rows(last) else None


def _first_key(term: Term) -> Affine | None:
    """The key from which on a term holds."""
    if term.compare is None or term.compare.axes[KEY] != 1:
        return None
    first = along(KEY) - term.compare
    return first if _is_of_rows(first) else None


def _is_of_rows(position: Affine) -> bool:
    """The same for all keys and heads; nothing but what is looked up depends on the batch."""
    return not position.axes[BATCH] and not position.depends_on(HEAD) and not position.depends_on(KEY)


def _sees_a_key(bounds: Bounds, known: Predicates, place: Place) -> bool:
    """Every row sees one of the keys."""
    position, kv_len = bounds.position, known.sizes[KEY]
    if not at_least(kv_len, 1):
        return False
    if position is None:
        return True
    is_written = place.written is not None and same(position, place.written)
    not_before = not bounds.causal or is_written or position in place.refused
    not_before = not_before or never_negative(position, known.sizes)
    if bounds.window_left < 0:
        return not_before
    room = lowest(position.times(-1).plus(bounds.window_left - 1), known.sizes)
    not_behind = is_written or (room is not None and at_least(room + kv_len, 0))
    return not_before and not_behind
