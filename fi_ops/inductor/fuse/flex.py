"""The masks of a FlexAttention site, made for all queries and keys at once and shared by the layers that have the same.

mask[b, h, i, j] = full[b, h, i // Q, j // K]  or  partial[b, h, i // Q, j // K] and mask_mod(b, h, i, j)
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from ..graft import KnownSizes, graft
from ..normalize.flex import Blocks, Flex, Term, mask_elements
from ..normalize.masks import Mask
from ..sites import Declined
from ..walk import erase_dead, same_value, value
from .emit import Emitter

LARGEST = 2**28
"""Elements of a mask: what is larger stays with FlexAttention, which never makes it."""


def check_mask_size(flex: Flex) -> None:
    if flex.mask is None and flex.blocks is None and not flex.terms:
        return
    elements = mask_elements(flex)
    if not isinstance(elements, int):
        elements = elements.node.hint if elements.node.has_hint() else LARGEST + 1
    if elements > LARGEST:
        raise Declined(f"{flex.node.name}: its mask would have {elements} elements")


class FlexMasks:
    """Makes masks in a graph; those of layers with the same mods, captured values and sizes are made once."""

    def __init__(self, emitter: Emitter, sizes: KnownSizes):
        self.emitter = emitter
        self.sizes = sizes
        self._made: list[tuple[tuple, Node]] = []

    def make(self, flex: Flex) -> None:
        """Give the attention its masks."""
        check_mask_size(flex)
        self.emitter.at(flex.attention.place)
        masks = []
        if flex.mask is not None or flex.blocks is not None:
            masks.append(Mask(self._shared(flex, flex.mask, flex.blocks)))
        for term in flex.terms:
            node = self._shared(flex, term, None)
            masks.append(Mask(node, inverted=term.inverted, fill=term.fill, scale=term.scale))
        flex.attention.masks = tuple(masks)

    def _shared(self, flex: Flex, term: Term | None, blocks: Blocks | None) -> Node:
        attention = flex.attention
        sizes = (*value(attention.query).shape[:3], value(attention.key).shape[2])
        kept = [] if blocks is None else [blocks.partial_count, blocks.partial, blocks.full_count, blocks.full]
        captured = () if term is None else term.captured
        sizes_of_blocks = None if blocks is None else (blocks.query_size, blocks.key_size)
        key = (_code(term), tuple(map(str, sizes)), sizes_of_blocks, [*kept, *captured])
        for known, node in self._made:
            if not node._erased and known[:3] == key[:3] and same_value(known[3], key[3]):
                return node
        operands = [x for x in (attention.query, attention.key, *kept, *captured) if isinstance(x, Node)]
        function = _mask_function(term, blocks, captured)
        node = self._traced(function, list(dict.fromkeys(operands)), operands)
        self._made.append((key, node))
        return node

    def _traced(self, function: Callable, inputs: list[Node], operands: list[Node]) -> Node:
        """The node of what `function(*operands)` computes."""
        from torch._dispatch.python import enable_python_dispatcher
        from torch._inductor.decomposition import select_decomp_table
        from torch.fx.experimental.proxy_tensor import make_fx

        def call(*values):
            by_node = dict(zip(inputs, values, strict=True))
            return [function(*(by_node[operand] for operand in operands))]

        fakes = [value(node) for node in inputs]
        # With guards, as any tracing: what is decided on a size here is in the graph that comes out.
        with torch.no_grad(), enable_python_dispatcher(), self.emitter.fake_mode:
            traced = make_fx(call, select_decomp_table(), tracing_mode="real")(*fakes)
        traced.graph.eliminate_dead_code()
        result, _ = graft(self.emitter.graph, self.emitter.before, traced, inputs, self.sizes)
        return result

    def erase_unused(self) -> None:
        """Erase the masks that were proven, of which no op reads anything."""
        erase_dead(self.emitter.graph, [node for _, node in self._made if not node._erased])


def _code(term: Term | None) -> str | None:
    return None if term is None else f"{term.module.code} {term.inverted} {term.fill}"


def _mask_function(term: Term | None, blocks: Blocks | None, captured: tuple) -> Callable:
    """(query, key, the tensors of the blocks, captured nodes) -> a mask of four dimensions, some of them of size 1."""
    blocks_given = 0 if blocks is None else (2 if blocks.full is None else 4)

    def compute(query, key, *rest):
        given, others = rest[:blocks_given], iter(rest[blocks_given:])
        values = tuple(next(others) if isinstance(x, Node) else x for x in captured)
        sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        mask = None if term is None else _evaluate(term, values, sizes, query.device)
        if blocks is None:
            return mask
        partial = _in_blocks(given[0], given[1], blocks, sizes)
        mask = partial if mask is None else mask & partial
        return mask | _in_blocks(given[2], given[3], blocks, sizes) if blocks_given == 4 else mask

    return compute


def _evaluate(term: Term, captured: tuple, sizes: tuple, device: torch.device) -> torch.Tensor:
    """The term at every index; dimensions of indices that it does not use have size 1."""
    function: Callable = term.module
    indices = []
    for dim in reversed(range(len(sizes))):
        if term.used[dim]:
            mapped = tuple(0 if dim == d else None for d in range(len(sizes)))
            function = torch.vmap(function, in_dims=(*mapped, *(None for _ in captured)))
    for dim, size in enumerate(sizes):
        indices.append(torch.arange(size, device=device) if term.used[dim] else torch.zeros((), device=device).long())
    result = function(*indices, *captured)
    result = result if result.dtype == torch.bool else result.float()
    for dim, is_used in enumerate(term.used):
        if not is_used:
            result = result.unsqueeze(dim)
    return result


def _in_blocks(count: torch.Tensor, listed: torch.Tensor, blocks: Blocks, sizes: tuple) -> torch.Tensor:
    """Whether query i and key j are in one of the blocks `listed[b, h, i // Q, :count]`."""
    device = listed.device
    valid = torch.arange(listed.shape[-1], device=device) < count[..., None]
    key_blocks = (sizes[3] + blocks.key_size - 1) // blocks.key_size
    is_entry = listed[..., None] == torch.arange(key_blocks, device=device)
    hit = (is_entry & valid[..., None]).any(dim=-2)  # [b, h, query blocks, key blocks]
    query_block, key_block = (
        torch.arange(length, device=device) // size
        for length, size in zip(sizes[2:], (blocks.query_size, blocks.key_size), strict=True)
    )
    return hit[:, :, query_block][..., key_block]
