"""litgpt: one product for query, key and value, cos and sin of the full width, RoPE on part of the head, caches written by
`index_copy_`."""

import torch
import torch.nn.functional as F

from . import FULL, snippet
from .cache import APPEND, LMAX
from .rope import HKV, ROPE, B, D, H, L, rotate_half

START = 4
BATCH = 5  # another number than any other size, so that dynamic=True does not take them for one
WIDTH = (H + 2 * HKV) * D


def build_rope_cache(length, n_elem, like):
    steps = 1.0 / (100.0 ** (torch.arange(0, n_elem, 2, device=like.device).to(like.dtype) / n_elem))
    angles = torch.outer(torch.arange(length, device=like.device).to(like.dtype), steps).repeat(1, 2)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    while cos.dim() < x.dim():
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    return (x * cos + rotate_half(x) * sin).to(x.dtype)


def split(qkv):
    """[B, L, (H + 2 HKV) * D] to heads first"""
    batch, length, _ = qkv.shape
    q, k, v = qkv.split((H * D, HKV * D, HKV * D), dim=-1)
    q = q.view(batch, length, H, D).transpose(1, 2)
    k, v = (t.view(batch, length, HKV, D).transpose(1, 2) for t in (k, v))
    return q, k, v


def partly(x, cos, sin, n_elem):
    return torch.cat((apply_rope(x[..., :n_elem], cos, sin), x[..., n_elem:]), dim=-1)


def prompt():
    return (torch.randn(B, L, WIDTH),)


def step(length=3, batch=BATCH):
    positions = torch.arange(START, START + length)
    mask = torch.ones(LMAX, LMAX, dtype=torch.bool).tril()[None, None]
    caches = (torch.randn(batch, HKV, LMAX, D), torch.randn(batch, HKV, LMAX, D))
    return torch.randn(BATCH, length, WIDTH), *caches, positions, mask


def store(cache, positions, new):
    """The cache of as many sequences as there are, with new tokens."""
    return cache[: new.shape[0]].index_copy_(2, positions, new)


@snippet(prompt, grade=ROPE, rotated=True)
def whole_head(qkv):
    cos, sin = build_rope_cache(L, D, qkv)
    q, k, v = split(qkv)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)


@snippet(prompt, grade=ROPE, rotated=True)
def part_of_the_head(qkv):
    cos, sin = build_rope_cache(LMAX, 8, qkv)
    q, k, v = split(qkv)
    q, k = (partly(x, cos[:L], sin[:L], 8) for x in (q, k))
    k, v = (t.repeat_interleave(H // HKV, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


@snippet(step, grade=FULL, rotated=True)
def cached(qkv, kc, vc, positions, mask):
    cos, sin = (t.index_select(0, positions)[None] for t in build_rope_cache(LMAX, 8, qkv))
    q, k, v = split(qkv)
    q, k = partly(q, cos, sin, 8), partly(k, cos, sin, 8)
    k, v = store(kc, positions, k), store(vc, positions, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.index_select(2, positions), enable_gqa=True)


@snippet(lambda: step(1, batch=BATCH + 1), grade=FULL, rotated=True)
def cache_of_more_sequences(qkv, kc, vc, positions, mask):
    return cached(qkv, kc, vc, positions, mask)


@snippet(lambda: (*step(), torch.rand(LMAX, D), torch.rand(LMAX, D)), grade=FULL, rotated=True)
def tables_in_buffers(qkv, kc, vc, positions, mask, cos, sin):
    """litgpt's own spelling. Nothing in the graph tells that both halves of such a table are the same."""
    cos, sin = (t.index_select(0, positions)[None] for t in (cos, sin))
    q, k, v = split(qkv)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    k, v = store(kc, positions, k), store(vc, positions, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.index_select(2, positions), enable_gqa=True)


@snippet(lambda: (*step(1), torch.rand(LMAX, 8), torch.rand(LMAX, 8)), grade=FULL, rotated=True)
def tables_in_buffers_for_part_of_the_head(qkv, kc, vc, positions, mask, cos, sin):
    cos, sin = (t.index_select(0, positions)[None] for t in (cos, sin))
    q, k, v = split(qkv)
    q, k = partly(q, cos, sin, 8), partly(k, cos, sin, 8)
    k, v = store(kc, positions, k), store(vc, positions, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.index_select(2, positions), enable_gqa=True)


# ---- near misses ----


@snippet(
    lambda: (*step(), torch.rand(LMAX, D), torch.rand(LMAX, D)), grade=APPEND, reason="cos of the key", rotated=False
)
def tables_of_query_and_key(qkv, kc, vc, positions, mask, cos, sin):
    cos, sin = (t.index_select(0, positions)[None] for t in (cos, sin))
    q, k, v = split(qkv)
    q, k = apply_rope(q, cos, sin), apply_rope(k, sin, cos)
    k, v = store(kc, positions, k), store(vc, positions, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.index_select(2, positions), enable_gqa=True)


@snippet(lambda: (*step(), START + 3), reason="not known to be within the prefix", rotated=False)
def read_up_to_the_last_position(qkv, kc, vc, positions, mask, end):
    """`input_pos_maxp1`: that no position is beyond it is known to the caller alone."""
    cos, sin = (t.index_select(0, positions)[None] for t in build_rope_cache(LMAX, D, qkv))
    q, k, v = split(qkv)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    k, v = store(kc, positions, k)[:, :, :end], store(vc, positions, v)[:, :, :end]
    mask = mask.index_select(2, positions)[..., :end]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@snippet(prompt, reason="not the rest of the head", rotated=None)
def another_part_passes_through(qkv):
    cos, sin = build_rope_cache(L, 8, qkv)
    q, k, v = split(qkv)
    q, k = (torch.cat((apply_rope(x[..., :8], cos, sin), x[..., :8]), dim=-1) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@snippet(prompt, reason="is not RoPE", rotated=None)
def last_part_is_rotated(qkv):
    cos, sin = build_rope_cache(L, 8, qkv)
    q, k, v = split(qkv)
    q, k = (torch.cat((x[..., :8], apply_rope(x[..., 8:], cos, sin)), dim=-1) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
