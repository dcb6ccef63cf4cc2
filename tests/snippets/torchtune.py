"""torchtune: RoPE from one cache of cos and sin [length, D / 2, 2], on tensors [batch, length, heads, D]."""

import torch
import torch.nn.functional as F

from . import FULL, snippet
from .cache import LMAX
from .eager import wide
from .rope import HKV, ROPE, B, D, H, L, by_length

START = 4


def rope_cache(length=LMAX):
    steps = 100.0 ** (-torch.arange(0, D, 2).float() / D)
    angles = torch.outer(torch.arange(length).float(), steps)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rotate(x, cache, positions=None):
    pairs = wide(x).reshape(*x.shape[:-1], -1, 2)
    cache = cache[: x.shape[1]] if positions is None else cache[positions]
    cache = cache.view(-1, pairs.size(1), 1, pairs.size(3), 2)
    out = torch.stack(
        (
            pairs[..., 0] * cache[..., 0] - pairs[..., 1] * cache[..., 1],
            pairs[..., 1] * cache[..., 0] + pairs[..., 0] * cache[..., 1],
        ),
        -1,
    )
    return out.flatten(3).type_as(x)


def repeat_kv(x):
    return x.unsqueeze(2).expand(-1, -1, H // HKV, -1, -1).flatten(1, 2)


def step(dtype=torch.float32, heads_first=True, length=3):
    q, k, v = (torch.randn(B, length, heads, D, dtype=dtype) for heads in (H, HKV, HKV))
    size = (B, HKV, LMAX, D) if heads_first else (B, LMAX, HKV, D)
    caches = (torch.randn(size, dtype=dtype), torch.randn(size, dtype=dtype))
    positions = torch.arange(START, START + length)
    mask = (torch.arange(LMAX) <= positions[:, None]).expand(B, 1, length, LMAX)
    return q, k, v, *caches, rope_cache(), positions, mask


@snippet(lambda: (*by_length()[:3], rope_cache()), grade=ROPE, rotated=True)
def prompt(q, k, v, cache):
    q, k, v = (t.transpose(1, 2) for t in (rotate(q, cache), rotate(k, cache), v))
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True)


@snippet(lambda: (*(t.bfloat16() for t in by_length()[:3]), rope_cache()), grade=ROPE, rotated=True)
def packed_positions_bf16(q, k, v, cache):
    """Several documents in a row: positions of each token of each sequence."""
    positions = (torch.arange(L, device=q.device) % 4).expand(B, L).contiguous()
    q, k, v = (t.transpose(1, 2) for t in (rotate(q, cache, positions), rotate(k, cache, positions), v))
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True)


@snippet(step, grade=FULL, rotated=True)
def cached(q, k, v, kc, vc, cache, positions, mask):
    """Positions of the cache are counted by itself: those of RoPE are given for each sequence."""
    rows = positions.expand(B, -1)
    q, k = rotate(q, cache, rows), rotate(k, cache, rows)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    kc[:, :, positions] = k
    vc[:, :, positions] = v
    return F.scaled_dot_product_attention(q, repeat_kv(kc), repeat_kv(vc), attn_mask=mask)


@snippet(lambda: (*step()[:5], rope_cache(), torch.arange(LMAX) + START, step()[7]), grade=FULL, rotated=True)
def cache_that_counts(q, k, v, kc, vc, cache, count, mask):
    """`KVCache.update`: the slots are a buffer that moves on."""
    positions = torch.arange(START, START + q.shape[1], device=q.device)
    q, k = rotate(q, cache, positions[None]), rotate(k, cache, positions[None])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    kc[:, :, count[: q.shape[2]] % LMAX] = k
    vc[:, :, count[: q.shape[2]] % LMAX] = v
    count.add_(q.shape[2])
    return F.scaled_dot_product_attention(q, repeat_kv(kc), repeat_kv(vc), attn_mask=mask)


@snippet(lambda: step(torch.bfloat16, heads_first=False), grade=FULL, rotated=True)
def cache_by_length(q, k, v, kc, vc, cache, positions, mask):
    q, k = rotate(q, cache, positions[None]), rotate(k, cache, positions[None])
    kc[:, positions] = k
    vc[:, positions] = v
    q, k, v = (t.transpose(1, 2) for t in (q, kc, vc))
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)


# ---- near misses ----


@snippet(lambda: (*by_length()[:3], rope_cache()), reason="is not RoPE|another order", rotated=None)
def pairs_the_other_way_round(q, k, v, cache):
    """Rotated, and the members of each pair swapped."""
    q, k, v = (t.transpose(1, 2) for t in (rotate(q, cache), rotate(k, cache), v))
    q, k = (t.reshape(*t.shape[:-1], -1, 2).flip(-1).flatten(3) for t in (q, k))
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True)


@snippet(lambda: (*by_length()[:3], rope_cache()), reason="of the key is not that of the query", rotated=False)
def key_a_position_behind(q, k, v, cache):
    q, k, v = (t.transpose(1, 2) for t in (rotate(q, cache[1:]), rotate(k, cache), v))
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True)
