"""What the elements of a mask are, as far as its arithmetic says: comparisons of places, joined by `and` or by `or`.

    keep = (key <= past + query) & padding[batch, key]           Clause(True, (past + query - key >= 0, padding[batch, key]))
    bias = where(keep, 0, -inf)                                                                    Choice(keep, 0, -inf)

Every term remembers a node of the graph from which its value can be had, so that what is not understood stays data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch.fx import Node

from .affine import Affine, Index

LONGEST = 16
"""Terms of a clause: a mask made of more is data."""


@dataclass(frozen=True)
class Term:
    """A condition on one element of the scores."""

    compare: Affine | None
    """It holds where this is >= 0; None where that is not known."""
    node: Node
    """A bool tensor with its value, or with one between its own and its clause's: no weaker than the term in an `and`, no
    stronger in an `or`."""
    index: Index
    """Where in `node`."""
    negated: bool = False
    """`node` is False where it holds."""

    def inverse(self) -> Term:
        compare = None if self.compare is None else self.compare.times(-1).plus(-1)
        return replace(self, compare=compare, negated=not self.negated)


@dataclass(frozen=True)
class Clause:
    """All of its terms hold, or any of them."""

    all: bool
    terms: tuple[Term, ...] = ()

    @property
    def truth(self) -> bool | None:
        """Its value, where that is the same everywhere."""
        return None if self.terms else self.all

    def inverse(self) -> Clause:
        return Clause(not self.all, tuple(term.inverse() for term in self.terms))

    def _as_one(self, by_and: bool) -> Clause | None:
        """Itself as a clause of that kind."""
        if self.all is by_and or len(self.terms) == 1:
            return self
        anchors = {(term.node, term.index, term.negated) for term in self.terms}
        return Clause(by_and, (Term(None, *anchors.pop()),)) if len(anchors) == 1 else None

    def joined(self, other: Clause, by_and: bool) -> Clause | None:
        """`self and other`, or `self or other`; None where that is neither all nor any of some terms."""
        for one, another in ((self, other), (other, self)):
            if one.truth is not None:
                return another if one.truth is by_and else one
        first, second = (part._as_one(by_and) for part in (self, other))
        if first is None or second is None:
            return None
        terms = tuple(dict.fromkeys(first.terms + second.terms))
        return Clause(by_and, terms) if len(terms) <= LONGEST else None


@dataclass(frozen=True)
class Choice:
    """One number where a clause holds, another elsewhere."""

    where: Clause
    yes: float
    no: float
    is_exact: bool = True
    """False: elsewhere it is `no` or less."""

    def mapped(self, function: Callable[[float], float]) -> Choice | None:
        return Choice(self.where, function(self.yes), function(self.no)) if self.is_exact else None

    def condition(self, function: Callable[[float], bool]) -> Clause | None:
        """Where `function` of it is true."""
        if not self.is_exact:
            return None
        yes, no = bool(function(self.yes)), bool(function(self.no))
        if yes == no:
            return Clause(yes)
        return self.where if yes else self.where.inverse()


@dataclass(frozen=True)
class Magnitude:
    """|value|"""

    value: Affine
