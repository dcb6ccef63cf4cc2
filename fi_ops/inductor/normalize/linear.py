"""Linear layers: a product with the transpose of a weight, with or without a bias.

mm(%input, permute(%weight, [1, 0]))          addmm(%bias, %input, permute(%weight, [1, 0]))
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,misc"

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ..walk import argument, aten, is_call, permutation, same_size, shape, value


@dataclass
class Linear:
    """`input [rows, in_features] @ weight [out_features, in_features].T + bias`."""

    node: Node
    input: Node
    weight: Node
    bias: Node | None = None


def match_linear(node: Node) -> Linear | None:
    """The linear layer that a call computes; None where it is another product."""
    bias = None
    if is_call(node, aten.mm.default):
        x, transposed = node.args
    elif is_call(node, aten.addmm.default):
        bias, x, transposed = node.args
        if argument(node, 3, "beta", 1) != 1 or argument(node, 4, "alpha", 1) != 1:
            return None
        if len(shape(bias)) != 1 or not same_size(shape(bias)[0], shape(node)[1]):
            return None
    else:
        return None
    found = permutation(transposed)
    if found is None or found[1] != (1, 0):
        return None
    return Linear(node, x, found[0], bias)


def is_written(node: Node) -> bool:
    """A graph input that the graph stores something into."""
    return any(is_call(user, aten.copy_.default) and user.args[0] is node for user in node.users)


def is_input(node: Node) -> bool:
    return node.op == "placeholder" and value(node) is not None
