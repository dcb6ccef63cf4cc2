"""Attention in its canonical form becomes one fi op, of the highest grade that its surroundings allow.

    rope + append + attention    %out, %k, %v = auto_functionalized_v2(fi.rope_append_attention, q, k, v, cos, sin, ...)
    append + attention           %out, %k, %v = auto_functionalized_v2(fi.append_attention, q, k, v, positions, ...)
    rope + attention             %out = fi.rope_attention(q, k, v, cos, sin, mask, ...)
    attention                    %out = fi.attention(q, k, v, mask, ...)

or without caches, where the log-sum-exp is used too, `%out, %lse = fi.rope_attention_with_lse(...)` or `fi.attention_with_lse`.

A piece that does not fit lowers the grade and leaves its reason on the site; it never changes what the rest computes.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ..normalize.attention import Attention, check_attention, check_contiguous_last
from ..normalize.bounds import Bounds, Proof
from ..normalize.cache_update import CacheWrite, match_cache_write, same_positions, start_of_one
from ..normalize.clause import Term
from ..normalize.in_place import GraphInputs, check_in_place, check_readers, join, storage_offset, updated_caches
from ..normalize.latent import Latent, match_latent
from ..normalize.masks import check_mask
from ..normalize.products import like_product
from ..normalize.repeat_kv import unrepeat_kv
from ..normalize.rope import Rope, match_rope
from ..sites import Declined
from ..walk import (
    aten,
    dim_of,
    erase_dead,
    is_call,
    prims,
    same_size,
    same_value,
    shape,
    strip,
    value,
)
from .bounds import Proofs, Rows, emit_bounds, emit_lengths, emit_rest
from .decline import Facts, capability_of
from .emit import Emitter, Written, is_computed, keep_in_memory, replace
from .latent import (
    attend_paged,
    by_head,
    check_absorbed,
    check_compressed,
    dense_operands,
    emit_compressed,
    emit_latent,
)
from .masks import emit_mask, emit_sinks, kind_of_mask

KEY_TRANSPOSE = (0, 1, 3, 2)


@dataclass
class Plan:
    """What one attention site will be rewritten to. `*_dims`: the permutation that makes a tensor [B, H, L, D]."""

    attention: Attention
    query: Node
    key: Node
    value: Node
    key_dims: tuple[int, ...] | None = None
    value_dims: tuple[int, ...] | None = None
    key_write: CacheWrite | None = None
    value_write: CacheWrite | None = None
    query_rope: Rope | None = None
    key_rope: Rope | None = None
    bounds: Bounds = field(default_factory=Bounds)
    """The keys that a row may see, besides what the masks say."""
    is_proven: bool = False
    """The bounds are what masks were proven to say."""
    rest: tuple[Term, ...] = ()
    """What else such masks say."""
    needs_a_key: bool = False
    """They say so as long as no row stands in front of all keys."""
    query_is_rope: bool = False
    latent: Latent | None = None
    """What keys and values are expanded from, by a layer that goes into query and output."""
    counts: bool = False
    """The op is told how many compressed keys a sequence has, and no mask."""
    append_reason: str = ""
    rope_reason: str = ""
    latent_reason: str = ""

    @property
    def writes(self) -> list[CacheWrite]:
        return [write for write in (self.key_write, self.value_write) if write is not None]

    @property
    def grade(self) -> str:
        if self.counts:
            return "latent attention"
        parts = [("rope", self.query_rope), ("append", self.key_write), ("attention", self.attention)]
        return " + ".join(name for name, part in parts if part is not None)

    @property
    def reason(self) -> str:
        """Why it did not reach a higher grade."""
        if self.latent_reason:  # what expands keys is between the cache and them: there is no append
            return f"not absorbed: {self.latent_reason}"
        missing = [("append", self.append_reason), ("rope", self.rope_reason)]
        return "; ".join(f"no {name}: {reason}" for name, reason in missing if reason)

    @property
    def rows(self) -> Rows:
        query, key = value(self.query), permuted(value(self.key), self.key_dims)
        return Rows((*query.shape[:3], key.shape[2]), self.key_write, self.query_rope is not None, self.counts)

    @property
    def mask(self) -> str:
        """What the op gets: none, bool or additive."""
        return kind_of_mask(self.attention.masks, has_rest=bool(self.rest))

    @property
    def pieces(self) -> list[str]:
        """What was recognised, in words."""
        attention, words = self.attention, [self.attention.spelling]
        if not same_size(permuted(value(self.key), self.key_dims).shape[1], value(self.query).shape[1]):
            words.append("grouped heads")
        words += ["absorbed weights"] * (self.latent is not None)
        words += ["compressed keys"] * (attention.key_pe is not None)
        if self.mask != "none":
            words.append(f"{self.mask} mask")
        if attention.causal:
            words.append("causal")
        elif self.is_proven:
            words += self.bounds.pieces
        words += ["soft cap"] * bool(attention.soft_cap)
        words += ["sinks"] * (attention.sinks is not None)
        return words + ["log-sum-exp"] * (attention.lse is not None)

    def facts(self) -> Facts:
        """What a measurement may ask about this site."""
        attention, query = self.attention, value(self.query)
        key, values = permuted(value(self.key), self.key_dims), permuted(value(self.value), self.value_dims)
        given = value(attention.key).shape[1]
        if same_size(query.shape[1], key.shape[1]):
            heads = "equal"
        else:
            heads = "grouped" if same_size(given, key.shape[1]) else "repeated"
        return Facts(
            device=query.device.type,
            capability=capability_of(query.device),
            dtype=query.dtype,
            batch=query.shape[0],
            qo_len=query.shape[2],
            kv_len=key.shape[2],
            head_dim=query.shape[3],
            head_dim_vo=values.shape[3],
            mask=self.mask,
            causal=self.bounds.causal,
            heads=heads,
            spelling=attention.spelling,
            grade=self.grade,
            is_proven=self.is_proven,
        )


def permuted(tensor, dims: tuple[int, ...] | None):
    return tensor if dims is None else tensor.permute(dims)


def part_of_value(write: CacheWrite):
    """The cache as it lies in memory. (A stack after a write may have other strides in the functional graph.)"""
    tensor = value(write.base)
    for dim, index in sorted(write.part.indices.items(), reverse=True) if write.part is not None else ():
        tensor = tensor.select(dim, index)
    return tensor


def plan_attention(attention: Attention, order: dict[Node, int], inputs: GraphInputs) -> Plan:
    """The highest grade this attention reaches; raises `Declined` where not even attention alone can be taken.

    `order`: the place of each node in the graph.
    """
    if attention.key_transposed:
        key, key_dims = strip(attention.key), KEY_TRANSPOSE
    else:
        key, key_dims = unrepeat_kv(attention.key)
    values, value_dims = unrepeat_kv(attention.value)
    plan = Plan(attention, strip(attention.query), key, values, key_dims, value_dims)
    q, k, v = value(plan.query), permuted(value(key), key_dims), permuted(value(values), value_dims)
    check_attention(attention, q, k, v)
    for mask in attention.masks:
        check_mask(mask, plan.query, k.shape[2])
    if attention.key_pe is not None:
        check_compressed(attention)
        return plan
    try:
        _plan_latent(plan)
    except Declined as declined:
        plan.latent_reason = str(declined)
    if plan.latent is None:
        _plan_surroundings(plan, order, inputs)
    if attention.causal:  # top-left aligned
        plan.bounds = Bounds(plan.rows.first, causal=True)
    return plan


def _plan_surroundings(plan: Plan, order: dict[Node, int], inputs: GraphInputs) -> None:
    """Find the cache writes and RoPE that the op can do as well."""
    try:
        _plan_append(plan, order, inputs)
    except Declined as declined:
        plan.append_reason = str(declined)
    try:
        _plan_rope(plan)
    except Declined as declined:
        plan.rope_reason = str(declined)
    q, k, v = (
        value(plan.query),
        permuted(value(plan.key), plan.key_dims),
        permuted(value(plan.value), plan.value_dims),
    )
    if plan.query_rope is None:
        check_contiguous_last(plan.query.name, "query", q)
        if plan.key_write is None:
            check_contiguous_last(plan.key.name, "key", k)
        else:
            check_contiguous_last(plan.key_write.new.name, "new key", value(plan.key_write.new))
    if plan.key_write is None:
        check_contiguous_last(plan.value.name, "value", v)


def _plan_latent(plan: Plan) -> None:
    """Find the layer that expands key and value, and see that it is better absorbed."""
    attention = plan.attention
    latent = match_latent(plan.key, plan.value) if plan.key_dims is None and plan.value_dims is None else None
    if latent is not None:
        kept = {plan.query, latent.ckv, latent.kpe, *attention.operands}
        check_absorbed(attention, latent, plan.query, exclusive_to(*attention.results, *attention.views, keep=kept))
        plan.latent = latent


def prove_masks(plan: Plan, proofs: Proofs) -> None:
    """Let the op see to what the masks are proven to say."""
    attention = plan.attention
    is_latent = plan.latent is not None or attention.key_pe is not None
    if is_latent and attention.sinks is None and not attention.soft_cap:
        plan.counts = True
        proof = _proof(plan, proofs)
        is_all = proof is not None and not (proof.masks or proof.rest) and proof.bounds.window_left < 0
        plan.counts = is_all or not attention.masks
    if attention.key_pe is not None and not plan.counts:
        found = attention.masks[0].node.name if attention.masks else attention.node.name
        raise Declined(f"{found}: attention to compressed keys takes no mask but one that is proven to be causal")
    proof = _proof(plan, proofs)
    if proof is not None:
        plan.bounds, plan.rest, plan.is_proven = proof.bounds, proof.rest, True
        plan.needs_a_key = proof.needs_a_key
        attention.masks = proof.masks


def _proof(plan: Plan, proofs: Proofs) -> Proof | None:
    masks = plan.attention.masks
    return proofs.of(masks, plan.rows) if masks and not plan.attention.causal else None


def _plan_append(plan: Plan, order: dict[Node, int], inputs: GraphInputs) -> None:
    """Find the cache writes whose results key and value are, and see that the op can do them."""
    attention = plan.attention
    if attention.lse is not None:
        raise Declined(f"{attention.lse.name}: the log-sum-exp is used too")
    key_write = match_cache_write(plan.key, plan.key_dims)
    value_write = match_cache_write(plan.value, plan.value_dims)
    if key_write is None or value_write is None:
        missing = plan.key if key_write is None else plan.value
        raise Declined(f"{missing.name}: {target_name(missing)} is not a write to a static cache")
    if key_write.dims != value_write.dims:
        raise Declined(f"{value_write.node.name}: key and value caches differ in layout")
    if not join(key_write, value_write) and key_write.base is value_write.base:
        raise Declined(f"{key_write.base.name}: key and value are written to one cache")
    if (key_write.into_rows is None) != (value_write.into_rows is None):
        raise Declined(f"{value_write.node.name}: key and value caches have other numbers of sequences")
    if not same_positions(key_write, value_write):
        raise Declined(f"{value_write.node.name}: key and value are written at different positions")
    query_len, new_len = shape(plan.query)[2], shape(key_write.new)[2 if key_write.dims is None else 1]
    if not same_size(new_len, query_len):
        raise Declined(f"{key_write.node.name}: {new_len} positions for {query_len} queries")
    kept = {plan.query, key_write.new, value_write.new, key_write.positions, *attention.operands}
    replaced = exclusive_to(attention.node, *(v for v in attention.views if v not in kept), keep=kept)
    for write in (key_write, value_write):
        check_in_place(write, inputs)
        write.offset = storage_offset(write, inputs)
        check_readers(write, replaced, lambda user: order.get(user, -1) < order[attention.node])
        if value(write.new).dtype != value(write.cache).dtype:
            raise Declined(
                f"{write.new.name}: writes {value(write.new).dtype} to a cache of {value(write.cache).dtype}"
            )
        check_contiguous_last(write.base.name, "cache", permuted(part_of_value(write), write.cache_dims))
    check_contiguous_last(value_write.new.name, "new value", value(value_write.new))
    plan.key_write, plan.value_write = key_write, value_write


def _plan_rope(plan: Plan) -> None:
    """Find the RoPE on query and key, and see that the op can do both."""
    query_rope = match_rope(plan.query)
    if query_rope is None:
        raise Declined(f"{plan.query.name}: {target_name(plan.query)} is not RoPE")
    plan.query_is_rope = True
    new_key, new_dims = plan.key, plan.key_dims
    if plan.key_write is not None:
        new_key, new_dims = plan.key_write.new, plan.key_write.dims
    key_rope = match_rope(new_key, new_dims)
    if key_rope is None:
        raise Declined(f"{new_key.name}: {target_name(new_key)} is not RoPE")
    if query_rope.interleaved != key_rope.interleaved or query_rope.rotary_dim != key_rope.rotary_dim:
        raise Declined(f"{key_rope.node.name}: query and key are rotated in different ways")
    for table in ("cos", "sin"):
        mine, other = getattr(query_rope, table), getattr(key_rope, table)
        if query_rope.dims != key_rope.dims or not same_value(mine, other):
            raise Declined(f"{other.name}: {table} of the key is not that of the query, {mine.name}")
    if plan.key_write is None and not same_size(
        shape(plan.query)[2], permuted(value(key_rope.x), key_rope.dims).shape[2]
    ):
        raise Declined(f"{plan.key.name}: more keys than queries, so their RoPE differs")
    kept = {query_rope.x, key_rope.x, query_rope.cos, query_rope.sin, *plan.attention.operands}
    kept |= {plan.value_write.new, plan.key_write.positions} if plan.writes else {plan.value}
    ends = (
        *plan.attention.results,
        *(w.node for w in plan.writes),
        *(v for v in plan.attention.views if v not in kept),
    )
    replaced = exclusive_to(*ends, keep=kept)
    for rope, which in ((query_rope, "query"), (key_rope, "key")):
        if strip(rope.node) not in replaced:
            user = next(u for u in strip(rope.node).users if u not in replaced)
            raise Declined(f"{user.name}: reads the rotated {which} too; RoPE is left to Inductor")
        check_contiguous_last(rope.x.name, f"{which} before RoPE", permuted(value(rope.x), rope.dims))
    plan.query_rope, plan.key_rope = query_rope, key_rope


def exclusive_to(*nodes: Node, keep: Collection = ()) -> set[Node]:
    """`nodes` and all that only they use, but for what is kept: what goes when they go."""
    gone = set(nodes)
    pending = [n for node in nodes for n in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node in keep:
            continue
        if node.op == "call_function" and node not in gone and all(user in gone for user in node.users):
            gone.add(node)
            pending.extend(node.all_input_nodes)
    return gone


def target_name(node: Node) -> str:
    """What a node calls, as a reader of the report knows it."""
    return f"{node.target}" if node.op == "call_function" else node.op


def apply_attention(plan: Plan, emitter: Emitter, proofs: Proofs) -> list[Node]:
    """Put the plan's op into the graph; returns the nodes it stands for, which are now unused."""
    attention, rows = plan.attention, plan.rows
    emitter.at(attention.place)
    written = proofs.written(rows)
    attention.masks, plan.rest = (*attention.masks, *emit_rest(plan.rest, emitter)), ()
    options: dict = dict(scale=_constant_scale(attention), logits_soft_cap=attention.soft_cap)
    if plan.counts:
        _replace_attention(plan, _apply_latent(plan, options, emitter), emitter)
        return list(attention.results)
    options.update(
        emit_bounds(plan.bounds, written, rows, plan.query, emitter),
        mask=emit_mask(attention, emitter),
        sinks=emit_sinks(attention, emitter),
    )
    if plan.latent is not None:
        _replace_attention(plan, _apply_latent(plan, options, emitter), emitter)
        return list(attention.results)
    query = plan.query if plan.query_rope is None else _heads_first(plan.query_rope.x, plan.query_rope.dims, emitter)
    query = _emit_scale(attention, query, emitter)
    options["query"] = query
    if plan.query_rope is not None:
        options.update(_emit_tables(plan.query_rope, emitter))
    for name in ("mask", "cos", "sin", "query_positions"):
        if options.get(name) is not None:
            keep_in_memory(options[name])
    if plan.key_write is None:
        key = plan.key_rope.x if plan.key_rope is not None else plan.key
        key_dims = plan.key_rope.dims if plan.key_rope is not None else plan.key_dims
        options.update(
            key=_heads_first(key, key_dims, emitter), value=_heads_first(plan.value, plan.value_dims, emitter)
        )
        name = "rope_attention" if plan.query_rope is not None else "attention"
        op = getattr(torch.ops.fi, name if attention.lse is None else f"{name}_with_lse").default
        result = emitter.call_op(op, options)
        if attention.lse is not None:
            result, lse = (emitter.item(result, index) for index in (0, 1))
            replace(attention.lse, lse, emitter.fake_mode)
        _replace_attention(plan, result, emitter)
        return list(attention.results)
    proofs.refuses_negative(written)
    return _apply_append(plan, options, emitter)


def _apply_latent(plan: Plan, options: dict, emitter: Emitter) -> Node:
    """The result of the attention, with the layer that expands its keys and values in its query and behind it."""
    attention, latent = plan.attention, plan.latent
    if options["scale"] is None:  # of SDPA, over expanded keys
        options["scale"] = 1.0 / math.sqrt(latent.nope.length + latent.pe.length)
    query = _emit_scale(attention, plan.query, emitter)
    if plan.counts:
        kpe = latent.kpe if latent is not None else attention.key_pe
        keys = emitter.size(kpe, 2)
        lengths = emit_lengths(plan.bounds, plan.needs_a_key, plan.rows, query, keys, emitter)
        options.update(causal=plan.bounds.causal, kv_last_page_len=lengths)
    if latent is None:
        return emit_compressed(attention, query, _emit_scale(attention, attention.query_pe, emitter), options, emitter)

    def attend(q_nope: Node, q_pe: Node) -> Node:
        if plan.counts:
            return attend_paged(latent, q_nope, q_pe, options, emitter)
        if options["mask"] is not None:
            keep_in_memory(options["mask"])
        options.update(dense_operands(latent, q_nope, q_pe, emitter))
        return by_head(emitter.call_op(torch.ops.fi.attention.default, options), emitter)

    return emit_latent(latent, query, attend, emitter)


def _apply_append(plan: Plan, options: dict, emitter: Emitter) -> list[Node]:
    key_write, value_write = plan.key_write, plan.value_write
    key, key_dims = key_write.new, key_write.dims
    if plan.key_rope is not None:
        key, key_dims = plan.key_rope.x, plan.key_rope.dims
    options.update(
        key=_heads_first(key, key_dims, emitter),
        value=_heads_first(value_write.new, value_write.dims, emitter),
        positions=_emit_positions(key_write, emitter),
    )
    rotates = plan.query_rope is not None
    op = torch.ops.fi.rope_append_attention.default if rotates else torch.ops.fi.append_attention.default
    written = {
        name: Written(
            write.base,
            write.cache_dims,
            _seen_of_cache(write, value_write, emitter),
            {} if write.part is None else write.part.indices,
            write.offset,
        )
        for name, write in (("k_cache", key_write), ("v_cache", value_write))
    }
    result, new_key_cache, new_value_cache = emitter.mutating(op, written, **options)
    _replace_attention(plan, result, emitter)
    unused = [plan.attention.node]
    unused += _replace_write(key_write, new_key_cache, emitter)
    unused += _replace_write(value_write, new_value_cache, emitter)
    return unused


def _seen_of_cache(write: CacheWrite, value_write: CacheWrite, emitter: Emitter) -> dict[int, object]:
    """How many sequences and slots the op sees of a cache [B, Hkv, Lmax, D], where these are not all."""
    seen = {}
    if write.into_rows is not None:
        seen[0] = emitter.size(value_write.new, 0)
    if write.end is not None:
        seen[2] = write.end
    return seen


def _emit_positions(write: CacheWrite, emitter: Emitter) -> Node:
    """The slots written, one number each; a slice has only a start, the same for all layers."""
    if write.positions is not None:
        start = start_of_one(write.positions)
        return write.positions if start is None else emitter.call(aten.view.default, start, [1])
    length_dim = 2 if write.dims is None else 1
    length = shape(write.new)[length_dim]
    if not isinstance(length, int):
        length = emitter.call(aten.sym_size.int, write.new, length_dim)
    options = dict(step=1, dtype=torch.int64, device=value(write.new).device, requires_grad=False)
    return emitter.shared(prims.iota.default, length, start=write.start, **options)


def _replace_attention(plan: Plan, result: Node, emitter: Emitter) -> None:
    node = plan.attention.node
    if plan.attention.spelling == "eager" and plan.attention.result_dims is None:
        result = like_product(result, node, emitter.size(plan.query, 2), emitter)
    replace(node, result, emitter.fake_mode)


def _replace_write(write: CacheWrite, updated: Node, emitter: Emitter) -> list[Node]:
    """Let `updated` be the cache, or the stack of caches, from here on; returns the nodes that are now unused. What brought a write
    through a view back into the cache's layout goes."""
    if write.part is not None:
        for node in write.part.after:
            replace(node, updated, emitter.fake_mode)
        return write.part.after
    whole = updated_caches(write)
    for node in whole:
        node.replace_all_uses_with(updated)
    erase_dead(write.node.graph, whole)
    if write.through is not None:
        updated = emitter.call(aten.permute.default, updated, list(write.through))
    replace(write.node, updated, emitter.fake_mode)
    return [write.node]


def _heads_first(node: Node, dims: tuple[int, ...] | None, emitter: Emitter) -> Node:
    return node if dims is None else emitter.call(aten.permute.default, node, list(dims))


def _constant_scale(attention: Attention) -> float | None:
    if isinstance(attention.scale, Node):
        return 1.0
    return 1.0 / attention.scale if attention.divide and attention.scale is not None else attention.scale


def _emit_scale(attention: Attention, query: Node, emitter: Emitter) -> Node:
    """A scale that is a scalar tensor (a Python float under dynamic=True) goes into the query."""
    if not isinstance(attention.scale, Node):
        return query
    return emitter.call(aten.div.Tensor if attention.divide else aten.mul.Tensor, query, attention.scale)


def _emit_tables(rope: Rope, emitter: Emitter) -> dict:
    """cos and sin as [1 or B, L, R or 2R], contiguous in their last dimension; made once for all layers."""
    head_dim = 1 if rope.dims is None else 2
    tables, halves_repeat = {}, rope.halves_repeat
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        table = emitter.representative(strip(table))
        if value(table).is_complex():
            parts = emitter.shared(aten.view_as_real.default, table)
            table = emitter.shared(aten.select.int, parts, -1, ("cos", "sin").index(name))
        while len(shape(table)) < 4:
            table = emitter.shared(aten.unsqueeze.default, table, 0)
        if is_call(table, aten.unsqueeze.default) and dim_of(table, table.args[1]) == head_dim:
            table = table.args[0]
        else:
            table = emitter.shared(aten.select.int, table, head_dim, 0)
        if halves_repeat:
            table = emitter.shared(aten.slice.Tensor, table, 2, 0, rope.rotary_dim // 2)
        if not same_size(value(table).stride(-1), 1) or (halves_repeat and is_computed(table)):
            # half of a computed table: stored by itself, so that the other half is not computed and layers share it
            table = emitter.shared(aten.clone.default, table, memory_format=torch.contiguous_format)
        tables[name] = table
    width = value(rope.x).shape[-1]
    rotary_dim = 0 if rope.rotary_dim == width else rope.rotary_dim
    return dict(tables, interleaved=rope.interleaved, rotary_dim=rotary_dim)
