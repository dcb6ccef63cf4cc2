"""Draws: nodes whose value is a random token of each row.

multinomial(w, 1)                       w of any sum, not negative
argmax(w / e)                           e exponential noise (gpt-fast, vLLM)
argmax(scores + g)                      g Gumbel noise; also scores - log(e), which Inductor may make of the former
argmax(softmax((scores + g) / tau))     the larger stays the larger; `F.gumbel_softmax(hard=True)` makes it one-hot
gather(ids, -1, multinomial(w, 1))      w in the order of a sort or a topk, `ids` those of the sort (Meta's llama)
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Node

from ..sites import Declined
from ..walk import argument, aten, commuted, is_call, is_tensor, number, same_shape, shape, strip, strip_casts, value
from .noise import exponential_noise, gumbel_noise
from .order import Sort, over_last, sort_with_ids, topk_with_ids
from .removal import Stage
from .softmax import match_softmax


@dataclass
class Draw:
    """One token a row, drawn from the distribution of `stage`."""

    ids: Node
    """[B, 1] or [B] (or without B): the place of the token in the stage's order."""
    race: Node
    """What the draw looks at. If nothing else does, it goes with the draw."""
    stage: Stage
    spelling: str
    noise: Node | None = None
    """The random numbers, where the graph has them."""
    tokens: Node | None = None
    """Where the stage lies in the order of a sort: the ids of the tokens."""
    straight_through: tuple[Node, Node, Node] | None = None
    """(one-hot, one-hot - y, one-hot - y + y), where the ids are only used to make these."""

    @property
    def weights(self) -> Node | None:
        """What the graph computes of the distribution: probabilities, unless it is drawn from scores."""
        return self.stage.kept if self.stage.is_weights else None


def match_draw(node: Node) -> Draw | None:
    """The draw that `node` makes; None if it makes none."""
    if is_call(node, aten.multinomial.default):
        draw = _multinomial(node)
    elif is_call(node, aten.argmax.default):
        draw = _race(node, node, argument(node, 1, "dim", None))
    elif is_call(node, aten.max.dim):
        ids = [user for user in node.users if is_call(user, operator.getitem) and user.args[1] == 1]
        if len(ids) != 1 or len(node.users) != 1:
            return None
        draw = _race(node, ids[0], node.args[1])
    else:
        return None
    if draw is not None:
        draw.tokens, order = _sorted_tokens(draw.ids)
        draw.stage = Stage(draw.stage.kept, draw.stage.is_weights, order)
        draw.straight_through = _straight_through(draw)
    return draw


def _multinomial(node: Node) -> Draw:
    if node.args[1] != 1:
        raise Declined(f"{node.name}: draws {node.args[1]} samples a row")
    if argument(node, 3, "generator", None) is not None:
        raise Declined(f"{node.name}: has a generator of its own")
    weights = strip(node.args[0])
    return Draw(node, weights, Stage(strip_casts(weights), True), "multinomial")


def _race(call: Node, ids: Node, dim: int | None) -> Draw | None:
    outer = strip_casts(call.args[0])
    race = _monotone(outer)
    found = None
    if is_call(race, aten.div.Tensor) and is_tensor(race.args[1]):
        weights = strip_casts(race.args[0])
        uniform = exponential_noise(race.args[1], race) if same_shape(shape(weights), shape(race)) else None
        if uniform is not None:
            found = Draw(ids, race, Stage(weights, True), "exponential trick", uniform)
    elif is_call(race, aten.add.Tensor, aten.sub.Tensor) and not race.kwargs:
        is_sum = race.target is aten.add.Tensor
        for scores, noise in commuted(race)[: 2 if is_sum else 1]:
            if not is_tensor(scores) or not is_tensor(noise) or not same_shape(shape(scores), shape(race)):
                continue
            uniform = gumbel_noise(noise, race, 1 if is_sum else -1)
            if uniform is not None:
                found = Draw(ids, outer, Stage(scores, False), "gumbel trick", uniform)
    if found is None:
        return None
    is_flat = dim is None and value(race).dim() == 1
    if not is_flat and (dim is None or not over_last(race, dim)):
        raise Declined(f"{ids.name}: argmax over dim {dim}, not over the vocabulary")
    return found


def _monotone(node: Node) -> Node:
    """Through what keeps the order of each row: positive factors and softmax."""
    while True:
        node = strip_casts(node)
        scores = match_softmax(node)
        if scores is None and is_call(node, aten.div.Tensor, aten.mul.Tensor):
            factor = number(node.args[1])
            scores = node.args[0] if factor is not None and factor > 0 else None
        if scores is None:
            return node
        node = scores


def _sorted_tokens(ids: Node) -> tuple[Node | None, Sort | None]:
    """(tokens, order) where all that is done with the ids is to look the tokens up in those of a sort."""
    users, place = list(ids.users), ids
    while len(users) == 1 and is_call(users[0], aten.unsqueeze.default, aten.clone.default):
        place, users = users[0], list(users[0].users)
    if len(users) != 1 or not is_call(users[0], aten.gather.default):
        return None, None
    tokens = users[0]
    table, dim, index = tokens.args[:3]
    if index is not place or not over_last(table, dim) or not over_last(place, -1) or shape(place)[-1] != 1:
        return None, None
    order = sort_with_ids(table) or topk_with_ids(table)
    return (tokens, order) if order is not None and value(place).dim() == value(table).dim() else (None, None)


def _straight_through(draw: Draw) -> tuple[Node, Node, Node] | None:
    """one_hot(ids) - y + y, with y the softmax that the ids are the largest of: it is one_hot(ids) but for rounding."""
    y = draw.race
    users = list(draw.ids.users)
    if draw.spelling != "gumbel trick" or match_softmax(y) is None or len(users) != 1:
        return None
    one_hot = users[0]
    if not is_call(one_hot, aten.scatter.value) or one_hot.args[2:] != (draw.ids, 1.0):
        return None
    base, dim = one_hot.args[:2]
    if not over_last(base, dim) or number(base) != 0 or not same_shape(shape(base), shape(y)):
        return None
    for difference in one_hot.users if len(one_hot.users) == 1 else ():
        if not is_call(difference, aten.sub.Tensor) or difference.kwargs or strip(difference.args[1]) is not y:
            continue
        for total in difference.users if len(difference.users) == 1 else ():
            if is_call(total, aten.add.Tensor) and not total.kwargs and strip(total.args[1]) is y:
                return one_hot, difference, total
    return None
