"""Hook A, before AOTAutograd: pin SDPA calls to anchors (see `anchors.py`).

    %attn = scaled_dot_product_attention(%q, %k, %v, attn_mask=%m, scale=0.125)
->  %attn = torch.ops.fi_anchor.sdpa.default(%q, %k, %v, attn_mask=%m, scale=0.125)

The graph is at the torch level and not functional: only the call itself is replaced, nothing is moved. Of torch's own
functions, dynamo leaves `F.multi_head_attention_forward` closed; it runs as it is, with the SDPA inside pinned.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from . import anchors
from .sites import Declined, Site, set_aside
from .subclasses import check_no_subclasses, note_subclasses
from .support import DTYPES, has_kernels
from .walk import argument, is_call, source_line

_SDPA_FUNCTIONS = (
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def _example(node: object):
    """What dynamo computed for a torch-level node."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def is_sdpa_call(node: Node) -> bool:
    return node.op == "call_function" and node.target in _SDPA_FUNCTIONS


def calls_sdpa_inside(node: Node) -> bool:
    """It does where the weights are not asked for."""
    return is_call(node, F.multi_head_attention_forward) and argument(node, 15, "need_weights", True) is False


def check_pinnable(node: Node, has_autocast_region: bool) -> None:
    """Refuse what has no rewrite, or what an anchor would change: gradients, dropout, autocast, odd tensors."""
    _check_result(has_autocast_region, node, _example(node))
    arguments = anchors.sdpa_arguments(node)
    unknown = arguments.keys() - set(anchors.SDPA_ARGUMENTS)
    if unknown:
        raise Declined(f"{node.name}: unknown argument {sorted(unknown)[0]}")
    for name in ("query", "key", "value"):
        tensor = _example(arguments[name])
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
            raise Declined(f"{node.name}: {name} is {getattr(tensor, 'dtype', type(tensor).__name__)}")
        if tensor.dim() != 4:
            raise Declined(f"{node.name}: {name} has {tensor.dim()} dimensions, not 4")
    dropout = _example(arguments["dropout_p"])
    if not isinstance(dropout, (int, float)) or dropout != 0:
        raise Declined(f"{node.name}: dropout_p is {dropout}")


def _check_result(has_autocast_region: bool, node: Node, result: object) -> None:
    if not isinstance(result, torch.Tensor):
        raise Declined(f"{node.name}: torch recorded no example value for it")
    if type(result) is not torch._subclasses.FakeTensor:
        raise Declined(f"{node.name}: tensor subclass {type(result).__name__}")
    if result.requires_grad:
        raise Declined(f"{node.name}: needs gradients; compile under torch.no_grad() or torch.inference_mode()")
    if not has_kernels(result.device):
        raise Declined(f"{node.name}: no kernels for device {result.device.type}")
    if torch.is_autocast_enabled(result.device.type) or has_autocast_region:
        raise Declined(f"{node.name}: under autocast")


def _inner_sdpa(*args, **kwargs):
    """What `F.multi_head_attention_forward` calls in the place of SDPA: its anchor, if that drops nothing."""
    arguments = {**anchors.SDPA_DEFAULTS, **dict(zip(anchors.SDPA_ARGUMENTS, args, strict=False)), **kwargs}
    tensors = [arguments[name] for name in ("query", "key", "value")]
    is_pinnable = arguments["dropout_p"] == 0 and all(t.dtype in DTYPES and t.dim() == 4 for t in tensors)
    return (anchors.SDPA if is_pinnable else F.scaled_dot_product_attention)(*args, **kwargs)


def multi_head_attention_forward(*args, **kwargs):
    """torch's function of that name over another SDPA."""
    original = F.multi_head_attention_forward
    names = {**vars(F), "scaled_dot_product_attention": _inner_sdpa}
    twin = types.FunctionType(original.__code__, names, original.__name__, original.__defaults__, original.__closure__)
    twin.__kwdefaults__ = original.__kwdefaults__
    names[original.__name__] = twin  # the one it hands to a mode that is asked first
    return twin(*args, **kwargs)


def _has_autocast_region(graph: Graph) -> bool:
    return any(n.op == "call_function" and n.target is torch.amp.autocast_mode._enter_autocast for n in graph.nodes)


def pin(graph: Graph) -> None:
    """Replace every SDPA call that a rewrite could take by an anchor; report the others."""
    note_subclasses(graph)
    has_autocast_region = _has_autocast_region(graph)
    for node in list(graph.nodes):
        is_closed = calls_sdpa_inside(node)
        if not is_sdpa_call(node) and not is_closed:
            continue
        try:
            check_no_subclasses()
            if is_closed:
                _check_result(has_autocast_region, node, (_example(node) or (None,))[0])
            else:
                check_pinnable(node, has_autocast_region)
        except Declined as declined:
            set_aside(Site("attention", node.name, source_line(node), reason=str(declined)))
            continue
        node.target = multi_head_attention_forward if is_closed else anchors.SDPA
        if is_closed:  # for AOTAutograd's cache, which knows torch's own functions; the key of hook A has our sources
            node.meta.update(is_wrapped=True, user_cache_hash="fi_ops")
