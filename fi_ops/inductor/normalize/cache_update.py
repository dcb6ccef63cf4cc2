"""Writes of new keys or values into a static cache.

    index_put(cache, [None, None, pos], new)                          cache[:, :, pos] = new, cache.index_copy_(2, pos, new)
    slice_scatter(cache, new, 2, start, start + len)                  cache[:, :, start:start + len] = new

with cache [B, Hkv, Lmax, D], or the same on dim 1 of a cache [B, Lmax, Hkv, D]. In the functional graph the write's result is
the cache from then on; where the cache is a graph input, a trailing `copy_` stores it there.

A cache of more sequences and slots than there are (Meta's llama, litgpt) is written and read by a prefix of both:

    slice_scatter(cache, write(cache[:batch], new), 0, 0, batch)                                      cache[:batch, ...] = new
    updated[:batch, :end]                                              what is attended to; all that was written is within it
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from ..sites import Declined
from ..walk import (
    argument,
    at_least,
    aten,
    commuted,
    dim_of,
    is_call,
    is_tensor,
    may_be_same_size,
    permutation,
    prims,
    same_shape,
    same_size,
    same_value,
    shape,
    slice_range,
    strip,
    value,
)
from .stack import Part, part_of, part_written, written_to

HEADS_FIRST = (0, 2, 1, 3)


@dataclass
class CacheWrite:
    node: Node
    """The write; its value is the updated cache."""
    cache: Node
    """The tensor that is written to, maybe through a transpose."""
    new: Node
    """[B, Hkv, Lq, D], or [B, Lq, Hkv, D] where `dims` is given."""
    positions: Node | None
    """[Lq] slots, or None where `start` says where a run of slots begins."""
    start: object = 0
    dims: tuple[int, ...] | None = None
    """The permutation that makes the write's result [B, Hkv, Lmax, D], if it is not so already."""
    through: tuple[int, ...] | None = None
    """The permutation of `cache` that is written to."""
    into_rows: Node | None = None
    """The write to the first sequences of `cache`, which `node` puts back; None where it is to all of them."""
    end: object = None
    """The slots that are attended to end here, if not with the cache."""
    part: Part | None = None
    """Where `cache` is in a stack of caches, if it is a part of one."""
    offset: int | Node = 0
    """Where `base` begins in its storage, for a view of it."""

    @property
    def nodes(self) -> set[Node]:
        """What the op does instead."""
        own = {self.node} if self.into_rows is None else {self.node, self.into_rows}
        return own if self.part is None else own | self.part.nodes

    @property
    def base(self) -> Node:
        """The tensor that the op writes to: the cache, or the stack that it is a part of."""
        return self.cache if self.part is None else self.part.before

    @property
    def is_viewed(self) -> bool:
        """The op sees another shape of `base` than it has."""
        views = (self.cache_dims, self.into_rows, self.end, self.part)
        return any(view is not None for view in views)

    @property
    def cache_dims(self) -> tuple[int, ...] | None:
        """The permutation that makes `cache` [B, Hkv, Lmax, D]."""
        return HEADS_FIRST if (self.dims is None) != (self.through is None) else None


def match_cache_write(node: Node, dims: tuple[int, ...] | None = None) -> CacheWrite | None:
    """The write whose updated cache `node` [B, Hkv, Lmax, D] is (or is after `.permute(dims)`); None if there is none."""
    write = strip(node)
    if dims is None:
        found = permutation(write)
        if found is not None:
            write, dims = strip(found[0]), found[1]
    if dims not in (None, HEADS_FIRST):
        return None
    write, ends = _whole(write, 2 if dims is None else 1)
    part = part_of(write)
    if part is not None:
        written = written_to(*part)
        if written is None:
            return None
        write, dims = _before_transpose(written, dims)
    rows = ends.pop(0, None)
    found = _match_rows(write, rows, dims) if rows is not None else _match_write(write, dims)
    if found is not None:
        found.part = part_written(found.node, found.cache, found.through)
    if found is not None and ends:
        (found.end,) = ends.values()
        _check_end(found)
    return found


def _before_transpose(node: Node, dims: tuple[int, ...] | None) -> tuple[Node, tuple[int, ...] | None]:
    """(x, dims): `node`, to be permuted by `dims`, is x to be permuted by those."""
    found = permutation(node)
    if found is None or found[1] != HEADS_FIRST:
        return node, dims
    return strip(found[0]), HEADS_FIRST if dims is None else None


def _match_write(write: Node, dims: tuple[int, ...] | None) -> CacheWrite | None:
    if is_call(write, aten.index_put.default):
        return _match_index_put(write, dims)
    if is_call(write, aten.slice_scatter.default):
        return _match_slice_copy(write, dims)
    return None


def _whole(node: Node, length_dim: int) -> tuple[Node, dict[int, object]]:
    """(updated cache, where it ends): the tensor whose first sequences and slots `node` is."""
    ends: dict[int, object] = {}
    while True:
        node = strip(node)
        parts = slice_range(node)
        if parts is None:
            return node, ends
        source, dim, start, end = parts
        is_prefix = dim in (0, length_dim) and same_size(start, 0) and end is not None
        if not is_prefix or not same_size(shape(node)[dim], end):
            return node, ends
        ends.setdefault(dim, end)  # the shortest of nested prefixes
        node = source


def _match_rows(outer: Node, rows, dims: tuple[int, ...] | None) -> CacheWrite | None:
    """A write to the first `rows` sequences of a cache."""
    if not is_call(outer, aten.slice_scatter.default):
        return None
    cache, inner = strip(outer.args[0]), strip(outer.args[1])
    start, end = argument(outer, 3, "start", None), argument(outer, 4, "end", None)
    if dim_of(cache, argument(outer, 2, "dim", 0)) != 0 or argument(outer, 5, "step", 1) != 1:
        raise Declined(f"{outer.name}: all sequences are written, the first {value(rows)} are read")
    write = _match_write(inner, dims)
    if write is None:
        return None
    parts = slice_range(write.cache)
    if write.through is not None or parts is None or parts[0] is not cache or parts[1] != 0 or parts[3] is None:
        raise Declined(f"{inner.name}: writes to {write.cache.name}, not to the first sequences of {cache.name}")
    starts_at_0 = same_size(parts[2], 0) and (start is None or same_size(start, 0))
    if not starts_at_0 or end is None or not same_size(parts[3], end) or not same_size(rows, end):
        raise Declined(f"{outer.name}: other sequences are written than read, the first {value(rows)}")
    if list(inner.users) != [outer]:
        raise Declined(f"{inner.name}: the written sequences are used before they are part of the cache")
    return replace(write, node=outer, cache=cache, into_rows=inner)


def _check_end(write: CacheWrite) -> None:
    """All new tokens are among those attended to, so that the op finds their slots in what it sees of the cache."""
    if write.positions is not None:
        raise Declined(f"{write.positions.name}: positions are not known to be within the prefix {value(write.end)}")
    length = shape(write.new)[2 if write.dims is None else 1]
    if not at_least(write.end, value(write.start) + length):
        raise Declined(f"{write.node.name}: the prefix {value(write.end)} ends before the slots that are written")


def _match_slice_copy(write: Node, dims: tuple[int, ...] | None) -> CacheWrite:
    cache, new = write.args[:2]
    length_dim = 2 if dims is None else 1
    start, end = argument(write, 3, "start", None), argument(write, 4, "end", None)
    if dim_of(cache, argument(write, 2, "dim", 0)) != length_dim or argument(write, 5, "step", 1) != 1:
        raise Declined(f"{write.name}: writes a slice of another dimension than the length (dim {length_dim})")
    start = 0 if start is None else start
    if not at_least(start, 0):
        raise Declined(f"{write.name}: starts at {value(start)}, which may count from the end")
    if is_call(new, aten.copy.default):  # cache[...] = new: a copy into the slice
        place, new = new.args[:2]
        if not is_tensor(new) or not same_shape(shape(new), shape(place)):
            raise Declined(f"{write.name}: what it writes is broadcast to the slots")
    expected = list(shape(cache))
    expected[length_dim] = shape(new)[length_dim] if len(shape(new)) == len(expected) else 0
    if (
        not same_shape(shape(new), expected)
        or end is None
        or not same_size(value(end) - value(start), expected[length_dim])
    ):
        raise Declined(f"{write.name}: writes {tuple(shape(new))} to slots {value(start)} to {value(end)}")
    return CacheWrite(write, strip(cache), new, None, start, dims)


def same_positions(a: CacheWrite, b: CacheWrite) -> bool:
    if a.positions is None or b.positions is None:
        return a.positions is b.positions and same_size(a.start, b.start)
    return same_value(a.positions, b.positions)


def _match_index_put(write: Node, dims: tuple[int, ...] | None) -> CacheWrite:
    cache, indices, new = write.args[:3]
    length_dim = 2 if dims is None else 1
    if argument(write, 3, "accumulate", False):
        raise Declined(f"{write.name}: accumulates into the cache")
    if len(indices) != length_dim + 1 or any(i is not None for i in indices[:length_dim]):
        raise Declined(f"{write.name}: indexes other dimensions than the length (dim {length_dim})")
    positions = indices[length_dim]
    index = value(positions)
    if may_be_negative(positions):
        raise Declined(f"{positions.name}: has negative positions, which count from the end")
    if index.dtype not in (torch.int64, torch.int32) or index.dim() != 1:
        raise Declined(
            f"{positions.name}: positions are {index.dtype} with {index.dim()} dimensions, not a 1-D integer tensor"
        )
    if index.device != value(cache).device:  # indexing moves them, the ops do not
        raise Declined(f"{positions.name}: positions are on {index.device}, the cache on {value(cache).device}")
    expected = list(shape(cache))
    expected[length_dim] = index.shape[0]
    new = with_leading_ones(new, expected)
    if not is_tensor(new) or not _fills(shape(new), expected):
        raise Declined(f"{write.name}: writes {tuple(shape(new))} where {tuple(expected)} is the shape of the slots")
    found = permutation(strip(cache))
    if found is not None and found[1] == HEADS_FIRST:
        return CacheWrite(write, strip(found[0]), new, positions, 0, dims, HEADS_FIRST)
    return CacheWrite(write, strip(cache), new, positions, 0, dims)


def _fills(written, expected) -> bool:
    """Values of the shape `written` are not broadcast over `expected`: sizes are equal, or must be as they are not 1."""
    return len(written) == len(expected) and all(
        same_size(a, b) or (may_be_same_size(a, b) and not may_be_same_size(a, 1))
        for a, b in zip(written, expected, strict=True)
    )


def with_leading_ones(node: Node, expected: list) -> Node:
    """The tensor of shape `expected` that `node` is without leading dimensions of size 1: `x[...] = y` drops them from y."""
    missing = len(expected) - len(shape(node)) if is_tensor(node) else 0
    if missing <= 0 or not all(same_size(d, 1) for d in expected[:missing]):
        return node
    source = strip(node)
    while is_call(
        source, aten.view.default, aten.squeeze.dim, aten.squeeze.dims, aten.select.int, aten.reshape.default
    ):
        source = strip(source.args[0])
        if same_shape(shape(source), expected):
            return source
    return node


def may_be_negative(positions: Node) -> bool:
    """Constant positions below 0. Those that only come at run time are refused by the op, not wrapped around."""
    source = strip(positions)
    if is_call(source, aten.full.default):
        return not isinstance(source.args[1], int) or source.args[1] < 0
    if source.op != "get_attr":
        return False
    constant = getattr(source.graph.owning_module, str(source.target), None)
    with unset_fake_temporarily():
        return isinstance(constant, torch.Tensor) and bool((constant < 0).any())


def start_of_one(positions: Node) -> Node | None:
    """`start` where one position is spelt `arange(1) + start`: what a static cache counts is then the position itself."""
    source = strip(positions)
    if not is_call(source, aten.add.Tensor) or argument(source, 2, "alpha", 1) != 1:
        return None
    for iota, start in commuted(source):
        if not is_call(iota, prims.iota.default) or not is_tensor(start):
            continue
        begins_at_0 = same_size(iota.kwargs.get("start"), 0)
        if same_size(iota.args[0], 1) and begins_at_0 and value(start).dtype == value(positions).dtype:
            return start if value(start).dim() == 0 else None
    return None
