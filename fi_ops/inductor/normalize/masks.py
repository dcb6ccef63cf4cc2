"""Attention masks: what an op may take as `mask`.

The fi ops take a 4-D mask that broadcasts to [B, H, Lq, Lk], bool (True attends) or additive. Where a mask came from is
not asked: the kernels read it and skip what it excludes, so any mask is exact, and none is assumed to be causal.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import torch
from torch.fx import Node

from ..sites import Declined
from ..walk import aten, is_call, is_tensor, may_be_same_size, shape, strip, value


def check_mask(mask: Node, query: Node, kv_len) -> None:
    """`mask` is one that the ops take for `query` [B, H, Lq, D] over `kv_len` keys."""
    tensor, q = value(mask), value(query)
    if tensor.dtype not in (torch.bool, torch.float32, q.dtype):
        raise Declined(f"{mask.name}: mask is {tensor.dtype} with a query of {q.dtype}")
    if tensor.device != q.device:
        raise Declined(f"{mask.name}: mask is on {tensor.device}, query on {q.device}")
    if tensor.dim() > 4:
        raise Declined(f"{mask.name}: mask has {tensor.dim()} dimensions")
    full = (q.shape[0], q.shape[1], q.shape[2], kv_len)[4 - tensor.dim() :]
    for have, want in zip(tensor.shape, full, strict=True):
        if not may_be_same_size(have, 1) and not may_be_same_size(have, want):
            raise Declined(f"{mask.name}: mask {tuple(tensor.shape)} does not broadcast to {tuple(full)}")


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
