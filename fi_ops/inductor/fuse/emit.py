"""Putting calls into a functional graph, with the metadata that later passes read.

Every new node gets the fake value its op computes, so strides, storages and symbolic sizes are the op's own; where a
replacement's strides differ from what it replaces, the values of the views and pointwise calls below are recomputed.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.utils._pytree import tree_map_only

from ..walk import at_least, aten, copy_origin, same_shape, same_value, shape, value


@dataclass
class Written:
    """A tensor that an op writes to, and what the op sees of it."""

    base: Node
    dims: tuple[int, ...] | None = None
    """The permutation through which the op sees it (what is left of it by `parts`)."""
    sizes: dict[int, int | Node] = field(default_factory=dict)
    """By dimension of that view, the sizes which are smaller than the tensor's."""
    parts: dict[int, int] = field(default_factory=dict)
    """By dimension of the tensor, the index of the part that the op sees, where the tensor is a stack."""
    offset: int | Node = 0
    """Where the tensor begins in its storage."""

    @property
    def is_view(self) -> bool:
        return self.dims is not None or bool(self.sizes) or bool(self.parts)


class Emitter:
    """Inserts calls in front of one node of a graph; equal calls on equal arguments are made once."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.fake_mode = _fake_mode(graph)
        self.before: Node | None = None
        self._made: dict[tuple, Node] = {}
        self._representatives: list[Node] = []

    def at(self, node: Node) -> Emitter:
        self.before = node
        return self

    def call(self, target, *args, **kwargs) -> Node:
        """A call with its value; the metadata that says where it comes from is that of the node it is put before."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        copy_origin(node, self.before)
        node.meta["val"] = self._evaluate(target, args, kwargs)
        return node

    def call_op(self, op, options: dict) -> Node:
        """A call of an op with arguments by name; those that are not positional only where they are not the schema's defaults, so
        that graphs read well."""
        arguments = op._schema.arguments
        positional = [options.get(a.name, a.default_value) for a in arguments if not a.kwarg_only]
        others = [a for a in arguments if a.kwarg_only and a.name in options]
        return self.call(
            op, *positional, **{a.name: options[a.name] for a in others if options[a.name] != a.default_value}
        )

    def shared(self, target, *args, **kwargs) -> Node:
        """`call`, once for all sites: for what layers have in common (mask, cos, sin)."""
        key = (target, *args, *kwargs.items())
        if key not in self._made or self._made[key]._erased:
            self._made[key] = self.call(target, *args, **kwargs)
        return self._made[key]

    def representative(self, node: Node) -> Node:
        """One node for all that compute the same value: every layer spells its view of cos and sin anew."""
        for known in self._representatives:
            if not known._erased and same_shape(shape(known), shape(node)) and same_value(known, node):
                return known
        self._representatives.append(node)
        return node

    def item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    def mutating(self, op, written: dict[str, Written], **kwargs) -> tuple[Node, ...]:
        """A mutating op in functional form: (result, updated tensors...), one for each written argument."""
        arguments = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
        arguments.update(kwargs)
        bases = list(dict.fromkeys(tensor.base for tensor in written.values()))
        for name, tensor in written.items():
            arguments[f"_{name}_base_index"] = bases.index(tensor.base)
            if tensor.is_view:
                size, stride, offset = self._geometry(tensor)
                arguments.update({f"_{name}_size": size, f"_{name}_stride": stride, f"_{name}_storage_offset": offset})
        call = self.call(torch.ops.higher_order.auto_functionalized_v2, op, **arguments, _all_bases=bases)
        result, *updated = (self.item(call, i) for i in range(1 + len(bases)))
        return result, *(updated[bases.index(tensor.base)] for tensor in written.values())

    def _geometry(self, tensor: Written) -> tuple[list, list, int | Node]:
        """(sizes, strides, storage offset) of what the op sees of a tensor, as arguments of a call."""
        base, known = tensor.base, value(tensor.base)
        left = [d for d in range(known.dim()) if d not in tensor.parts]
        if tensor.dims is not None:
            left = [left[d] for d in tensor.dims]
        sizes = [self.size(base, d) for d in left]
        for i, size in tensor.sizes.items():
            sizes[i] = size
        offset = tensor.offset
        for d, index in tensor.parts.items():
            if index > 0:
                offset = self._sum(offset, self._product(index, self._stride(base, d)))
        return sizes, [self._stride(base, d) for d in left], offset

    def _stride(self, base: Node, dim: int) -> int | Node:
        return self._number(value(base).stride(dim), aten.sym_stride.int, base, dim)

    def _product(self, count: int, number: int | Node) -> int | Node:
        if isinstance(number, int):
            return count * number
        return number if count == 1 else self.shared(operator.mul, number, count)

    def _sum(self, a: int | Node, b: int | Node) -> int | Node:
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        return b if a == 0 else self.shared(operator.add, a, b)

    def size(self, node: Node, dim: int):
        """A size as an argument of a call."""
        return self._number(shape(node)[dim], aten.sym_size.int, node, dim)

    def _number(self, known, target, *args):
        """A size or stride as an argument: the int that it is, or a node that computes it."""
        return known if isinstance(known, int) else self.shared(target, *args)

    def _evaluate(self, target, args, kwargs):
        args, kwargs = tree_map_only(Node, value, (args, kwargs))
        with without_guards(self.fake_mode):
            return target(*args, **kwargs)


def keep_in_memory(node: Node) -> None:
    """Have Inductor store what `node` is a view of, a value that the ops of many layers read, unless only a part of it is read.

    What is cheap to compute, as masks and tables are, it would compute anew for each op, into a buffer of that op's own.
    """
    if is_computed(node) and at_least(value(node).numel(), value(viewed(node)).numel()):
        viewed(node).meta["inductor_realize_to_strides"] = True


def viewed(node: Node) -> Node:
    """What `node` is a view of, or itself."""
    while is_view(node):
        node = node.args[0]
    return node


def is_computed(node: Node) -> bool:
    """`node` is, or is a view of, something that the graph computes."""
    return viewed(node).op == "call_function"


@contextlib.contextmanager
def without_guards(fake_mode) -> Iterator[None]:
    """Compute with fake tensors, and add no guard on symbolic sizes: a guard is a recompile that stock torch does not have.

    What the recognisers could not prove, the ops check when they run.
    """
    shape_env = fake_mode.shape_env
    with contextlib.ExitStack() as stack:
        if shape_env is not None:
            stack.enter_context(shape_env.suppress_guards())
        stack.enter_context(fake_mode)
        stack.enter_context(torch.no_grad())
        yield


def _fake_mode(graph: Graph):
    for node in graph.nodes:
        fake = node.meta.get("val")
        if isinstance(fake, torch._subclasses.FakeTensor):
            return fake.fake_mode
    raise RuntimeError("fi_ops: a graph without fake tensors; please report this")


def replace(old: Node, new: Node, fake_mode) -> None:
    """Let the users of `old` use `new`, and bring their values up to date with its strides and storage."""
    users = list(old.users)
    same = _same_layout(value(old), value(new))
    old.replace_all_uses_with(new)
    refresh(users if not same else [u for u in users if is_view(u)], fake_mode)


def refresh(nodes: Iterable[Node], fake_mode) -> None:
    """Recompute values downstream of `nodes`, as far as strides change or views pass a new storage on."""
    pending = list(nodes)
    while pending:
        node = pending.pop(0)
        old = node.meta.get("val")
        if (
            node.op != "call_function"
            or not isinstance(old, torch.Tensor)
            or not isinstance(node.target, torch._ops.OpOverload)
        ):
            continue
        if node.target._schema.is_mutable:
            continue
        if node.target is aten.view.default:
            node.target = aten.reshape.default
        args, kwargs = tree_map_only(Node, value, (node.args, node.kwargs))
        with without_guards(fake_mode):
            new = node.target(*args, **kwargs)
        if node.target is aten.reshape.default and _is_viewable(node.args[0], new):
            node.target = aten.view.default
        node.meta["val"] = new
        if not _same_layout(old, new):
            pending.extend(node.users)
        elif is_view(node):
            pending.extend(u for u in node.users if is_view(u))


def _is_viewable(source: Node, result: torch.Tensor) -> bool:
    """A reshape of `source` was a view: its result is in the same storage."""
    return value(source).untyped_storage()._cdata == result.untyped_storage()._cdata


def is_view(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.inplace_view in target.tags
        or any(a.alias_info is not None and not a.alias_info.is_write for a in target._schema.arguments)
    )


def _same_layout(a, b) -> bool:
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and statically_known_true(sym_eq(tuple(a.stride()), tuple(b.stride())))
        and statically_known_true(a.storage_offset() == b.storage_offset())
    )
