"""Which dimensions of a tensor make those of a view of it, through any views, permutations and expansions.

    permute(unsqueeze(x [B, L, H, D], 4), [0, 2, 4, 1, 3]), viewed as [B * H, D, L]                 axes (0, 2), (3,), (1,) of x

`einsum` moves dimensions about in as many ways as there are subscripts, and in others where one of them is 1. A dimension of size 1
holds no axis, so that all of these are the same here.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.fx import Node

from ..walk import RESHAPES, aten, is_call, permutation, same_size, shape, strip


@dataclass(frozen=True)
class Axis:
    dim: int | None
    """Of the tensor; None for a dimension that it was expanded over."""
    size: Any


Axes = tuple[tuple[Axis, ...], ...]
"""For each dimension of a view, those of the tensor that are merged into it, in order; none where its size is 1."""


def axes_of(node: Node) -> Axes:
    """A tensor's own."""
    return tuple(() if same_size(size, 1) else (Axis(dim, size),) for dim, size in enumerate(shape(node)))


def sources(node: Node, through: Callable[[Node], Node] = strip) -> list[Node]:
    """`node`, what it is a view of, what that is a view of, and so on. `through` goes over what keeps shape and order."""
    found = [through(node)]
    while True:
        last = found[-1]
        if not is_call(last, *RESHAPES, aten.expand.default) and permutation(last) is None:
            return found
        found.append(through(last.args[0]))


def axes_in(chain: list[Node], source: int) -> Axes | None:
    """The first of `sources`' nodes in axes of the one at `source`."""
    axes: Axes | None = axes_of(chain[source])
    for view, inner in reversed(list(pairwise(chain[: source + 1]))):
        if axes is None:
            return None
        found = permutation(view)
        if found is not None:
            axes = tuple(axes[d] for d in found[1])
        elif is_call(view, aten.expand.default):
            axes = _expanded(axes, shape(inner), shape(view))
        else:
            axes = _regrouped(axes, shape(view))
    return axes


def axes_before(chain: list[Node]) -> Axes | None:
    """The last of `sources`' nodes in axes of the first, which is a view of it."""
    axes: Axes | None = axes_of(chain[0])
    for view, inner in pairwise(chain):
        if axes is None or is_call(view, aten.expand.default):
            return None
        found = permutation(view)
        if found is not None:
            axes = tuple(axes[found[1].index(d)] for d in range(len(axes)))
        else:
            axes = _regrouped(axes, shape(inner))
    return axes


def _regrouped(axes: Axes, sizes: tuple) -> Axes | None:
    """The same elements in the same order, in dimensions of other sizes; None where an axis is split."""
    pending = [axis for group in axes for axis in group]
    groups = []
    for size in sizes:
        group, product = [], 1
        while pending and not same_size(product, size):
            axis = pending.pop(0)
            group.append(axis)
            product = product * axis.size
        if not same_size(product, size):
            return None
        groups.append(tuple(group))
    return None if pending else tuple(groups)


def _expanded(axes: Axes, before: tuple, after: tuple) -> Axes | None:
    new = len(after) - len(before)
    groups = [(Axis(None, size),) for size in after[:new]]
    for group, old, size in zip(axes, before, after[new:], strict=True):
        groups.append(group if same_size(old, size) else (Axis(None, size),))
    return tuple(() if same_size(size, 1) else group for group, size in zip(groups, after, strict=True))
