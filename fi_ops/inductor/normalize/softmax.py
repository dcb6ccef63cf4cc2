"""Softmax over the last dimension, from its decomposition.

exp(s - amax(s, -1, True)) / sum(exp(...), -1, True)                                                  softmax(s, dim=-1)
w / sum(w, -1, True)                                                                                  weights normalised
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from torch.fx import Node

from ..walk import argument, aten, dim_of, is_call, is_tensor, shape, strip, strip_casts


def match_softmax(node: Node) -> Node | None:
    """The scores whose softmax over the last dim `node` is, through casts and clones."""
    division = strip_casts(node)
    if not is_call(division, aten.div.Tensor):
        if is_call(division, aten._softmax.default, aten.softmax.int):
            source = division.args[0]
            return source if dim_of(source, division.args[1]) == len(shape(source)) - 1 else None
        return None
    top, total = division.args[0], division.args[1]
    if not is_call(top, aten.exp.default) or not is_call(total, aten.sum.dim_IntList) or total.args[0] is not top:
        return None
    shifted = top.args[0]
    if not is_call(shifted, aten.sub.Tensor) or not is_call(shifted.args[1], aten.amax.default):
        return None
    scores, maximum = shifted.args[0], shifted.args[1]
    last = len(shape(scores)) - 1
    keeps = argument(total, 2, "keepdim", False) and argument(maximum, 2, "keepdim", False)
    over_last = all([dim_of(scores, d) for d in reduction.args[1]] == [last] for reduction in (total, maximum))
    return scores if maximum.args[0] is scores and keeps and over_last else None


def match_normalised(node: Node) -> Node | None:
    """The weights that `node` is, divided by their sum over the last dim."""
    division = strip_casts(node)
    if not is_call(division, aten.div.Tensor) or not is_tensor(division.args[1]):
        return None
    weights, total = strip(division.args[0]), strip(division.args[1])
    if not is_call(total, aten.sum.dim_IntList, aten.sum.default) or strip(total.args[0]) is not weights:
        return None
    if total.target is aten.sum.default:
        return weights if len(shape(weights)) == 1 else None
    over_last = [dim_of(weights, d) for d in total.args[1]] == [len(shape(weights)) - 1]
    return weights if over_last and argument(total, 2, "keepdim", False) else None
