"""A traced function becomes part of a graph: its nodes are copied in front of a node, on that graph's values and sizes."""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from .walk import copy_origin


def graft(graph: Graph, before: Node, traced: GraphModule, inputs: Sequence[Node]) -> tuple[Node, list[Node]]:
    """(the node of the first result, the copied nodes). `inputs` are in the places of `traced`'s placeholders.

    Symbolic sizes are taken from the nodes in front of `before` that compute them, as AOTAutograd would.
    """
    substitution = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    needs_sizes = any(_expression(inner) is not None for inner in traced.graph.nodes if inner.op == "call_function")
    sizes = _known_sizes(before) if needs_sizes else {}
    copies: list[Node] = []
    with graph.inserting_before(before):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                return substitution[inner.args[0][0]], copies
            if inner.op == "get_attr":
                raise RuntimeError(f"fi_ops: tracing for {before} met a constant {inner.target}; please report this")
            size = _expression(inner)
            if size is not None and size in sizes:
                substitution[inner] = sizes[size]
                continue
            copy = graph.node_copy(inner, substitution.__getitem__)
            copy_origin(copy, before)
            substitution[inner] = copy
            copies.append(copy)
            if size is not None:
                sizes[size] = copy
    raise RuntimeError(f"fi_ops: tracing for {before} has no result; please report this")


def _expression(node: Node):
    """The symbolic expression of a node that computes a size."""
    size = node.meta.get("val")
    return size.node.expr if isinstance(size, torch.SymInt) else None


def _known_sizes(end: Node) -> dict:
    """The nodes in front of `end` that compute symbolic sizes."""
    known: dict = {}
    for node in end.graph.nodes:
        if node is end:
            break
        size = _expression(node)
        if size is not None:
            known.setdefault(size, node)
    return known
