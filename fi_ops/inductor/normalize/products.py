"""The operands and the result of a batched product as [B, H, L, D] tensors.

    bmm(view(q, [B * H, L, D]), ...)                                   q [B, H, L, D]: matmul
    bmm(view(permute(unsqueeze(q, 4), ...), [B * H, L, D]), ...)       q in any order of dimensions: einsum
    bmm(q [N, L, D], ...)                                              heads merged for good: nn.MultiheadAttention, fairseq

In the first there is a tensor to hand over; in the others `Views` puts a view of one into the graph, and takes it out again
where the site is declined. Of merged heads, where nothing says how many there are, N attentions of one head are made.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch.fx import Node

from ..walk import VIEWS, aten, erase_dead, is_call, keeps_order, layout, permutation, same_shape, shape, strip

IDENTITY = (0, 1, 2, 3)


class Caller(Protocol):
    """What puts calls into a graph (`fuse.emit.Emitter`)."""

    def call(self, target, *args) -> Node: ...
    def size(self, node: Node, dim: int): ...


@dataclass
class Views:
    """Views put in front of a product for its site."""

    emitter: Caller
    made: list[Node] = field(default_factory=list)

    def permuted(self, node: Node, dims: tuple[int, ...]) -> Node:
        return node if dims == tuple(range(len(dims))) else self._make(aten.permute.default, node, list(dims))

    def by_heads(self, node: Node, heads: int) -> Node:
        """`node` [B * heads, x, y] as [B, heads, x, y]; one of four dimensions as it is."""
        if len(shape(node)) == 4:
            return node
        if heads == 1:
            return self._make(aten.unsqueeze.default, node, 1)
        return self._make(aten.view.default, node, [-1, heads, *(self.emitter.size(node, dim) for dim in (1, 2))])

    def arranged(self, node: Node, dims: tuple[int | None, ...]) -> Node:
        """`node` with its dimensions in this order; None is one of size 1 that is put in."""
        node = self.permuted(node, tuple(d for d in dims if d is not None))
        for place, dim in enumerate(dims):
            if dim is None:
                node = self._make(aten.unsqueeze.default, node, place)
        return node

    def drop_unused(self) -> None:
        if self.made:
            erase_dead(self.made[0].graph, [node for node in self.made if not node._erased])

    def _make(self, target, *args) -> Node:
        self.made.append(self.emitter.call(target, *args))
        return self.made[-1]


@dataclass(frozen=True)
class Operand:
    """`source.permute(dims)`, [B, H, x, y] or [N, x, y], is what an operand [N, x, y] was viewed from."""

    source: Node
    dims: tuple[int, ...]

    def tensor(self, views: Views) -> Node:
        return views.permuted(self.source, self.dims)

    def transposed(self) -> Operand:
        return Operand(self.source, (*self.dims[:-2], self.dims[-1], self.dims[-2]))

    @property
    def in_order(self) -> bool:
        return self.dims == tuple(range(len(self.dims)))

    @property
    def sizes(self) -> tuple:
        return tuple(shape(self.source)[d] for d in self.dims)


def operand_of(node: Node, through: Callable[[Node], Node] = strip) -> Operand:
    """What an operand [N, x, y] of a bmm was viewed from, as far as that is [B, H, x, y] or [N, x, y]."""
    node = through(node)
    as_it_is = Operand(node, tuple(range(len(shape(node)))))
    if not is_call(node, *VIEWS):
        return as_it_is
    merged = shape(node)
    source = through(node.args[0])
    if len(shape(source)) == 4 and _merges(shape(source), merged):
        return Operand(source, IDENTITY)
    source, dims = layout(source)  # einsum puts in dimensions of size 1
    found = Operand(through(source), dims)
    if len(dims) != len(shape(source)):
        return as_it_is
    fits = same_shape(found.sizes, merged) if len(dims) == 3 else len(dims) == 4 and _merges(found.sizes, merged)
    return found if fits else as_it_is


def _merges(sizes: tuple, merged: tuple) -> bool:
    """[B, H, x, y] becomes [B * H, x, y]."""
    return len(merged) == 3 and same_shape(merged, (sizes[0] * sizes[1], *sizes[2:]))


def key_of(node: Node, through: Callable[[Node], Node]) -> tuple[Operand, bool]:
    """(K [B, H, S, D] or [N, S, D], False), or (K [B, H, D, S], True), of the operand [N, D, S] of a bmm."""
    found = permutation(through(node))
    if found is not None and found[1] == (0, 2, 1):
        return operand_of(found[0], through), False
    key = operand_of(node, through)
    if key.dims != IDENTITY:
        return key.transposed(), False
    found = permutation(key.source)
    if found is not None and found[1] == (0, 1, 3, 2):
        return Operand(through(found[0]), IDENTITY), False
    return key, True


def result_of(product: Node, sizes: tuple) -> Node:
    """The product, or what it is viewed as alone, of shape [B, H, L, D] (`sizes`) or, as einsum has it, [B, H, L, 1, D]."""
    wanted = (sizes, (*sizes[:3], 1, sizes[3]))
    node = product
    while len(node.users) == 1:
        (user,) = node.users
        if not is_call(user, *VIEWS) and not keeps_order(user):
            break
        if any(same_shape(shape(user), size) for size in wanted):
            return user
        node = user
    return product


def like_product(result: Node, node: Node, length, emitter: Caller) -> Node:
    """`result` [B, H, L, D] in the shape of `node`, which `result_of` found."""
    if len(shape(node)) == 4:
        return result
    if len(shape(node)) == 5:
        return emitter.call(aten.unsqueeze.default, result, 3)
    return emitter.call(aten.reshape.default, result, [-1, length, emitter.size(result, 3)])
