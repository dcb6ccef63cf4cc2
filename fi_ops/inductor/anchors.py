"""Anchor: `scaled_dot_product_attention` held together until the functional ATen graph is there.

    F.scaled_dot_product_attention(q, k, v, mask, ...)   ->   torch.ops.fi_anchor.sdpa(q, k, v, mask, ...)

SDPA is the one composite that a rewrite cannot wait for: below the torch-level graph it has already become a backend
op chosen by device, dtype and head dim, with the bool mask turned into floats, `is_causal` lost and heads repeated.
(Softmax, RoPE, cache writes and samplers keep a regular spelling in ATen and are recognised there, unpinned.)

An anchor that nobody lowers still computes the right thing: its implementation is the function it stands for. It has
no backward, so only calls whose result needs no gradient are pinned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from .graft import KnownSizes, graft

_library = torch.library.Library("fi_anchor", "DEF")
_library.define(
    "sdpa(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, float? scale=None, bool enable_gqa=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
SDPA_DEFAULTS = dict(attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)


def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _sdpa_eager(*args, **kwargs):
    # An op must not return a view of its input; stock SDPA never does, but its output may be a view of a scratch.
    return sdpa(*args, **kwargs)


_library.impl("sdpa", _sdpa_eager, "CompositeExplicitAutograd")
torch.library.register_fake("fi_anchor::sdpa", sdpa, lib=_library)

SDPA = torch.ops.fi_anchor.sdpa.default


def sdpa_arguments(node: Node) -> dict:
    """The arguments of an anchor (or of the call it stands for) by name, defaults filled in."""
    return {**SDPA_DEFAULTS, **dict(zip(SDPA_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def lower(graph: Graph, node: Node, sizes: KnownSizes) -> None:
    """Put in place of an anchor exactly what AOTAutograd traces for the call it stands for."""
    traced = _trace(node)
    traced.graph.eliminate_dead_code()
    result, copies = graft(graph, node, traced, node.all_input_nodes, sizes)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    for copy in reversed(copies):
        if not copy.users:
            graph.erase_node(copy)


def _trace(node: Node) -> torch.fx.GraphModule:
    """The functional, decomposed graph of an anchor's call on its fake inputs, as AOTAutograd would trace it."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = node.all_input_nodes

    def call(*tensors):
        by_node = dict(zip(inputs, tensors, strict=True))
        args = torch.fx.map_arg(node.args, by_node.__getitem__)
        kwargs = torch.fx.map_arg(node.kwargs, by_node.__getitem__)
        return [sdpa(*args, **kwargs)]

    fakes = [n.meta["val"] for n in inputs]
    with torch.no_grad(), enable_python_dispatcher():
        functional = dispatch_functionalize(call, FunctionalTensorMode())
        return make_fx(functional, select_decomp_table(), tracing_mode="real")(*fakes)
