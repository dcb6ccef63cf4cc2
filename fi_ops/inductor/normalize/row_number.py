"""A number for each row of logits: the temperature, top-k, top-p or min-p of a request, as a literal or as data.

x / 0.7             0.7
x / t[:, None]      RowNumber(t)
x / t               RowNumber(t), t without dimensions: one number for all rows
sorted >= gather(sorted, 1, (V - k)[:, None])       RowNumber(k)
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..walk import aten, commuted, is_call, is_cast, is_tensor, number, same_size, shape, strip, value


@dataclass(frozen=True)
class RowNumber:
    """`sign * node + offset`, and `unset` in the rows where `unless` is true."""

    node: Node
    """[B] or [B, 1], one element for all rows, or a symbolic size of the graph."""
    sign: int = 1
    offset: float = 0
    unless: Node | None = None
    """Bool, as `node`."""
    at_most: object = None
    """A size: the graph raises where the number is above it, or below 1."""

    def minus_from(self, total: float) -> RowNumber:
        return replace(self, sign=-self.sign, offset=total - self.offset)

    def plus(self, number: float) -> RowNumber:
        return replace(self, offset=self.offset + number)


Number = int | float | RowNumber


def is_one_a_row(node: Node) -> bool:
    """It is broadcast along the vocabulary: one element for each row, or one for all."""
    return is_tensor(node) and (value(node).dim() == 0 or same_size(shape(node)[-1], 1))


def row_number(node: object) -> Number | None:
    """The literal that `node` is, or the number of each row; None where it differs along the vocabulary."""
    literal = number(node)
    if literal is not None:
        return literal
    return RowNumber(without_dim(node)) if isinstance(node, Node) and is_one_a_row(node) else None


def without_dim(node: Node) -> Node:
    """Without the dimension of size 1 for the vocabulary, and casts that lose nothing, where the graph put them in."""
    while True:
        node = strip(node)
        if is_call(node, aten.unsqueeze.default) and is_one_a_row(node):
            node = node.args[0]
        elif is_call(node, aten.view.default, aten.reshape.default) and is_one_a_row(node):
            source = node.args[0]
            if value(source).dim() != 1 or not same_size(shape(source)[0], shape(node)[0]):
                return node
            node = source
        elif is_cast(node) and _keeps_numbers(value(node.args[0]).dtype, value(node).dtype):
            node = node.args[0]
        else:
            return node


def _keeps_numbers(source: torch.dtype, target: torch.dtype) -> bool:
    integers = (torch.int32, torch.int64)
    if source in integers:
        return target in integers
    return source.is_floating_point and target.is_floating_point and source.itemsize <= target.itemsize


def complement(total, node: object) -> Number | None:
    """`total - node`, where the graph has `node = total - x` the x itself. The total is a number or a symbolic size."""
    literal = number(node)
    if literal is not None:
        return total - literal if isinstance(total, (int, float)) else None
    if not isinstance(node, Node) or not is_one_a_row(node):
        return None
    node = without_dim(node)
    found = _subtrahend(total, node)
    if found is not None:
        return RowNumber(without_dim(found))
    return RowNumber(node).minus_from(total) if isinstance(total, (int, float)) else None


def _subtrahend(total, node: Node) -> Node | None:
    """x where the node is total - x."""
    if is_call(node, aten.sub.Tensor, aten.rsub.Scalar) and not node.kwargs and len(node.args) == 2:
        a, b = node.args if node.target is aten.sub.Tensor else reversed(node.args)
        return b if _is_total(a, total) and is_tensor(b) else None
    if is_call(node, aten.add.Tensor) and not node.kwargs:
        for term, other in commuted(node):
            if _is_total(other, total) and is_call(term, aten.neg.default):
                return term.args[0]
    return None


def _is_total(node: object, total) -> bool:
    if is_tensor(node) or isinstance(total, float):
        return isinstance(total, (int, float)) and number(node) == total
    return same_size(node, total)
