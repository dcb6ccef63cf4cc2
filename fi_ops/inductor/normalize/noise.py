"""Random numbers that race for the largest: exponential and Gumbel noise, from uniform numbers.

    e = -log(u)                                    Exponential: argmax(w / e) draws from w
    g = -log(e), or scores - log(e)                Gumbel: argmax(scores + g) draws from softmax(scores)

with u uniform in (0, 1), clamped or with an eps added here and there so that no logarithm is infinite. The rate of an
exponential, and what is added to all Gumbel numbers, does not matter to the argmax.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import math

from torch.fx import Node

from ..sites import Declined
from ..walk import (
    argument,
    aten,
    commuted,
    is_call,
    is_tensor,
    number,
    same_shape,
    same_size,
    shape,
    strip_casts,
    value,
)

EPS = 1.1e-6
"""What is added to a number, or the bound it is clamped to, against infinities. (float32's own step at 1 is 1.2e-7.)"""


def gumbel_noise(node: object, race: Node, sign: int = 1) -> Node | None:
    """The uniform numbers that `sign` * node is fresh Gumbel noise of, one for each element of `race`."""
    scale, _, inner = _linear(node)
    if scale != -sign or not is_call(inner, aten.log.default):
        return None
    return exponential_noise(inner.args[0], race)


def exponential_noise(node: object, race: Node) -> Node | None:
    """The uniform numbers that the node is fresh exponential noise of, one for each element of `race`."""
    if not is_tensor(node) or not same_shape(shape(node), shape(race)):
        return None
    node = _unclamped(node, low=0.0)
    if is_call(node, aten.exponential.default):
        raise Declined(f"{node.name}: config.fallback_random asks for torch's own random numbers")
    scale, offset, inner = _linear(node)
    if scale < 0 and 0 <= offset <= EPS:
        return _uniform(_logarithm_of(inner), race)
    if scale > 0 and offset == 0 and inner is not node:
        return exponential_noise(inner, race)
    return None


def _logarithm_of(node: Node) -> object:
    """u of log(u), or of torch's own where(u >= 1 - eps, -eps, log(u))."""
    condition = None
    if is_call(node, aten.where.self):
        condition, edge, node = node.args
        edge = number(edge)
        if not is_call(condition, aten.ge.Scalar) or edge is None or not -1e-2 < edge < 0:
            return None
        node = strip_casts(node)
    if not is_call(node, aten.log.default):
        return None
    if condition is not None and strip_casts(condition.args[0]) is not strip_casts(node.args[0]):
        return None
    return node.args[0]


def _uniform(node: object, race: Node) -> Node | None:
    """The random numbers that the node is, uniform in (0, 1) but for less than EPS, one for each element of `race`."""
    if not isinstance(node, Node):
        return None
    node = _unclamped(node, low=0.0, high=1.0)
    if is_call(node, aten.rand.default):
        return node if same_size(value(node).numel(), value(race).numel()) else None
    if is_call(node, aten.uniform.default):
        low, high = argument(node, 1, "from", 0.0), argument(node, 2, "to", 1.0)
        is_one_each = same_size(value(node).numel(), value(race).numel())
        return node if _near(low, 0) and _near(high, 1) and is_one_each else None
    if _is_reshaped(node):
        return _uniform(node.args[0], race)
    scale, offset, inner = _linear(node)
    is_uniform = (_near(scale, 1) and _near(offset, 0)) or (_near(scale, -1) and _near(offset, 1))
    return _uniform(inner, race) if is_uniform and inner is not node else None


def _is_reshaped(node: object) -> bool:
    """Every element of the first argument once, in another shape; torch 2.15 fills in place by `as_strided` of a flat tensor."""
    if is_call(node, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return True
    if not is_call(node, aten.as_strided.default) or argument(node, 3, "storage_offset", None) not in (None, 0):
        return False
    known, step = value(node), 1
    for size, stride in zip(reversed(known.shape), reversed(known.stride()), strict=True):
        if not same_size(stride, step):
            return False
        step = step * size
    return value(node.args[0]).dim() == 1 and same_size(shape(node.args[0])[0], step)


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= EPS


def _unclamped(node: object, low: float, high: float = math.inf) -> object:
    """Through clamps to bounds at `low` and `high`."""
    while True:
        node = strip_casts(node)
        if is_call(node, aten.clamp_min.default, aten.maximum.default):
            bounds = (_constant(node.args[1]), None)
        elif is_call(node, aten.clamp_max.default, aten.minimum.default):
            bounds = (None, _constant(node.args[1]))
        elif is_call(node, aten.clamp.default):
            bounds = (argument(node, 1, "min", None), argument(node, 2, "max", None))
        else:
            return node
        if bounds == (None, None) or not all(isinstance(b, (int, float, type(None))) for b in bounds):
            return node
        if (bounds[0] is not None and bounds[0] - low > EPS) or (bounds[1] is not None and high - bounds[1] > EPS):
            return node
        node = node.args[0]


def _linear(node: object) -> tuple[float, float, Node]:
    """(a, b, x) where the node is a * x + b with numbers a and b, and x is nothing of the kind."""
    scale, offset = 1.0, 0.0
    while True:
        node = strip_casts(node)
        step = _linear_step(node)
        if step is None:
            return scale, offset, node
        a, b, node = step
        scale, offset = scale * a, offset + scale * b


def _linear_step(node: object) -> tuple[float, float, Node] | None:
    if is_call(node, aten.neg.default):
        return -1.0, 0.0, node.args[0]
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
        return None
    a, b = node.args[:2]
    if node.target in (aten.mul.Tensor, aten.add.Tensor):
        for inner, other in commuted(node):
            known = _constant(other)
            if is_tensor(inner) and known is not None:
                return (known, 0.0, inner) if node.target is aten.mul.Tensor else (1.0, known, inner)
        return None
    known = _constant(b)
    if known is not None and is_tensor(a):
        if node.target is aten.sub.Tensor:
            return 1.0, -known, a
        return (1.0 / known, 0.0, a) if known != 0 else None
    known = _constant(a)
    if known is not None and is_tensor(b) and node.target is aten.sub.Tensor:
        return -1.0, known, b
    return None


def _constant(node: object) -> float | None:
    """The number that all elements of a constant tensor are, also as torch.distributions computes it from others."""
    known = number(node)
    if known is not None or not isinstance(node, Node):
        return known
    if is_call(node, aten.neg.default):
        inner = _constant(node.args[0])
        return None if inner is None else -inner
    if is_call(node, aten.sub.Tensor, aten.add.Tensor) and not node.kwargs:
        a, b = _constant(node.args[0]), _constant(node.args[1])
        if a is None or b is None:
            return None
        return a - b if node.target is aten.sub.Tensor else a + b
    return None
