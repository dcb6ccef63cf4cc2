"""FlexAttention: a score mod and a mask mod, each a small graph over (batch, head, query index, key index).

    flex_attention(q, k, v, score_mod, block_mask, scale, ...)         output, base-2 log-sum-exp, largest scores

becomes an attention whose score mod is taken apart from its result up to the score (soft cap, biases, masks), and whose
masks are *terms*: expressions over the four indices and captured tensors, evaluated for all of them at once when the site
is rewritten (`fuse/flex.py`). A block mask says which blocks are computed, and in which the mask mod is not asked; both
are honoured from its tensors, whatever the mask mod says.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..sites import Declined
from ..walk import (
    aten,
    commuted,
    is_call,
    is_cast,
    is_pure,
    read_scalar,
    same_size,
    scalar_constant,
    shape,
    value,
)
from .attention import Attention
from .masks import NEVER, ONE, Scale, check_fill

FLEX = torch.ops.higher_order.flex_attention
INDICES = 4
"""batch, head, query, key: the arguments of a mask mod, and those of a score mod behind the score."""


@dataclass(frozen=True)
class Term:
    """Something that masks the scores or is added to them."""

    module: GraphModule
    """(batch, head, query, key, *captured) -> a scalar; bool (True keeps the score) or a number to add."""
    captured: tuple[Any, ...]
    used: tuple[bool, ...]
    """Which of the four indices it depends on."""
    inverted: bool = False
    fill: float = NEVER
    scale: Scale = ONE


@dataclass(frozen=True)
class Blocks:
    """Which blocks of keys each block of queries looks at: all keys of the full ones, the mask mod's of the partial ones."""

    partial_count: Node
    partial: Node
    full_count: Node | None
    full: Node | None
    query_size: int
    key_size: int


@dataclass
class Flex:
    attention: Attention
    """Without masks."""
    node: Node
    mask: Term | None
    """None where the mask mod keeps everything."""
    blocks: Blocks | None
    """None where all blocks are looked at."""
    terms: list[Term] = field(default_factory=list)
    """Of the score mod."""

    @property
    def modules(self) -> list[Node]:
        """The nodes that fetch score mod and mask mod."""
        return [n for n in self.node.all_input_nodes if n.op == "get_attr"]


def match_flex(node: Node) -> Flex:
    """What a call of FlexAttention computes, in parts."""
    if node.kwargs:
        raise Declined(f"{node.name}: is called with {next(iter(node.kwargs))} by name")
    query, key, values, score_mod, block_mask, scale = node.args[:6]
    score_captured, mask_captured = (node.args[i] if len(node.args) > i else () for i in (7, 8))
    outputs = {user.args[1]: user for user in node.users if is_call(user, operator.getitem)}
    if len(outputs) != len(node.users) or not {0} <= outputs.keys() <= {0, 1}:
        raise Declined(f"{node.name}: more than its output and its log-sum-exp is used")
    if not isinstance(scale, (int, float)):
        raise Declined(f"{node.name}: scale is computed at run time")
    sources = tuple(n for n in (*block_mask[2:6], *score_captured, *mask_captured) if isinstance(n, Node))
    options = dict(lse=outputs.get(1), scale=float(scale), sources=sources, spelling="flex")
    attention = Attention(outputs[0], query, key, values, **options)
    mask = _whole_term(_module(node, block_mask[-1]), tuple(mask_captured))
    flex = Flex(attention, node, mask, _blocks(block_mask))
    _match_score_mod(flex, _module(node, score_mod), tuple(score_captured))
    return flex


def _module(node: Node, fetched: Node) -> GraphModule:
    module = getattr(node.graph.owning_module, str(fetched.target), None) if isinstance(fetched, Node) else None
    if not isinstance(module, GraphModule):
        raise Declined(f"{node.name}: its score mod or mask mod is not a graph")
    for inner in module.graph.nodes:
        is_known = inner.op in ("placeholder", "output") or (inner.op == "call_function" and is_pure(inner))
        if not is_known and scalar_constant(inner, module) is None:
            raise Declined(f"{inner.name}: {inner.target} in a score mod or mask mod")
    return module


def _blocks(block_mask: tuple) -> Blocks | None:
    """The blocks of a block mask; None where it is the one that torch makes in the place of none."""
    partial_count, partial, full_count, full = block_mask[2:6]
    query_size, key_size = block_mask[-3:-1]
    one_block = same_size(shape(partial)[-2], 1) and same_size(shape(partial)[-1], 1)
    if full_count is None and one_block and _constant(partial_count) == 1 and _constant(partial) == 0:
        return None
    if not isinstance(query_size, int) or not isinstance(key_size, int):
        raise Declined(f"{partial.name}: block sizes are symbolic")
    return Blocks(partial_count, partial, full_count, full, query_size, key_size)


def _constant(node: Node) -> float | None:
    """The number that all elements of a tensor made by `full` are."""
    return node.args[1] if is_call(node, aten.full.default) else None


def _result(module: GraphModule) -> Node:
    result = module.graph.find_nodes(op="output")[0].args[0]
    return result[0] if isinstance(result, (tuple, list)) else result


def _whole_term(mask_mod: GraphModule, captured: tuple) -> Term | None:
    result = _result(mask_mod)
    if _constant(result) is True:
        return None
    return _term(mask_mod, result, mask_mod.graph.find_nodes(op="placeholder"), captured)


def _term(module: GraphModule, result: Node, arguments: list[Node], captured: tuple, **options) -> Term:
    """`result`, a node of `module`, as a function of the four indices and what is captured."""
    needed, pending = set(), [result]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed.add(node)
            pending.extend(node.all_input_nodes)
    graph, copies = Graph(), {}
    for argument in arguments:
        copies[argument] = graph.placeholder(argument.name)
    for node in module.graph.nodes:
        if node not in needed or node in copies:
            continue
        constant = scalar_constant(node, module)
        if constant is None:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        else:  # a tensor of its own is none that the graph around could fetch
            options = dict(dtype=constant.dtype, device=constant.device)
            copies[node] = graph.call_function(aten.full.default, ([], read_scalar(constant)), options)
    graph.output(copies[result])
    used = tuple(argument in needed for argument in arguments[:INDICES])
    return Term(GraphModule(module, graph), captured, used, **options)


def _match_score_mod(flex: Flex, score_mod: GraphModule, captured: tuple) -> None:
    """Take masks, biases and the soft cap off the score mod's result, down to the score."""
    score, *arguments = score_mod.graph.find_nodes(op="placeholder")
    depends = {score}
    for node in score_mod.graph.nodes:
        if any(source in depends for source in node.all_input_nodes):
            depends.add(node)
    node, scale, capped = _result(score_mod), ONE, False
    while node is not score:
        if node not in depends:
            raise Declined(f"{flex.node.name}: its score mod does not depend on the score")
        if is_cast(node) or is_call(node, aten.alias.default, aten.clone.default):
            node = node.args[0]
            continue
        cap = _soft_cap(node) if scale.is_one and not capped else None
        if cap is not None:
            (node, flex.attention.soft_cap), capped = cap, True
            continue
        inner, term, factor = _score_step(node, depends, score_mod, arguments, captured)
        if term is not None:
            if capped:
                raise Declined(f"{flex.node.name}: its score mod has a bias or a mask before the soft cap")
            if is_call(node, aten.where.self) and not scale.is_one and (term.fill != NEVER or scale.factor <= 0):
                raise Declined(f"{flex.node.name}: its score mod sets scores to {term.fill} and then scales them")
            flex.terms.append(replace(term, scale=scale.times(term.scale, node)))
        scale = scale.times(factor, node)
        node = inner
    if scale.factor <= 0:
        raise Declined(f"{flex.node.name}: its score mod multiplies the score by {scale.factor}")
    flex.attention.scale *= scale.factor


def _scaled(term: Term, scale: Scale, node: Node) -> Term:
    return Term(term.module, term.captured, term.used, term.inverted, term.fill, scale=scale.times(term.scale, node))


def _score_step(node: Node, depends: set[Node], module: GraphModule, arguments: list[Node], captured: tuple):
    """(the operand with the score in it, what is added to it or masks it, what it is multiplied by) of one step."""
    tensors = [n for n in node.all_input_nodes if n in depends]
    if len(tensors) == 1:
        inner = tensors[0]
        if is_call(node, aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
            first, second = node.args
            bias = second if first is inner else first
            if isinstance(bias, Node) and (first is inner or node.target is aten.add.Tensor):
                sign = Scale(-1.0 if node.target is aten.sub.Tensor else 1.0)
                return inner, _term(module, bias, arguments, captured, scale=sign), ONE
        if is_call(node, aten.mul.Tensor, aten.div.Tensor):
            first, second = node.args
            factor = second if first is inner else first
            if _is_number(factor) and (first is inner or node.target is aten.mul.Tensor):
                return inner, None, Scale(float(factor), node.target is aten.div.Tensor)
        if is_call(node, aten.where.self) and node.args[0] not in depends:
            condition, chosen, other = node.args
            fill = _fill(other if chosen is inner else chosen)
            if fill is not None:
                check_fill(node.name, fill)
                return inner, _term(module, condition, arguments, captured, inverted=other is inner, fill=fill), ONE
    raise Declined(f"{node.name}: {node.target} in a score mod")


def _soft_cap(node: Node) -> tuple[Node, float] | None:
    """(x, cap) where the node is cap * tanh(x / cap)."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for tanh, cap in commuted(node):
        if not is_call(tanh, aten.tanh.default) or not _is_number(cap) or cap <= 0:
            continue
        quotient = tanh.args[0]
        if is_call(quotient, aten.div.Tensor) and quotient.args[1] == cap:
            return quotient.args[0], float(cap)
        if is_call(quotient, aten.mul.Tensor) and _is_number(quotient.args[1]) and quotient.args[1] * cap == 1:
            return quotient.args[0], float(cap)
    return None


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _fill(node: object) -> float | None:
    number = _constant(node) if isinstance(node, Node) else node
    return float(number) if _is_number(number) else None


def mask_elements(flex: Flex) -> Any:
    """How many elements the mask has, which is made for all queries and keys; may be symbolic."""
    query, key = value(flex.attention.query), value(flex.attention.key)
    per_head = any(term.used[1] for term in flex.terms) or (flex.mask is not None and flex.mask.used[1])
    return query.shape[0] * query.shape[2] * key.shape[2] * (query.shape[1] if per_head else 1)
