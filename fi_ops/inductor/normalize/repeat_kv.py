"""KV heads repeated for grouped-query attention.

    x [B, Hkv, L, D] -> unsqueeze(2) -> expand [B, Hkv, n, L, D] -> (clone) -> view [B, Hkv * n, L, D]

is what `x[:, :, None].expand(...).reshape(...)` and `x.repeat_interleave(n, dim=1)` both become; head h of the result is head
h // n of x, which is how the attention ops read grouped heads. `x.repeat(1, n, 1, 1)` is another order and does not match.
"""

# The arguments of fx calls have no types that mypy could follow.
# mypy: disable-error-code="arg-type,assignment,attr-defined,index,misc,operator,return-value,str-unpack,union-attr"

from __future__ import annotations

from torch.fx import Node

from ..walk import aten, dim_of, is_call, permutation, same_shape, same_size, shape, strip


def unrepeat_heads(node: Node, head_dim: int = 1) -> Node:
    """The heads before they were repeated along `head_dim`; the node itself (stripped) if they were not."""
    merged = strip(node)
    if not is_call(merged, aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return merged
    repeated = strip(merged.args[0])
    if not is_call(repeated, aten.expand.default):
        return merged
    inserted = strip(repeated.args[0])
    if not is_call(inserted, aten.unsqueeze.default) or dim_of(inserted, inserted.args[1]) != head_dim + 1:
        return merged
    source = strip(inserted.args[0])
    before, between, after = shape(source), shape(repeated), shape(merged)
    groups = between[head_dim + 1]
    expected = (*before[: head_dim + 1], groups, *before[head_dim + 1 :])
    if not same_shape(between, expected) or len(after) != len(before):
        return merged
    heads = before[head_dim] * groups
    if not same_size(after[head_dim], heads):
        return merged
    others = [d for d in range(len(before)) if d != head_dim]
    if not same_shape([after[d] for d in others], [before[d] for d in others]):
        return merged
    return source


def unrepeat_kv(node: Node) -> tuple[Node, tuple[int, ...] | None]:
    """(x, dims): `node` [B, H, L, D] is x, or `x.permute(dims)`, with its heads repeated.

    Looks for the repetition before and after a permute, so that caches of layout [B, L, Hkv, D] are found as well.
    """
    source = unrepeat_heads(node)
    if source is not strip(node):
        return source, None
    found = permutation(source)
    if found is None:
        return source, None
    inner, dims = found
    unrepeated = unrepeat_heads(inner, dims[1])
    if unrepeated is strip(inner):
        return source, None
    return unrepeated, dims
