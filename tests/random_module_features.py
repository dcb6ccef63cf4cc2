"""What a random attention module may be made of: every spelling of its parts, and the choice that follows from a seed.

`test_inductor_random_modules.py` composes and runs them.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from snippets.rope import gpt_fast_rotate, gpt_fast_table, rotate_every_two, rotate_half, tables_half, tables_pairs

H, D, LMAX, RING, WINDOW = 4, 16, 12, 7, 4
LENGTHS = ((1, 1), (1, 1, 1), (3, 1), (2, 2), (4, 1, 1), (3, 2))


class Features(NamedTuple):
    rope: str
    stored: str
    length_first: bool
    write: str
    prefix: bool
    mask: str
    kv_heads: int
    gqa: str
    attention: str
    fill: str
    scale: float | None
    layout: str
    twist: str
    dtype: torch.dtype
    dynamic: bool
    batch: int
    start: int
    lengths: tuple[int, ...]


# ---- RoPE: x [B, H, L, D], positions [L] ----


def rotate_none(x, positions):
    return x


def rotate_cat(x, positions):
    """Hugging Face"""
    cos, sin = (t.unsqueeze(1).to(x.dtype) for t in tables_half(positions, x))
    return x * cos + rotate_half(x) * sin


def rotate_in_float32(x, positions):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, wide))
    return (wide * cos + rotate_half(wide) * sin).type_as(x)


def rotate_stacked(x, positions):
    """gpt-fast, on [B, L, H, D]"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return gpt_fast_rotate(x.transpose(1, 2), gpt_fast_table(positions, wide)).transpose(1, 2).type_as(x)


def rotate_slices(x, positions):
    """GPT-J"""
    cos, sin = (t.unsqueeze(1).to(x.dtype) for t in tables_pairs(positions, x))
    return x * cos + rotate_every_two(x) * sin


def rotate_part(x, positions):
    """GPT-NeoX"""
    cos, sin = (t.unsqueeze(1).to(x.dtype) for t in tables_half(positions, x, D // 2))
    rotated, rest = x[..., : D // 2], x[..., D // 2 :]
    return torch.cat((rotated * cos + rotate_half(rotated) * sin, rest), dim=-1)


def rotate_last_part(x, positions):
    """DeepSeek keeps what is rotated behind the rest: not what the ops do."""
    cos, sin = (t.unsqueeze(1).to(x.dtype) for t in tables_half(positions, x, D // 2))
    rest, rotated = x.split([D // 2, D // 2], dim=-1)
    return torch.cat((rest, rotated * cos + rotate_half(rotated) * sin), dim=-1)


def rotate_by_half_tables(x, positions):
    """GPT-OSS"""
    cos, sin = (t[..., : D // 2].unsqueeze(1).to(x.dtype) for t in tables_half(positions, x))
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotate_by_wide_tables(x, positions):
    """litgpt, where the halves of cos and of sin come from buffers: to the graph they are different ones."""
    cos, sin = (t.unsqueeze(1).to(x.dtype) for t in tables_half(positions, x))
    change = torch.linspace(0.5, 1.5, D, device=x.device, dtype=x.dtype)
    return x * (cos * change) + rotate_half(x) * (sin * change)


def rotate_complex(x, positions):
    """Meta's llama"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    table = gpt_fast_table(positions, wide)
    turns = torch.view_as_complex(table.contiguous())
    pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


def rotate_backwards(x, positions):
    cos, sin = (t.unsqueeze(1).to(x.dtype) for t in tables_half(positions, x))
    return x * cos - rotate_half(x) * sin


ROPES = {
    "none": rotate_none,
    "cat": rotate_cat,
    "cat in float32": rotate_in_float32,
    "stack": rotate_stacked,
    "slices": rotate_slices,
    "partial": rotate_part,
    "last part": rotate_last_part,
    "half tables": rotate_by_half_tables,
    "wide tables": rotate_by_wide_tables,
    "complex": rotate_complex,
    "backwards": rotate_backwards,
}


# ---- caches: how K and V are stored; both are seen as [B, Hkv, Lmax, D], or [B, Lmax, Hkv, D] ----


def stored_apart(shape, make):
    return [make(shape), make(shape)], lambda state: (state[0], state[1])


def stored_stacked(shape, make):
    return [make((2, *shape))], lambda state: (state[0][0], state[0][1])


def stored_in_layers(shape, make):
    return [make((2, *shape[:1], 2, *shape[1:]))], lambda state: (state[0][1][:, 0], state[0][1][:, 1])


def stored_side_by_side(shape, make):
    return [make((*shape[:-1], 2 * D))], lambda state: (state[0][..., :D], state[0][..., D:])


def stored_in_one_storage(shape, make):
    whole = make((2, *shape))
    return [whole[0], whole[1]], lambda state: (state[0], state[1])


def stored_interleaved(shape, make):
    whole = make((*shape[:-1], 2, D))
    return [whole[..., 0, :], whole[..., 1, :]], lambda state: (state[0], state[1])


def stored_in_more(shape, make):
    """Views of larger tensors, that do not begin where those do."""
    larger = (shape[0] + 1, *shape[1:])
    return [make(larger)[1:], make(larger)[1:]], lambda state: (state[0], state[1])


STORED = {
    "apart": stored_apart,
    "stacked": stored_stacked,
    "in layers": stored_in_layers,
    "side by side": stored_side_by_side,
    "one storage": stored_in_one_storage,
    "interleaved": stored_interleaved,
    "in more": stored_in_more,
}


def write_index_copy(cache, new, dim, slots, start):
    cache.index_copy_(dim, slots, new)


def write_index_put(cache, new, dim, slots, start):
    cache[(slice(None),) * dim + (slots,)] = new


def write_slice(cache, new, dim, slots, start):
    cache[(slice(None),) * dim + (slice(start, start + new.shape[dim]),)] = new


def write_narrow_copy(cache, new, dim, slots, start):
    cache.narrow(dim, start, new.shape[dim]).copy_(new)


def write_ring(cache, new, dim, slots, start):
    cache.index_copy_(dim, slots % RING, new)


WRITES = {
    "index_copy": write_index_copy,
    "index_put": write_index_put,
    "slice": write_slice,
    "narrow copy": write_narrow_copy,
    "ring": write_ring,
}


# ---- masks: True or 0 where the query at `positions` [L] attends to one of the `size` slots; no row is empty ----


def causal_by_positions(positions, size, buffers):
    return torch.arange(size) <= positions[:, None]


def window(positions, size, buffers):
    slots = torch.arange(size)
    return (slots <= positions[:, None]) & (slots > positions[:, None] - WINDOW)


def causal_and_padding(positions, size, buffers):
    return causal_by_positions(positions, size, buffers)[None, None] & buffers["keep"][:, None, None, :size]


def row_of_tril(positions, size, buffers):
    return buffers["tril"][positions][:, :size]


def row_of_4d_tril(positions, size, buffers):
    return buffers["tril"][None, None, positions, :size]


def numbers(positions, size, buffers):
    """As eager code of Hugging Face builds it."""
    lowest = torch.finfo(torch.bfloat16).min
    return torch.where(causal_by_positions(positions, size, buffers), 0.0, lowest)[None, None].to(buffers["like"].dtype)


def numbers_and_padding(positions, size, buffers):
    padding = torch.where(buffers["keep"][:, None, None, :size], 0.0, -1e30).to(buffers["like"].dtype)
    return numbers(positions, size, buffers) + padding


def bias(positions, size, buffers):
    """ALiBi"""
    distance = torch.arange(size) - positions[:, None]
    return (distance * buffers["slopes"][:, None, None])[None].to(buffers["like"].dtype)


MASKS = {
    "arange": causal_by_positions,
    "window": window,
    "padding": causal_and_padding,
    "tril row": row_of_tril,
    "4-D tril row": row_of_4d_tril,
    "float": numbers,
    "float and padding": numbers_and_padding,
    "bias": bias,
}


# ---- grouped heads ----


def expand_reshape(x, times):
    b, heads, length, dim = x.shape
    return x[:, :, None].expand(b, heads, times, length, dim).reshape(b, heads * times, length, dim)


def interleave(x, times):
    return x.repeat_interleave(times, dim=1)


def interleave_by_length(x, times):
    return x.transpose(1, 2).repeat_interleave(times, dim=2).transpose(1, 2)


def tile(x, times):
    """Another order than grouped attention's."""
    return x.repeat(1, times, 1, 1)


REPEATS = {"expand": expand_reshape, "interleave": interleave, "by length": interleave_by_length, "tile": tile}


# ---- attention ----


def by_sdpa(q, k, v, mask, causal, f: Features):
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, scale=f.scale, enable_gqa=f.gqa == "enable_gqa"
    )


def masked_scores(scores, mask, causal, f: Features):
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is None:
        return scores
    if mask.dtype != torch.bool:
        return scores + mask
    fill = -torch.inf if f.fill == "never" else torch.finfo(torch.bfloat16).min
    return scores.masked_fill(~mask, fill) if f.fill != "where" else torch.where(mask, scores, fill)


def by_products(q, k, v, mask, causal, f: Features):
    scale = f.scale if f.scale is not None else 1 / math.sqrt(D)
    return masked_scores((q @ k.mT) * scale, mask, causal, f).softmax(-1) @ v


def by_products_in_float32(q, k, v, mask, causal, f: Features):
    scores = torch.matmul(q, k.transpose(2, 3)) / (1 / f.scale if f.scale is not None else math.sqrt(D))
    wide = torch.promote_types(q.dtype, torch.float32)
    return masked_scores(scores, mask, causal, f).softmax(-1, dtype=wide).to(q.dtype) @ v


def by_scaled_query(q, k, v, mask, causal, f: Features):
    scale = f.scale if f.scale is not None else 1 / math.sqrt(D)
    return masked_scores((q * scale) @ k.transpose(-1, -2), mask, causal, f).softmax(-1) @ v


def by_einsum(q, k, v, mask, causal, f: Features):
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (f.scale if f.scale is not None else 1 / math.sqrt(D))
    return torch.einsum("bhij,bhjd->bhid", masked_scores(scores, mask, causal, f).softmax(-1), v)


def by_einsum_of_heads_behind(q, k, v, mask, causal, f: Features):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (f.scale if f.scale is not None else 1 / math.sqrt(D))
    weights = masked_scores(scores, mask, causal, f).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).transpose(1, 2)


def by_products_of_merged_heads(q, k, v, mask, causal, f: Features):
    """fairseq"""
    q, k, v = (t.permute(2, 0, 1, 3).reshape(t.shape[2], -1, D).transpose(0, 1) for t in (q, k, v))
    scores = torch.bmm(q * (f.scale if f.scale is not None else 1 / math.sqrt(D)), k.transpose(1, 2))
    if mask is not None or causal:
        scores = masked_scores(scores.unflatten(0, (f.batch, H)), mask, causal, f).flatten(0, 1)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (f.batch, H))


ATTENTIONS = {
    "sdpa": by_sdpa,
    "products": by_products,
    "float32 softmax": by_products_in_float32,
    "scaled query": by_scaled_query,
    "einsum": by_einsum,
    "einsum, heads behind": by_einsum_of_heads_behind,
    "merged heads": by_products_of_merged_heads,
}

TWISTS = (
    "cache returned",
    "cache read before",
    "rotated key returned",
    "rotated query returned",
    "value one slot later",
    "key rotated elsewhere",
    "only the query rotated",
    "two layers on one cache",
    "written again",
    "positions reversed",
    "positions int32",
    "value written first",
    "output transposed",
    "key scaled after RoPE",
    "new key is old value",
    "query from the cache",
    "attends before the value is written",
    "mask of the cache",
)


def features_of(seed: int) -> Features:
    choose = random.Random(seed)
    write = choose.choice(["none", *WRITES, *WRITES, "cat"])
    kv_heads = choose.choice([H, 2, 2, 1])
    attention = choose.choice(["sdpa", "sdpa", "sdpa", *ATTENTIONS])
    gqa = choose.choice(["expand", "interleave", "by length", "enable_gqa", "enable_gqa", "expand", "tile"])
    if kv_heads == H:
        gqa = "equal"
    elif attention != "sdpa" and gqa == "enable_gqa":
        gqa = "interleave"
    stored = choose.choice([*["apart"] * 4, *STORED])
    # With symbolic sizes, torch 2.13 itself is wrong about two arguments that interleave in memory: its AOTAutograd makes one
    # tensor of them, of strides `mul(a, b, c)`.
    dynamic = choose.random() < 0.25 and stored != "interleaved"
    return Features(
        rope=choose.choice(["none", *ROPES, "cat", "stack"]),
        stored=stored,
        length_first=choose.random() < 0.3,
        write=write,
        prefix=write not in ("none", "cat", "ring") and choose.random() < 0.15,
        mask=choose.choice(["none", "is_causal", *MASKS, *MASKS]),
        kv_heads=kv_heads,
        gqa=gqa,
        attention=attention,
        fill=choose.choice(["never", "lowest", "where"]),
        scale=choose.choice([None, None, 0.3]),
        layout=choose.choice(["heads first", "transposed", "fused"]),
        twist=choose.choice(TWISTS) if choose.random() < 0.35 else "none",
        dtype=choose.choice([torch.float32, torch.bfloat16]),
        dynamic=dynamic,
        batch=choose.choice([1, 2]),
        start=choose.randint(1, 4),
        lengths=choose.choice(LENGTHS),
    )
