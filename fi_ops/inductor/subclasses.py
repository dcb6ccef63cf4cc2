"""Graphs with an input that is a torch-function subclass of Tensor: left to stock, all of them.

Dynamo inlines what such a class overrides and hands the compiled graph its tensors as they are. Code that Inductor generates reads
their memory; a call of an op is dispatched on their type, and torch 2.11 to 2.13 refuse that in the first run of a graph
(`_AnalyzeCustomOpInputOutputMode`). So an op of ours would break a graph that runs with stock torch.

Not meant: `nn.Parameter` and its subclasses, whose data is a plain tensor, and wrappers (DTensor, quantised weights), which
AOTAutograd takes apart before the ops are put in.
"""

from __future__ import annotations

import weakref

import torch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from .sites import Declined

_reasons: weakref.WeakKeyDictionary[TracingContext, str] = weakref.WeakKeyDictionary()
"""What hook A saw in the graph of a compile, for hook B, whose graph has plain tensors only."""


def note_subclasses(graph: Graph) -> None:
    """Look at the types that dynamo recorded for the graph's inputs."""
    context = TracingContext.try_get()
    if context is None:
        return
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(node.type, type) and _is_dispatched_on(node.type):
            _reasons[context] = f"{node.name}: input of the graph is a {node.type.__name__}, a subclass of Tensor"
            return


def _is_dispatched_on(kind: type) -> bool:
    if not issubclass(kind, torch.Tensor) or kind is torch.Tensor:
        return False
    # FakeTensor: how dynamo records a tensor that a closure of FlexAttention's reads
    harmless = issubclass(kind, (torch.nn.Parameter, FakeTensor))
    return not harmless and not is_traceable_wrapper_subclass_type(kind)


def check_no_subclasses() -> None:
    """Refuse a site of a graph with such an input."""
    context = TracingContext.try_get()
    reason = None if context is None else _reasons.get(context)
    if reason is not None:
        raise Declined(reason)
