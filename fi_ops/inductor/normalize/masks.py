"""Attention masks: what an op may take as `mask`.

The fi ops take a 4-D mask that broadcasts to [B, H, Lq, Lk], bool (True attends) or additive. The kernels read it and skip
what it excludes, so any mask is exact, and none is assumed to be causal: what a mask is proven to say, `bounds.py` finds out.
Several masks at one site (a position bias and padding) become one (`fuse/masks.py`).
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..sites import Declined
from ..support import DTYPES
from ..walk import aten, is_call, is_tensor, may_be_same_size, same_size, shape, strip, value

NEVER = float("-inf")
LOWEST = -1e30
"""A score that is added to this or less is lost in rounding, in float32: adding such a number sets the score to it."""
MODERATE = 1e20
"""Up to this, what is added to a score does not make up for `LOWEST`."""


@dataclass(frozen=True)
class Scale:
    """A factor, known or computed at run time."""

    number: float | Node = 1.0
    divide: bool = False
    """Divides by `number`."""

    @property
    def is_one(self) -> bool:
        return not isinstance(self.number, Node) and self.number == 1

    def times(self, other: Scale, where: Node) -> Scale:
        if self.is_one:
            return other
        if other.is_one:
            return self
        if isinstance(self.number, Node) or isinstance(other.number, Node):
            raise Declined(f"{where.name}: is scaled twice, by factors that are computed at run time")
        return Scale(self.factor * other.factor)

    @property
    def factor(self) -> float:
        """The factor, where it is known."""
        return 1.0 / self.number if self.divide else self.number


ONE = Scale()


@dataclass(frozen=True)
class Mask:
    """One mask of a site: what is added to the scores, or which scores are replaced."""

    node: Node
    """Broadcasts to [B, H, Lq, Lk]; bool (True keeps a score) or a number to add."""
    inverted: bool = False
    """Bool: False keeps a score."""
    fill: float = NEVER
    """Bool: what the other scores become."""
    scale: Scale = ONE
    """Additive: times this."""
    heads_merged: bool = False
    """`node` is [B * H, Lq or 1, Lk or 1]."""

    @property
    def is_bool(self) -> bool:
        return value(self.node).dtype == torch.bool

    @property
    def is_operand(self) -> bool:
        """An op can take it, maybe inverted, as it is."""
        return self.scale.is_one and self.fill == NEVER and not self.heads_merged


def check_fill(name: str, fill: float) -> None:
    """Scores may be set to `fill` by adding it."""
    if fill > LOWEST:
        raise Declined(f"{name}: masked scores are set to {fill}, not to -inf")


def check_mask(mask: Mask, query: Node, kv_len) -> None:
    """`mask` is one that the ops take for `query` [B, H, Lq, D] over `kv_len` keys."""
    name, tensor, q = mask.node.name, value(mask.node), value(query)
    if tensor.dtype not in (torch.bool, *DTYPES):
        raise Declined(f"{name}: mask is {tensor.dtype} with a query of {q.dtype}")
    if tensor.device != q.device:
        raise Declined(f"{name}: mask is on {tensor.device}, query on {q.device}")
    if tensor.dim() > 4:
        raise Declined(f"{name}: mask has {tensor.dim()} dimensions")
    sizes, full = tuple(tensor.shape), (q.shape[0], q.shape[1], q.shape[2], kv_len)[4 - tensor.dim() :]
    if mask.heads_merged:
        full = (q.shape[0] * q.shape[1], q.shape[2], kv_len)
        if not same_size(sizes[0], full[0]) or not isinstance(q.shape[1], int):
            raise Declined(f"{name}: mask {sizes} has not the rows of {full}")
    for have, want in zip(sizes, full, strict=True):
        if not may_be_same_size(have, 1) and not may_be_same_size(have, want):
            raise Declined(f"{name}: mask {sizes} does not broadcast to {tuple(full)}")


def original_mask(mask: Node) -> Node:
    """The mask before it was expanded over dimensions of size 1: the ops broadcast by themselves."""
    node = strip(mask)
    while is_call(node, aten.expand.default) and is_tensor(node.args[0]):
        if len(shape(node)) != len(shape(node.args[0])):
            break
        node = strip(node.args[0])
    return node


def kept_by(condition: Node) -> tuple[Node, bool]:
    """(mask, inverted): the bool mask a condition is, through `logical_not`s."""
    inverted = False
    node = strip(condition)
    while is_call(node, aten.logical_not.default, aten.bitwise_not.default):
        inverted = not inverted
        node = strip(node.args[0])
    return node, inverted
