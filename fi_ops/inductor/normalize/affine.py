"""Integers that depend linearly on where an element is in the scores: `past + query - key + lengths[batch]`.

What positions, lengths and indices of a mask are made of. Two of them are compared by what they are, not by how they are
spelt; sizes may be symbolic, and no guard is added.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..walk import at_least, same_size, strip

BATCH, HEAD, QUERY, KEY = range(4)
"""The axes of scores [B, H, Lq, Lk]."""

Index = tuple["Affine", ...]
"""Where in a tensor, one for each of its dimensions."""


@dataclass(frozen=True)
class Atom:
    """What is known at run time only: an element of an integer tensor, or a symbolic number."""

    key: Hashable
    index: Index | None
    """Where in the tensor; None for a number."""
    node: Node = field(compare=False)
    number: Any = field(compare=False, default=None)
    """A symbolic number's value."""

    @property
    def is_number(self) -> bool:
        return self.index is None


@dataclass(frozen=True)
class Affine:
    """const + sum(axes[i] * i) + sum(times * atom)"""

    const: int = 0
    axes: tuple[int, int, int, int] = (0, 0, 0, 0)
    atoms: frozenset[tuple[Atom, int]] = frozenset()

    def __add__(self, other: Affine) -> Affine:
        if not other.atoms:
            atoms = self.atoms
        else:
            times = dict(self.atoms)
            for atom, n in other.atoms:
                times[atom] = times.get(atom, 0) + n
            atoms = frozenset((atom, n) for atom, n in times.items() if n)
        first, second, third, fourth = (a + b for a, b in zip(self.axes, other.axes, strict=True))
        return Affine(self.const + other.const, (first, second, third, fourth), atoms)

    def __sub__(self, other: Affine) -> Affine:
        return self + other.times(-1)

    def plus(self, number: int) -> Affine:
        return Affine(self.const + number, self.axes, self.atoms)

    def times(self, number: int) -> Affine:
        if number == 0:
            return ZERO
        first, second, third, fourth = (number * a for a in self.axes)
        atoms = frozenset((atom, number * n) for atom, n in self.atoms)
        return Affine(number * self.const, (first, second, third, fourth), atoms)

    @property
    def is_number(self) -> bool:
        """The same for all elements, known or symbolic."""
        return not any(self.axes) and all(atom.is_number for atom, _ in self.atoms)

    @property
    def constant(self) -> int | None:
        return self.const if not self.atoms and not any(self.axes) else None

    @property
    def axis(self) -> int | None:
        """The axis whose index it is."""
        if self.const or self.atoms or sorted(self.axes) != [0, 0, 0, 1]:
            return None
        return self.axes.index(1)

    def number(self) -> Any:
        """The value of one that `is_number`; may be symbolic."""
        total: Any = self.const
        for atom, n in self.atoms:
            total = total + n * atom.number
        return total

    def depends_on(self, axis: int) -> bool:
        return bool(self.axes[axis]) or self.atoms_depend_on(axis)

    def atoms_depend_on(self, axis: int) -> bool:
        return any(place.depends_on(axis) for atom, _ in self.atoms for place in atom.index or ())


ZERO = Affine()


def along(axis: int) -> Affine:
    """The index on an axis."""
    return Affine(axes=tuple(int(a == axis) for a in range(4)))  # type: ignore[arg-type]


def element(node: Node, index: Index) -> Affine:
    """An element of an integer tensor of which no more is known."""
    node = strip(node)
    return Affine(atoms=frozenset({(Atom(node, index, node), 1)}))


def number_of(given: Any) -> Affine | None:
    """A number in a graph: an int, or a node that computes a symbolic one."""
    if isinstance(given, bool):
        return None
    if isinstance(given, int):
        return Affine(given)
    if not isinstance(given, Node) or not isinstance(given.meta.get("val"), (int, torch.SymInt)):
        return None
    number = given.meta["val"]
    if isinstance(number, int):
        return Affine(number)
    if same_size(number, 0):
        return ZERO
    return Affine(atoms=frozenset({(Atom(number.node.expr, None, given, number), 1)}))


def lowest(value: Affine, sizes: tuple) -> Any:
    """The least that it is at any place of scores of these sizes; None where it depends on a tensor."""
    if not all(atom.is_number for atom, _ in value.atoms):
        return None
    least = Affine(value.const, atoms=value.atoms).number()
    for times, size in zip(value.axes, sizes, strict=True):
        if times < 0:
            least = least + times * (size - 1)
    return least


def never_negative(value: Affine, sizes: tuple) -> bool:
    """It is known to be >= 0 at every place of scores of these sizes."""
    least = lowest(value, sizes)
    return least is not None and at_least(least, 0)


def same(a: Affine, b: Affine) -> bool:
    """Two are known to be equal everywhere."""
    difference = a - b
    return difference.is_number and same_size(difference.number(), 0)
