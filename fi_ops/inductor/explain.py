"""fi_ops.explain(fn, *args, **kwargs): which attention, RoPE, sampling and linear sites a function has, and what
became of each.

    site       line                      rewritten to                      found                        why not (more)
    attention  model.py:131              rope + append + attention         sdpa, grouped heads, bool mask
    sampling   model.py:201              left as it is                                                  argmax: ...
    linear     linear.py:134             linear                            1 x 1024 to 1536 (4 times)

The truth is taken from a compile of its own, with all caches off and without code generation: what a warm cache would
hand out was made by the same rewrite from the same graph. The function then runs once in eager mode on copies of its
arguments; tensors that it writes (caches in module buffers too) are copied, so nothing the caller holds changes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch.fx import GraphModule, Node

from .manager import is_enabled, switched
from .sites import KINDS, GraphReport, Site, recording
from .walk import aten, is_call


@dataclass
class Explanation:
    """What `explain` found; prints as a table."""

    graphs: list[GraphReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        return [site for graph in self.graphs for site in graph.sites]

    def count(self, kind: str, fused: bool | None = None) -> int:
        """Sites of a kind; with `fused`, those that were (True) or were not (False) rewritten."""
        return sum(graph.count(kind, fused) for graph in self.graphs)

    def __str__(self) -> str:
        header = ("site", "line", "rewritten to", "found", "why not (more)")
        rows = [
            (s.kind, s.line, s.grade or "left as it is", ", ".join(s.pieces) + times, s.reason)
            for s, times in _merged(self.sites)
        ]
        lines = []
        if rows:
            widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
            for row in (header, *rows):
                lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        for kind in KINDS:
            if self.count(kind):
                left = sum(site.kind == kind and site.stock_is_faster for site in self.sites)
                stock = f", {left} left to stock, which is faster there" if left else ""
                lines.append(f"{kind}: {self.count(kind, fused=True)} of {self.count(kind)} rewritten{stock}")
        if not rows:
            lines.append("no attention, RoPE, sampling or linear site found")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])

    def __repr__(self) -> str:
        return str(self)


def _merged(sites: list[Site]) -> Iterator[tuple[Site, str]]:
    """The sites, each with nothing to add; linear layers that differ in nothing but their node are one, with their number."""
    alike = Counter(_linear_key(site) for site in sites)
    seen = set()
    for site in sites:
        key = _linear_key(site)
        if site.kind != "linear":
            yield site, ""
        elif key not in seen:
            seen.add(key)
            yield site, f" ({alike[key]} times)" if alike[key] > 1 else ""


def _linear_key(site: Site) -> tuple:
    return site.kind, site.line, site.grade, site.pieces, site.reason.partition(": ")[2]


class _Analysed(Exception):
    """Raised in the place of code generation: the graph has been through hooks A and B."""


def explain(fn: Callable, *args, **kwargs) -> Explanation:
    """Compile `fn(*args, **kwargs)` for analysis only, print the table of its sites and return it."""
    explanation = Explanation()
    was_enabled = is_enabled()
    target, cuda_graphs = _uncompiled(fn), _cuda_graphs_of(fn)
    args, kwargs = _copied((args, kwargs))
    with recording() as reports, switched(True), _without_caches():
        compiled = torch.compile(
            _with_own_code(target),
            backend=lambda gm, inputs: _analyse(gm, inputs, explanation, reports, cuda_graphs),
            dynamic=None,
        )
        compiled(*args, **kwargs)
    explanation.graphs = reports
    if not was_enabled:
        explanation.notes.append("fi_ops is not enabled: this is what fi_ops.enable() would do")
    if target is not fn:
        explanation.notes.append(
            "a function that was compiled before fi_ops.enable() keeps its code until it is compiled again"
        )
    print(explanation)
    return explanation


@contextlib.contextmanager
def _without_caches() -> Iterator[None]:
    inductor, functorch = torch._inductor.config, torch._functorch.config
    with (
        inductor.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch.patch(enable_autograd_cache=False),
    ):
        yield


def _uncompiled(fn: Callable) -> Callable:
    """The function or module behind a `torch.compile`d one."""
    if isinstance(fn, torch._dynamo.OptimizedModule):
        return fn._orig_mod
    if isinstance(fn, torch.nn.Module) and fn._compiled_call_impl is not None:
        return fn.forward
    return getattr(fn, "_torchdynamo_orig_callable", fn)


def _cuda_graphs_of(fn: Callable) -> bool | None:
    """Whether a `torch.compile`d function asks for CUDA graphs (mode="reduce-overhead", "max-autotune"); None if `fn`
    does not say."""
    compiled = fn._compiled_call_impl if isinstance(fn, torch.nn.Module) and fn._compiled_call_impl is not None else fn
    settings = getattr(compiled, "get_compiler_config", lambda: None)()
    return None if settings is None else bool(settings.get("triton.cudagraphs"))


_serial = itertools.count()


def _with_own_code(target: Callable) -> Callable:
    """A wrapper with a code object of its own, so that dynamo's cache for the user's function stays as it is."""

    def call(*args, **kwargs):
        return target(*args, **kwargs)

    code = call.__code__.replace(co_name=f"fi_ops_explain_{next(_serial)}")
    return types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)


def _copied(value: Any) -> Any:
    """A deep copy (a KV cache among the arguments is written to), or the value itself where that can't be had."""
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _analyse(
    graph_module: GraphModule,
    inputs: list,
    explanation: Explanation,
    reports: list[GraphReport],
    cuda_graphs: bool | None,
) -> Callable:
    """The backend: send a copy of the graph through Inductor up to code generation, run the graph itself in eager mode."""
    from torch._inductor.compile_fx import compile_fx

    written: set[int] = set()
    names: list[str] = []
    earlier = len(reports)

    def stop(gm: GraphModule, example_inputs, **_):
        written.update(_written_inputs(gm))
        names.extend(node.name for node in gm.graph.find_nodes(op="placeholder"))
        raise _Analysed

    try:
        compile_fx(copy.deepcopy(graph_module), inputs, inner_compile=stop)
    except Exception as error:
        if not _caused_by_stop(error):
            raise
    if cuda_graphs is not False:
        sites = [site for report in reports[earlier:] for site in report.sites]
        explanation.notes.extend(_cuda_graph_notes(graph_module, written, names, sites))

    def run(*real):
        return graph_module(
            *(x.clone() if i in written and isinstance(x, torch.Tensor) else x for i, x in enumerate(real))
        )

    return run


def _caused_by_stop(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, _Analysed):
            return True
        error = error.__cause__ or error.__context__
    return False


def _written_inputs(gm: GraphModule) -> set[int]:
    """Which inputs of the graph it stores something into."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    index = {node: i for i, node in enumerate(placeholders)}
    return {index[n.args[0]] for n in gm.graph.nodes if is_call(n, aten.copy_.default) and n.args[0] in index}


def _cuda_graph_notes(graph_module: GraphModule, written: set[int], names: list[str], sites: list[Site]) -> list[str]:
    """Caches that are plain arguments: CUDA graphs skip a graph that writes to one. `names` are those that the inputs
    have in the graph of the sites."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    arguments = {i: n for i, n in enumerate(placeholders) if i in written and _is_plain_argument(n)}
    if not arguments:
        return []
    first = next(iter(arguments.values()))
    writers = [site for site in sites if any(names.index(cache) in arguments for cache in site.caches)]
    more = f" and {len(writers) - 1} more sites" if len(writers) > 1 else ""
    whose = f", the caches of attention at {writers[0].line}{more}" if writers else ""
    return [
        f"{len(arguments)} written tensors are arguments of the compiled graph (first: {first.target}){whose}; CUDA graphs "
        "(mode='reduce-overhead') skip such a graph: make them module buffers or call torch._dynamo.mark_static_address on them"
    ]


def _is_plain_argument(node: Node) -> bool:
    tensor = node.meta.get("example_value")
    if not isinstance(tensor, torch.Tensor) or isinstance(tensor, torch.nn.Parameter):
        return False
    return "_dynamo_static_input_type" not in (node.meta.get("tensor_dict") or {})
