"""Helpers of the rewrite tests: compile without code generation, look at the graph, run it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.utils._pytree import tree_map_only

from fi_ops.inductor.manager import switched
from fi_ops.inductor.sites import GraphReport, Site, recording

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
"""For `pytest.mark.parametrize("device", DEVICES)`: the rewrites do not know the device."""


def to_device(values: Any, device: str) -> Any:
    """The tensors among `values` on another device, with their strides, and sharing storage where they did."""
    storages: dict[int, torch.UntypedStorage] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        moved = storages.setdefault(storage._cdata, storage.to(device=torch.device(device)))
        result = torch.empty(0, dtype=tensor.dtype, device=device)
        result.set_(moved, tensor.storage_offset(), tensor.size(), tensor.stride())
        return result.requires_grad_(tensor.requires_grad)

    return values if device == "cpu" else tree_map_only(torch.Tensor, move, values)


@dataclass
class Capture:
    """Graphs as Inductor's joint passes leave them, and what the rewrites say about them."""

    output: Any = None
    graphs: list[torch.fx.Graph] = field(default_factory=list)
    reports: list[GraphReport] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [site for report in self.reports for site in report.sites]

    def grades(self, kind: str = "attention") -> list[str]:
        return [site.grade for site in self.sites if site.kind == kind]

    def reasons(self) -> list[str]:
        return [site.reason for site in self.sites if site.reason]

    def targets(self) -> list[str]:
        return [str(call_target(node)) for graph in self.graphs for node in graph.nodes if node.op == "call_function"]


def compiled_for_capture(fn: Callable, capture: Capture, *, rewritten: bool = True, **options) -> Callable:
    """`torch.compile(fn)` up to code generation; the graph then runs as it is, with the real kernels of fi ops."""

    def run_graph(gm, example_inputs, **_):
        capture.graphs.append(gm.graph)
        return make_boxed_func(gm)

    def backend(gm, example_inputs):
        with switched(rewritten), recording() as reports, without_caches():
            compiled = compile_fx(gm, example_inputs, inner_compile=run_graph)
        capture.reports.extend(reports)
        return compiled

    return torch.compile(fn, backend=backend, fullgraph=True, **options)


def without_caches():
    return _Both(
        torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False)
    )


class _Both:
    def __init__(self, *managers):
        self.managers = managers

    def __enter__(self):
        for manager in self.managers:
            manager.__enter__()

    def __exit__(self, *error):
        for manager in reversed(self.managers):
            manager.__exit__(*error)


def capture(
    fn: Callable, *args, rewritten: bool = True, grad: bool = False, dynamic: bool | None = False, **kwargs
) -> Capture:
    """Compile and run `fn` once."""
    torch._dynamo.reset()
    result = Capture()
    with torch.set_grad_enabled(grad):
        result.output = compiled_for_capture(fn, result, rewritten=rewritten, dynamic=dynamic)(*args, **kwargs)
    return result


def call_target(node: torch.fx.Node):
    """What a call computes; for a mutating op in functional form, that op."""
    if node.target is torch.ops.higher_order.auto_functionalized_v2:
        return node.args[0]
    return node.target


def ordered_by_use(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy with each node next to what first reads it: the same graph for every order of independent nodes.

    Functionalization makes views of what was written to anew where they are read: in front of an anchor, or in the midst
    of what stock torch makes of SDPA.
    """
    result, copies = torch.fx.Graph(), {}

    def add(node):
        pending = [node]
        while pending:
            missing = [n for n in pending[-1].all_input_nodes if n not in copies]
            if missing:
                pending.append(missing[0])
            elif (done := pending.pop()) not in copies:
                copies[done] = result.node_copy(done, copies.__getitem__)

    for node in graph.nodes:
        if node.op == "placeholder" or not node.users:
            add(node)
    return result


def graph_text(graph: torch.fx.Graph, *, inputs_by_use: bool = False) -> str:
    """The graph with names by position: the same text whatever torch calls its nodes. Constants nobody reads are left out
    (some releases of torch remove them earlier). `inputs_by_use`: tensors that come in stand in the order of their first use,
    after sizes and what nobody reads (releases of torch differ in the order)."""
    nodes = [node for node in graph.nodes if node.op != "get_attr" or node.users]
    if inputs_by_use:
        used = [node for user in nodes for node in user.all_input_nodes]
        place = {node: i for i, node in reversed(list(enumerate(used)))}
        inputs = [node for node in nodes if node.op == "placeholder"]
        is_tensor = {node: isinstance(node.meta.get("val"), torch.Tensor) for node in inputs}
        inputs.sort(key=lambda node: place.get(node, -1) if is_tensor[node] else -1)
        nodes = inputs + [node for node in nodes if node.op != "placeholder"]
    names = {node: f"%{i}" for i, node in enumerate(nodes)}
    lines = []
    for node in nodes:
        if node.op == "placeholder":
            lines.append(f"{names[node]} = input {_type(node)}")
            continue
        if node.op == "output":
            lines.append(f"return {_show(node.args[0], names)}")
            continue
        args = [_show(a, names) for a in node.args] + [
            f"{k}={_show(v, names)}" for k, v in node.kwargs.items() if v is not None
        ]
        lines.append(f"{names[node]} = {_target(node)}({', '.join(args)})")
    return "\n".join(lines)


def _type(node: torch.fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _target(node: torch.fx.Node) -> str:
    if node.op != "call_function":
        return f"{node.op}.{node.target}"
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target).removesuffix(".default")


def _show(value: Any, names: dict) -> str:
    if isinstance(value, torch.fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_show(v, names) for v in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).removeprefix("torch.").removesuffix(".default")
