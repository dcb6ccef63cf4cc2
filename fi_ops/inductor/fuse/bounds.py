"""Masks that are proven to be causal or a window become arguments of the op; what is left of them, a smaller mask.

    mask = key <= past + query                       ->  fi.attention(..., causal=True, q_offset=past)
    mask = (key <= position[query]) & padding        ->  fi.append_attention(..., padding, causal=True, query_positions=position)

Where the rows stand at the slots that the op writes, it is not told where they stand.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..normalize.affine import BATCH, KEY, QUERY, ZERO, Affine, Atom, along, number_of, same
from ..normalize.bounds import Bounds, Place, Proof, prove
from ..normalize.cache_update import CacheWrite
from ..normalize.clause import Term
from ..normalize.masks import Mask
from ..normalize.predicate import Predicates
from ..walk import at_least, aten, prims, same_size, shape, value
from .emit import Emitter


@dataclass(frozen=True)
class Rows:
    """The scores of a site and the op that it becomes."""

    sizes: tuple
    """[B, H, Lq, Lk]"""
    write: CacheWrite | None
    """The op writes these keys first."""
    rotates: bool
    counts: bool = False
    """The op is told for each sequence how many keys there are, of which its rows are the last."""

    @property
    def first(self) -> Affine:
        """Where a row stands that is counted from the first query and the first key."""
        return ZERO if same_size(self.sizes[QUERY], 1) else along(QUERY)


class Proofs:
    """What is known of the masks of a graph; each is looked at once for all layers."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], Predicates] = {}
        self._proofs: dict[tuple, Proof | None] = {}
        self._refused: frozenset[Affine] = frozenset()

    def of(self, masks: tuple[Mask, ...], rows: Rows) -> Proof | None:
        """What the masks of a site say that its op can take."""
        known = self._predicates(rows.sizes)
        written = self.written(rows)
        key = (masks, tuple(map(str, rows.sizes)), rows.write is None, rows.rotates, rows.counts, written)
        if key not in self._proofs:

            def allows(position: Affine) -> bool:
                return _is_argument(position, rows, known)

            def refuses(position: Affine) -> bool:  # a number is the program's own, which means what it says
                return rows.counts and not (position - rows.first).is_number

            self._proofs[key] = prove(masks, known, Place(allows, written, self._refused, refuses))
        return self._proofs[key]

    def written(self, rows: Rows) -> Affine | None:
        """The slot that row i's key is written to."""
        if rows.write is None:
            return None
        if rows.write.positions is None:
            return number_of(rows.write.start) + rows.first
        found = self._predicates(rows.sizes).of(rows.write.positions, (rows.first,))
        return found if isinstance(found, Affine) else None

    def refuses_negative(self, written: Affine | None) -> None:
        """From here on in the graph, these slots are known not to be negative: an op has looked at them."""
        if written is not None:
            self._refused |= {written}

    def _predicates(self, sizes: tuple) -> Predicates:
        return self._known.setdefault(tuple(map(str, sizes)), Predicates(sizes))


def _is_argument(position: Affine, rows: Rows, known: Predicates) -> bool:
    """The op can be told that its rows stand there."""
    if rows.write is not None:
        return all(atom.is_number or _is_vector(atom, known) for atom, _ in position.atoms)
    if rows.counts:
        before = position - rows.first
        if before.is_number:
            length, keys = before.number() + rows.sizes[QUERY], rows.sizes[KEY]
            return at_least(length, 1) and at_least(keys, length)
        vectors = all(atom.is_number or _is_vector(atom, known) for atom, _ in before.atoms)
        return vectors and not before.depends_on(QUERY)
    if rows.rotates:  # it rotates row i by where it stands
        return same(position, rows.first)
    return (position - rows.first).is_number


def _is_vector(atom: Atom, known: Predicates) -> bool:
    """One number, or one for each row, or for each row of each sequence."""
    axes = [place.axis for place in atom.index if place.constant is None]
    sizes = [size for size, place in zip(shape(atom.node), atom.index, strict=True) if place.constant is None]
    return axes in ([], [BATCH], [QUERY], [BATCH, QUERY]) and all(
        same_size(size, known.sizes[axis]) for size, axis in zip(sizes, axes, strict=True)
    )


def emit_bounds(bounds: Bounds, written: Affine | None, rows: Rows, query: Node, emitter: Emitter) -> dict[str, Any]:
    """The arguments of the op that say what the bounds say."""
    options: dict[str, Any] = dict(causal=bounds.causal, window_left=bounds.window_left)
    if rows.write is None:
        options["q_offset"] = 0 if rows.rotates else _emit_offset(bounds, rows, emitter)
    elif bounds.position is not None and (written is None or not same(bounds.position, written)):
        options["query_positions"] = _emit_positions(bounds.position, rows, query, emitter)
    return options


def _emit_offset(bounds: Bounds, rows: Rows, emitter: Emitter):
    """Where row 0 stands; None for rows that end with the keys."""
    if bounds.position is None:
        return None
    offset = bounds.position - rows.first
    if offset.constant is None and same_size(offset.number(), rows.sizes[3] - rows.sizes[2]):
        return None
    return _emit_number(offset, emitter)


def emit_lengths(bounds: Bounds, needs_a_key: bool, rows: Rows, query: Node, keys, emitter: Emitter) -> Node:
    """How many keys each sequence has, [B]: those up to where its last row stands; `keys` of them where nothing says so. Where
    `needs_a_key`, none if a row stands in front of all keys, which the op refuses."""
    options = dict(dtype=torch.int64, device=value(query).device)
    if bounds.position is None:
        return emitter.shared(aten.full.default, (emitter.size(query, 0),), keys, **options)
    before = bounds.position - rows.first
    numbers = Affine(before.const, atoms=frozenset(part for part in before.atoms if part[0].is_number))
    start, length = _emit_number(numbers, emitter), emitter.size(query, 2)
    both_known = isinstance(start, int) and isinstance(length, int)
    counted = start + length if both_known else emitter.shared(operator.add, start, length)
    total = emitter.shared(aten.full.default, (emitter.size(query, 0),), counted, **options)
    for atom, times in _in_order(before):
        if not atom.is_number:
            total = emitter.shared(aten.add.Tensor, total, _vector(atom, False, emitter), alpha=times)
    if not needs_a_key or same_size(rows.sizes[QUERY], 1):
        return total
    nothing = emitter.shared(aten.full.default, (), 0, **options)
    return emitter.shared(aten.where.self, emitter.shared(aten.ge.Scalar, total, length), total, nothing)


def _emit_number(number: Affine, emitter: Emitter):
    """The int that it is, or a node that computes it."""
    total = number.const
    for atom, times in _in_order(number):
        term = atom.node if times == 1 else emitter.shared(operator.mul, atom.node, times)
        total = term if isinstance(total, int) and total == 0 else emitter.shared(operator.add, term, total)
    return total


def _in_order(number: Affine) -> list[tuple[Atom, int]]:
    return sorted(number.atoms, key=lambda part: (part[0].node.name, part[1]))


def _emit_positions(position: Affine, rows: Rows, query: Node, emitter: Emitter) -> Node:
    """[Lq] or [B, Lq]"""
    numbers = Affine(position.const, atoms=frozenset(part for part in position.atoms if part[0].is_number))
    tensors = [part for part in _in_order(position) if not part[0].is_number]
    of_sequences = position.atoms_depend_on(BATCH)
    total = None
    for atom, times in tensors:
        node = _vector(atom, of_sequences, emitter)
        node = node if times == 1 else emitter.shared(aten.mul.Tensor, node, times)
        total = node if total is None else emitter.shared(aten.add.Tensor, total, node)
    if total is not None and numbers == ZERO and not position.axes[QUERY]:
        whole = [rows.sizes[BATCH], rows.sizes[QUERY]] if of_sequences else [rows.sizes[QUERY]]
        if len(shape(total)) == len(whole) and all(map(same_size, shape(total), whole)):
            return total
        if not of_sequences and same_size(rows.sizes[QUERY], 1):
            return emitter.shared(aten.view.default, total, (1,))
    length, start = emitter.size(query, 2), _emit_number(numbers, emitter)
    options = dict(dtype=torch.int64, device=value(query).device)
    if position.axes[QUERY]:
        options.update(start=start, step=position.axes[QUERY], requires_grad=False)
        counted = emitter.shared(prims.iota.default, length, **options)
    else:
        counted = emitter.shared(aten.full.default, (length,), start, **options)
    return counted if total is None else emitter.shared(aten.add.Tensor, counted, total)


def _vector(atom: Atom, of_sequences: bool, emitter: Emitter) -> Node:
    """The tensor of an atom as it broadcasts to positions [Lq], or [B, Lq]."""
    node, kept = atom.node, []
    for dim, place in reversed(list(enumerate(atom.index))):
        if place.constant is not None:
            node = emitter.shared(aten.select.int, node, dim, place.constant)
        else:
            kept.append(place.axis)
    return emitter.shared(aten.unsqueeze.default, node, 1) if of_sequences and kept == [BATCH] else node


def emit_rest(terms: tuple[Term, ...], emitter: Emitter) -> tuple[Mask, ...]:
    """What is left of masks as one mask, or none."""
    made = None
    for node, index, negated in dict.fromkeys((term.node, term.index, term.negated) for term in terms):
        mask = _in_scores(node, index, emitter)
        if negated:
            mask = emitter.shared(aten.logical_not.default, mask)
        made = mask if made is None else emitter.shared(aten.logical_and.default, made, mask)
    return () if made is None else (Mask(made),)


def _in_scores(node: Node, index: tuple[Affine, ...], emitter: Emitter) -> Node:
    """The tensor with the four dimensions of scores, some of them of size 1."""
    if len(index) == 4 and all(place in (ZERO, along(dim)) for dim, place in enumerate(index)):
        return node
    for dim in reversed(range(len(index))):
        if index[dim] == ZERO:
            node = emitter.shared(aten.select.int, node, dim, 0)
    axes = [place.axes.index(1) for place in index if place != ZERO]
    if axes != sorted(axes):
        node = emitter.shared(aten.permute.default, node, tuple(axes.index(axis) for axis in sorted(axes)))
    for axis in range(4):
        if axis not in axes:
            node = emitter.shared(aten.unsqueeze.default, node, axis)
    return node
