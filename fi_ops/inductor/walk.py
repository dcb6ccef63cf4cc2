"""Steps through a functional ATen graph: what a node is, what it computes, and what may be looked through.

Every recogniser in `normalize/` is built from these. Two rules keep them right under `dynamic=True`:
sizes are compared symbolically and never guarded on, and no-op slices, expands and views (which only static shapes
drop) are looked through.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten
prims = torch.ops.prims

END = 2**63 - 1
"""What ATen writes for "to the end" in a slice."""
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
RESHAPES = (*VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
"""The same elements in the same order."""


def is_call(node: object, *targets) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def argument(node: Node, index: int, name: str, default=None):
    """Argument `index` of a call, given by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def value(node: object):
    """The fake tensor (or symbolic number) a node computes; anything else is its own value."""
    return node.meta.get("val") if isinstance(node, Node) else node


def shape(node: Node) -> tuple:
    return tuple(value(node).shape)


def is_tensor(node: object) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def same_size(a, b) -> bool:
    """Two sizes (ints, SymInts, or nodes that compute them) are known to be equal."""
    a, b = value(a), value(b)
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if a is None or b is None:
        return False
    return statically_known_true(a == b)


def may_be_same_size(a, b) -> bool:
    """Two sizes are not known to differ: for what a call demands of its arguments anyway, so that it holds when it runs."""
    a, b = value(a), value(b)
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a is not None and b is not None and not statically_known_true(a != b)


def same_shape(a: Iterable, b: Iterable) -> bool:
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def at_least(a, b) -> bool:
    """The size a is known to be >= b."""
    a, b = value(a), value(b)
    if isinstance(a, int) and isinstance(b, int):
        return a >= b
    return a is not None and b is not None and statically_known_true(a >= b)


def divides(small, large) -> bool:
    """The size `large` is known to be a multiple of `small`."""
    if isinstance(small, int) and isinstance(large, int):
        return small > 0 and large % small == 0
    return same_size(small, large) or statically_known_true(large % small == 0)


def dim_of(node: Node, dim: int) -> int:
    """A dimension argument counted from the front."""
    rank = len(shape(node))
    return dim + rank if dim < 0 else dim


def slice_range(node: Node) -> tuple[Node, int, object, object] | None:
    """(input, dim, start, end) of a slice with step 1; `end` is None for "to the end"."""
    if not is_call(node, aten.slice.Tensor):
        return None
    source = node.args[0]
    if argument(node, 4, "step", 1) != 1:
        return None
    dim = dim_of(source, argument(node, 1, "dim", 0))
    start = argument(node, 2, "start", 0)
    end = argument(node, 3, "end", None)
    start = 0 if start is None else start
    size = shape(source)[dim]
    if isinstance(end, int) and end == END:
        end = None
    if end is not None and at_least(end, size):
        end = None
    if isinstance(start, int) and start < 0 and isinstance(size, int):
        start += size
    if isinstance(end, int) and end < 0 and isinstance(size, int):
        end += size
    return source, dim, start, end


def is_full_slice(node: Node) -> bool:
    parts = slice_range(node)
    return parts is not None and same_size(parts[2], 0) and parts[3] is None


def is_full_scatter(node: object) -> bool:
    """A slice_scatter over the whole of a dimension: nothing is left of what it scatters into."""
    if not is_call(node, aten.slice_scatter.default):
        return False
    base, dim = node.args[0], dim_of(node.args[0], argument(node, 2, "dim", 0))
    start, end = argument(node, 3, "start", None), argument(node, 4, "end", None)
    whole = end is None or (isinstance(end, int) and end == END) or at_least(end, shape(base)[dim])
    return argument(node, 5, "step", 1) == 1 and (start is None or same_size(start, 0)) and whole


def keeps_value(node: object) -> bool:
    """The node computes its first argument over again: same shape, dtype and elements (strides may differ)."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if node.target in (aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
        return True
    if not node.args or not is_tensor(node.args[0]) or not is_tensor(node):
        return False
    if node.target in (aten.expand.default, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return same_shape(shape(node), shape(node.args[0]))
    if node.target in (prims.convert_element_type.default, aten._to_copy.default):
        return value(node).dtype == value(node.args[0]).dtype and value(node).device == value(node.args[0]).device
    if node.target is aten.slice.Tensor:
        return is_full_slice(node)
    return False


def strip(node):
    """The node that first computed this value: through what keeps it, and through views or transposes that undo each other."""
    while True:
        if keeps_value(node):
            node = node.args[0]
            continue
        viewed = _viewed_back(node)
        if viewed is not None:
            node = viewed
            continue
        if is_full_scatter(node):
            node = node.args[1]
            continue
        found = permutation(node) if isinstance(node, Node) else None
        inner = permutation(strip(found[0])) if found is not None else None
        if inner is None or any(inner[1][d] != i for i, d in enumerate(found[1])):
            return node
        node = inner[0]


def _viewed_back(node: object) -> Node | None:
    """What the node is a view of a view of, in the shape that it had: what is written in place through a view is seen so."""
    source = node
    while is_call(source, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        source = source.args[0]
        if same_shape(shape(source), shape(node)):
            return source
    return None


def is_cast(node: object) -> bool:
    return (
        is_call(node, prims.convert_element_type.default, aten._to_copy.default)
        and is_tensor(node.args[0])
        and value(node).device == value(node.args[0]).device
    )


def strip_casts(node):
    """`strip`, through casts between floating-point dtypes as well."""
    node = strip(node)
    while is_cast(node) and value(node).is_floating_point() and value(node.args[0]).is_floating_point():
        node = strip(node.args[0])
    return node


def number(node) -> float | int | None:
    """The Python number that an argument is: given as such, or a constant scalar tensor."""
    if isinstance(node, bool):
        return None
    if isinstance(node, (int, float)):
        return node
    node = strip(node)
    if is_call(node, aten.full.default, aten.scalar_tensor.default):
        fill = node.args[1] if node.target is aten.full.default else node.args[0]
        return fill if isinstance(fill, (int, float)) and not isinstance(fill, bool) else None
    constant = scalar_constant(node) if isinstance(node, Node) else None
    return None if constant is None or constant.dtype == torch.bool else read_scalar(constant)


def scalar_constant(node: Node, module=None) -> torch.Tensor | None:
    """The tensor without dimensions that a node fetches from its module: a constant of the graph, `torch.tensor(0.5)`."""
    if node.op != "get_attr":
        return None
    constant = getattr(module or node.graph.owning_module, str(node.target), None)
    is_known = isinstance(constant, torch.Tensor) and not isinstance(constant, FakeTensor)
    return constant if is_known and constant.dim() == 0 else None


def read_scalar(constant: torch.Tensor) -> float | int | bool:
    with unset_fake_temporarily():
        return constant.item()


def is_scalar(node: object) -> bool:
    """A number, or a tensor of one element without dimensions."""
    if isinstance(node, Node):
        return isinstance(value(node), torch.Tensor) and value(node).dim() == 0
    return isinstance(node, (int, float)) and not isinstance(node, bool)


def permutation(node: Node) -> tuple[Node, tuple[int, ...]] | None:
    """(input, dims) of a permute or transpose."""
    if is_call(node, aten.permute.default):
        source = node.args[0]
        return source, tuple(dim_of(source, d) for d in node.args[1])
    if is_call(node, aten.transpose.int):
        source = node.args[0]
        dims = list(range(len(shape(source))))
        a, b = dim_of(source, node.args[1]), dim_of(source, node.args[2])
        dims[a], dims[b] = dims[b], dims[a]
        return source, tuple(dims)
    return None


def layout(node: Node) -> tuple[Node, tuple[int, ...]]:
    """(x, dims): without the dimensions that were put in, as `einsum` does, `node` is `x.permute(dims)`."""
    axes: list[int | None] = list(range(len(shape(node))))  # of the node that is looked at; None for those put in
    while True:
        node = strip(node)
        found = permutation(node)
        if found is not None:
            node, axes = found[0], [None if a is None else found[1][a] for a in axes]
        elif is_call(node, aten.unsqueeze.default):
            new = dim_of(node, node.args[1])
            node, axes = node.args[0], [None if a in (None, new) else a - (a > new) for a in axes]
        else:
            return node, tuple(a for a in axes if a is not None)


def keeps_order(node: Node) -> bool:
    """A permute that moves dimensions of size 1 only: a view."""
    found = permutation(node)
    if found is None:
        return False
    moved = [d for d in found[1] if not same_size(shape(found[0])[d], 1)]
    return moved == sorted(moved)


def same_value(a, b, depth: int = 12) -> bool:
    """Two nodes compute the same value: one node, or the same pure calls on the same values.

    AOTAutograd does not merge equal subexpressions of an inference graph before this point.
    """
    if not isinstance(a, Node) or not isinstance(b, Node):
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(same_value(x, y, depth) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and a == b
    a, b = strip(a), strip(b)
    if a is b:
        return True
    if depth == 0 or a.op != "call_function" or b.op != "call_function" or a.target is not b.target:
        return False
    if a.target is not operator.getitem and not is_pure(a):
        return False
    return (
        same_value(a.args, b.args, depth - 1)
        and a.kwargs.keys() == b.kwargs.keys()
        and all(same_value(a.kwargs[k], b.kwargs[k], depth - 1) for k in a.kwargs)
    )


def is_pure(node: Node) -> bool:
    """The call depends on its arguments alone: no randomness, no writes."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def commuted(node: Node) -> tuple[tuple, tuple]:
    """The two operands of a commutative call, in both orders."""
    a, b = node.args[0], node.args[1]
    return (a, b), (b, a)


def erase_dead(graph: Graph, roots: Iterable[Node]) -> None:
    """Erase `roots` and what only they used, from the last to the first."""
    pending = list(dict.fromkeys(roots))
    while pending:
        node = pending.pop()
        if node._erased or node.users or node.op not in ("call_function", "get_attr"):
            continue
        inputs = node.all_input_nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            continue
        graph.erase_node(node)
        pending.extend(inputs)


def copy_origin(node: Node, origin: Node) -> None:
    """Let `node` say that it comes from where `origin` does."""
    kept = ("stack_trace", "nn_module_stack", "source_fn_stack", "seq_nr")
    node.meta.update((key, origin.meta[key]) for key in kept if key in origin.meta)


def source_line(node: Node) -> str:
    """`file:line` of the innermost frame of the user's code that made the node, where torch knows it."""
    trace = node.meta.get("stack_trace") or ""
    frames = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    if not frames:
        return "?"
    path, _, rest = frames[-1][len('File "') :].partition('"')
    line = rest.partition("line ")[2].partition(",")[0].strip()
    return f"{'/'.join(path.split('/')[-2:])}:{line}"
