"""Caches that are parts of one tensor: keys and values, of one layer or of all of them.

    %part = select(select(%stack, 0, 3), 0, 1)                                                                  stack[3, 1]
    %next = select_scatter(%stack, select_scatter(select(%stack, 0, 3), write(%part), 0, 1), 0, 3)   a write to stack[3, 1]

A part is known by its indices by dimension of the stack, {0: 3, 1: 1}. Every write makes a new value of the whole stack; what is
read of it is looked for in the writes that led to it, past those to other parts. An op writes to both parts at once, so the write
to one must be made in the stack as the other left it, and nothing may look at it in between.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Node

from ..sites import Declined
from ..walk import aten, dim_of, is_call, is_full_scatter, permutation, shape, strip

Indices = dict[int, int]
"""By dimension of the stack."""


@dataclass
class Part:
    """Where in a stack a write goes."""

    before: Node
    """The stack that is written to."""
    after: list[Node]
    """The stack after the write: more than one node where it is then scattered over the whole of itself, as `stack[:]` is."""
    indices: Indices
    nodes: set[Node]
    """What brings the write back into the stack, up to `after`."""


def part_of(node: Node) -> tuple[Node, Indices] | None:
    """(stack, indices) of a node that is a part of a tensor."""
    picks = []
    node = strip(node)
    while True:
        if is_call(node, aten.select.int):
            source, dim, index = node.args[0], dim_of(node.args[0], node.args[1]), node.args[2]
        elif is_call(node, operator.getitem) and is_call(node.args[0], aten.unbind.int):
            source, dim = node.args[0].args[0], dim_of(node.args[0].args[0], (*node.args[0].args[1:], 0)[0])
            index = node.args[1]
        else:
            break
        index = _from_the_front(index, shape(source)[dim])
        if index is None:
            return None
        picks.append((dim, index))
        node = strip(source)
    return (node, _by_dimension(node, picks[::-1])) if picks else None


def _from_the_front(index: object, size: object) -> int | None:
    if not isinstance(index, int):
        return None
    if index < 0:
        return index + size if isinstance(size, int) else None
    return index


def _by_dimension(stack: Node, picks: list[tuple[int, int]]) -> Indices:
    """The indices of selections made one after another, each of what the last one left."""
    left = list(range(len(shape(stack))))
    return {left.pop(dim): index for dim, index in picks}


def written_part(stack: Node) -> tuple[Node, Indices, Node] | None:
    """(the stack before, indices, the part as written) of a stack after a write to a part."""
    if not is_call(stack, aten.select_scatter.default):
        return None
    before, node = strip(stack.args[0]), stack
    picks: list[tuple[int, int]] = []
    while is_call(node, aten.select_scatter.default):
        if picks and part_of(node.args[0]) != (before, _by_dimension(before, picks)):
            break  # what is written is itself a stack after a write
        index = _from_the_front(node.args[3], shape(node)[dim_of(node, node.args[2])])
        if index is None:
            return None
        picks.append((dim_of(node, node.args[2]), index))
        node = strip(node.args[1])
    return before, _by_dimension(before, picks), node


def written_to(stack: Node, indices: Indices) -> Node | None:
    """What was last written to a part of a stack."""
    while True:
        write = written_part(stack)
        if write is None:
            return None
        before, others, written = write
        if others == indices:
            return written
        if not are_disjoint(others, indices):
            return None
        stack = before


def are_disjoint(a: Indices, b: Indices) -> bool:
    """Two parts have no element in common."""
    return any(d in b and b[d] != index for d, index in a.items())


def part_written(write: Node, cache: Node, through: tuple[int, ...] | None) -> Part | None:
    """Where `write`, a new value of `cache` (through a transpose, of which it is undone again), goes in a stack; None if it is
    no part of one."""
    found = part_of(cache)
    if found is None:
        return None
    way = _way_back(write, found, REACH)
    if way is None:
        raise Declined(f"{write.name}: is not put back into {found[0].name}, of which {cache.name} is a part")
    written = written_part(way[-1])[2]
    back = permutation(written)
    if through is not None and back is not None and back[1] == through:
        written = strip(back[0])
    if written is not write:
        raise Declined(f"{written.name}: is put into {found[0].name} in the place of {write.name}")
    after = [way[-1], *full_scatters(way[-1])]
    return Part(found[0], after, found[1], {*way, *after})


REACH = 12
"""Steps from a write up to the stack: a transpose and its copy, and two for each dimension."""


def _way_back(node: Node, part: tuple[Node, Indices], steps: int) -> list[Node] | None:
    """The nodes from a write up to the stack in which it stands in the place of `part`."""
    for user in node.users if steps else ():
        scatters = (is_call(user, aten.select_scatter.default) or is_full_scatter(user)) and user.args[1] is node
        if not scatters and not is_call(user, aten.clone.default) and permutation(user) is None:
            continue
        stack = written_part(user)
        if stack is not None and stack[:2] == part:
            return [user]
        rest = _way_back(user, part, steps - 1)
        if rest is not None:
            return [user, *rest]
    return None


def full_scatters(node: Node) -> list[Node]:
    """The nodes that are `node` again, scattered over the whole of something."""
    found = [node]
    for known in found:  # which grows
        found += [user for user in known.users if is_full_scatter(user) and user.args[1] is known and user not in found]
    return found[1:]
