"""Hook B, on the functional ATen graph: find attention, samplers and linear layers of few rows, put fi ops in their place,
lower what is left.

    %p = rope(%q); %k2 = index_put(%cache, [None, None, %pos], rope(%k)); ...; %out = fi_anchor.sdpa(%p, repeat(%k2), ...)
->  %r = auto_functionalized_v2(fi.rope_append_attention, query=%q, key=%k, ..., _all_bases=[%cache, ...])

What is not rewritten is traced again as stock torch would have traced it, so that a graph in which nothing was rewritten
is the graph that stock torch compiles.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from . import anchors
from .fuse.attention import apply_attention, plan_attention, prove_masks
from .fuse.bounds import Proofs
from .fuse.decline import check_worth
from .fuse.emit import Emitter
from .fuse.flex import FlexMasks
from .fuse.greedy import rewrite_greedy
from .fuse.linear import rewrite_linears
from .fuse.sampling import rewrite_samplers
from .graft import KnownSizes
from .normalize.attention import Attention, from_anchor
from .normalize.eager import match_eager
from .normalize.einsum import match_einsum
from .normalize.flex import FLEX, match_flex
from .normalize.in_place import GraphInputs
from .normalize.products import Views
from .sites import GraphReport, Site, attempt, publish, take_set_aside
from .subclasses import check_no_subclasses
from .walk import aten, erase_dead, is_call, source_line


def rewrite(graph: Graph) -> None:
    report = GraphReport(take_set_aside())
    found = [n for n in graph.nodes if is_call(n, anchors.SDPA)]
    sizes = KnownSizes(graph)
    if has_backward(graph):
        for node in found:
            report.sites.append(_site(node, reason=f"{node.name}: its graph has a backward part"))
            anchors.lower(graph, node, sizes)
        publish(report)
        return
    emitter = Emitter(graph) if _has_tensors(graph) else None
    if emitter is not None:
        _rewrite_attention(graph, emitter, sizes, report)
        rewrite_samplers(graph, emitter, report)
        rewrite_greedy(graph, emitter, report)
        rewrite_linears(graph, emitter, report)
    publish(report)


def has_backward(graph: Graph) -> bool:
    """The joint graph of a training step: its inputs include gradients."""
    return any("tangents" in str(node.target) for node in graph.find_nodes(op="placeholder"))


def _has_tensors(graph: Graph) -> bool:
    return any("val" in n.meta and hasattr(n.meta["val"], "untyped_storage") for n in graph.nodes)


def _rewrite_attention(graph: Graph, emitter: Emitter, sizes: KnownSizes, report: GraphReport) -> None:
    order = {node: i for i, node in enumerate(graph.nodes)}
    inputs = GraphInputs.of(graph)
    flex_masks, proofs = FlexMasks(emitter, sizes), Proofs()
    for node in order:
        if node._erased or not is_call(node, anchors.SDPA, aten.bmm.default, FLEX):
            continue
        site, rope_site, views = _site(node), None, Views(emitter.at(node))
        with attempt(site):
            flex = match_flex(node) if is_call(node, FLEX) else None
            attention = flex.attention if flex is not None else _match(node, views)
            if attention is None:
                continue
            check_no_subclasses()
            plan = plan_attention(attention, order, inputs)
            prove_masks(plan, proofs)
            check_worth(node.name, plan.facts)
            if flex is not None:
                flex_masks.make(flex)
                prove_masks(plan, proofs)
            unused = apply_attention(plan, emitter, proofs)
            erase_dead(graph, unused)
            site.grade, site.pieces, site.reason = plan.grade, tuple(plan.pieces), plan.reason
            site.caches = tuple(dict.fromkeys(w.base.name for w in plan.writes if w.base.op == "placeholder"))
            rope_site = _rope_site(plan, site)
        views.drop_unused()
        report.sites.append(site)
        if rope_site is not None:
            report.sites.append(rope_site)
        if not site.grade and is_call(node, anchors.SDPA):
            anchors.lower(graph, node, sizes)
    flex_masks.erase_unused()


def _match(node: Node, views: Views) -> Attention | None:
    if is_call(node, anchors.SDPA):
        return from_anchor(node)
    return match_einsum(node, views) or match_eager(node, views)


def _site(node: Node, reason: str = "") -> Site:
    return Site("attention", node.name, source_line(node), reason=reason)


def _rope_site(plan, attention_site: Site) -> Site | None:
    """A row for RoPE where there is one: fused, or left to Inductor and why."""
    if plan.query_rope is not None:
        pieces = ("interleaved" if plan.query_rope.interleaved else "rotate-half",)
        return Site("rope", plan.query_rope.node.name, source_line(plan.query_rope.node), attention_site.grade, pieces)
    if plan.query_is_rope:
        return Site("rope", plan.query.name, source_line(plan.query), reason=plan.rope_reason)
    return None
