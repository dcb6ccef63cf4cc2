"""Whether an op may write to a cache itself: nobody looks at the cache as it was, and Inductor hands the op no copy of it."""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from ..sites import Declined
from ..support import HAS_RELATIVE_OFFSETS
from ..walk import aten, is_call, is_full_scatter, is_tensor, permutation, same_size, value
from .cache_update import CacheWrite
from .stack import are_disjoint, full_scatters


@dataclass
class GraphInputs:
    """What the checks ask about a graph's inputs."""

    sharing: set[Node]
    """Those that lie in one storage with another: keys and values, or layers, cut out of one tensor."""
    numbers: dict
    """Symbolic expressions, and the inputs that are these numbers."""

    @classmethod
    def of(cls, graph: Graph) -> GraphInputs:
        by_storage: dict[int, list[Node]] = {}
        numbers: dict = {}
        for node in graph.find_nodes(op="placeholder"):
            if is_tensor(node) and value(node).layout is torch.strided:
                by_storage.setdefault(value(node).untyped_storage()._cdata, []).append(node)
            elif isinstance(value(node), torch.SymInt):
                numbers.setdefault(value(node).node.expr, node)
        return cls({node for nodes in by_storage.values() if len(nodes) > 1 for node in nodes}, numbers)


def check_in_place(write: CacheWrite, inputs: GraphInputs) -> None:
    """The write may happen in the cache itself: it does in the program, and nobody looks at the cache as it was.

    Inductor does not see that inputs in one storage do not overlap. It would hand an op that writes to one a copy of the whole
    storage, which the writes that it generates itself need not.
    """
    cache = write.base
    if cache in inputs.sharing:
        raise Declined(
            f"{cache.name}: the cache shares its storage with another input, so that the op would be given a copy"
        )
    stored = False
    for user in cache.users:
        if is_call(user, aten.copy_.default) and user.args[0] is cache:
            stored = True
        elif not only_for(user, cache, write.nodes) and not is_call(user, aten.sym_size.int, aten.sym_stride.int):
            raise Declined(f"{user.name}: reads {cache.name} as it was before the write {write.node.name}")
    if cache.op in ("placeholder", "get_attr"):
        if not stored:
            raise Declined(f"{cache.name}: the updated cache {write.node.name} is not stored back into it")
    elif not is_fresh(cache):
        raise Declined(f"{cache.name}: the cache is {cache.target}, neither a graph input nor made in the graph")


def check_readers(write: CacheWrite, replaced: Collection[Node], is_too_early: Callable[[Node], bool]) -> None:
    """Nobody but what is replaced looks at the updated cache before the op has written to it."""
    if write.part is not None:
        nodes = write.nodes
        for node in nodes.difference(write.part.after):
            for user in node.users:
                if user not in nodes and user not in replaced and not only_for(user, node, nodes):
                    raise Declined(f"{user.name}: reads a stack of caches between the writes of key and value")
        whole = ends = write.part.after
    else:
        whole = updated_caches(write)
        ends = [write.node, *whole]
    for user in (user for node in ends for user in node.users):
        if is_call(user, aten.clone.default) and all(u in whole for u in user.users):
            continue
        if user not in replaced and user not in whole and is_too_early(user):
            raise Declined(f"{user.name}: reads the updated cache before the attention does")


def updated_caches(write: CacheWrite) -> list[Node]:
    """The nodes besides the write that are the whole updated cache in its own layout: where the write goes through a
    transpose or through whole slices of the cache, its result is transposed (`index_copy_`: cloned first) or scattered back."""
    found = []
    for user in write.node.users:
        for node in user.users if is_call(user, aten.clone.default) else (user,):
            back = permutation(node)
            if write.through is not None and back is not None and back[1] == write.through:
                found.append(node)
    for node in [write.node] if write.through is None else list(found):
        found += [scatter for scatter in full_scatters(node) if scatter not in found]
    return found


def join(key: CacheWrite, value: CacheWrite) -> bool:
    """Whether key and value go into two parts of one stack, one after the other; then they are one write from here on."""
    for first, second in ((key, value), (value, key)):
        if first.part is None or second.part is None or second.part.before not in first.part.after:
            continue
        if not are_disjoint(first.part.indices, second.part.indices):
            continue
        first.part.nodes = second.part.nodes = first.nodes | second.nodes
        first.part.after, second.part.before = second.part.after, first.part.before
        return True
    return False


def storage_offset(write: CacheWrite, inputs: GraphInputs) -> int | Node:
    """Where the cache begins in its storage, as an argument of a call. Only a view of the cache needs to say so."""
    offset = value(write.base).storage_offset()
    if not write.is_viewed or same_size(offset, 0):
        return 0
    if not HAS_RELATIVE_OFFSETS:
        raise Declined(
            f"{write.base.name}: the cache begins at {offset} in its storage, and torch before 2.13 would add that twice "
            "to the address of a view of it"
        )
    if isinstance(offset, int):
        return offset
    if offset.node.expr not in inputs.numbers:
        raise Declined(
            f"{write.base.name}: the cache begins at {offset} in its storage, which no input of the graph is"
        )
    return inputs.numbers[offset.node.expr]


VIEWS = (aten.slice.Tensor, aten.select.int, aten.unbind.int, operator.getitem)


def only_for(node: Node, source: Node, writes: Collection[Node]) -> bool:
    """`node` looks at no element of `source`: it is one of the writes to it, or a view of it that is used in this way only."""
    if node.args[0] is not source or source in tree_leaves((node.args[1:], node.kwargs)):
        return False
    if node in writes or is_full_scatter(node):
        return True
    if is_call(node, aten.copy.default):  # `cache[...] = new` reads no more of the slice than its shape
        return all(user in writes for user in node.users)
    is_view = is_call(node, *VIEWS) or permutation(node) is not None
    return is_view and all(only_for(user, node, writes) for user in node.users)


def is_fresh(node: Node) -> bool:
    """The node made its tensor anew: no view, no graph input."""
    if is_call(node, operator.getitem) and is_call(node.args[0], torch.ops.higher_order.auto_functionalized_v2):
        return True
    return is_call(
        node,
        aten.full.default,
        aten.zeros.default,
        aten.empty.memory_format,
        aten.index_put.default,
        aten.clone.default,
    )
