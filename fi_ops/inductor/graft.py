"""A traced function becomes part of a graph: its nodes are copied in front of a node, on that graph's values and sizes."""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from .walk import copy_origin


class KnownSizes:
    """The nodes of a graph that compute symbolic sizes, as far as the graph was looked at. Sites come in the graph's order, so that
    each node is looked at once, however many sites there are."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._looked_at: list[Node] = []
        self._sizes: dict = {}

    def in_front_of(self, end: Node) -> KnownSizes:
        """Look at all nodes in front of `end` that are new."""
        while self._looked_at and self._looked_at[-1]._erased:
            self._looked_at.pop()
        node = self._looked_at[-1].next if self._looked_at else next(iter(self.graph.nodes))
        while node is not end:
            if node.op == "root":  # `end` is in front of what was looked at
                self._looked_at, self._sizes = [], {}
                return self.in_front_of(end)
            self._looked_at.append(node)
            size = _expression(node)
            if size is not None and self.get(size) is None:
                self._sizes[size] = node
            node = node.next
        return self

    def get(self, size) -> Node | None:
        node = self._sizes.get(size)
        return None if node is None or node._erased else node


def graft(
    graph: Graph, before: Node, traced: GraphModule, inputs: Sequence[Node], known: KnownSizes
) -> tuple[Node, list[Node]]:
    """(the node of the first result, the copied nodes). `inputs` are in the places of `traced`'s placeholders.

    Symbolic sizes are taken from the nodes in front of `before` that compute them, as AOTAutograd would.
    """
    substitution = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    known.in_front_of(before)
    sizes: dict = {}  # made here
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
            if size is not None and (size in sizes or known.get(size) is not None):
                substitution[inner] = sizes.get(size) or known.get(size)
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
