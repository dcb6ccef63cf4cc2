"""Meta's llama: RoPE as a product of complex numbers; caches [batch, length, heads, D] for more sequences and tokens than there
are, written and read by slices."""

import math

import torch
import torch.nn.functional as F

from . import FULL, snippet
from .eager import wide
from .rope import HKV, ROPE, B, D, H, L, by_length

BMAX, LMAX, START = 3, 12, 4


def frequencies(length=L):
    """`freqs_cis`, [length, D / 2]"""
    steps = 100.0 ** (-torch.arange(0, D, 2).float() / D)
    angles = torch.outer(torch.arange(length).float(), steps)
    return torch.polar(torch.ones_like(angles), angles)


def prompt(dtype=torch.float32):
    return *(t.to(dtype) for t in by_length()[:3]), frequencies()


def step(length=3, dtype=torch.float32, batch=BMAX):
    """A few new tokens: query, key and value, their caches, the frequencies of all positions, the first of these."""
    q, k, v = (torch.randn(B, length, heads, D, dtype=dtype) for heads in (H, HKV, HKV))
    caches = (torch.randn(batch, LMAX, HKV, D, dtype=dtype), torch.randn(batch, LMAX, HKV, D, dtype=dtype))
    return q, k, v, *caches, frequencies(LMAX), START


def decode():
    return step(1)


def rotate(x, freqs):
    pairs = torch.view_as_complex(wide(x).reshape(*x.shape[:-1], -1, 2))
    freqs = freqs.view(1, pairs.shape[1], 1, pairs.shape[-1])
    return torch.view_as_real(pairs * freqs).flatten(3).type_as(x)


def repeat_kv(x):
    batch, length, heads, dim = x.shape
    return x[:, :, :, None].expand(batch, length, heads, H // HKV, dim).reshape(batch, length, H, dim)


def attend(q, k, v, mask=None):
    q, k, v = (t.transpose(1, 2) for t in (q, repeat_kv(k), repeat_kv(v)))
    scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(D)
    if mask is not None:
        scores = scores + mask
    out = torch.matmul(F.softmax(wide(scores), dim=-1).type_as(q), v)
    return out.transpose(1, 2).contiguous().view(*out.shape[:1], -1, H * D)


def append(q, k, v, kc, vc, freqs, start):
    """The rotated query, and what the caches hold from then on, up to the last token."""
    batch, end = q.shape[0], start + q.shape[1]
    q, k = rotate(q, freqs[start:end]), rotate(k, freqs[start:end])
    kc[:batch, start:end] = k
    vc[:batch, start:end] = v
    return q, kc[:batch, :end], vc[:batch, :end]


@snippet(prompt, grade=ROPE, rotated=True)
def complex_rope(q, k, v, freqs):
    return attend(rotate(q, freqs), rotate(k, freqs), v)


@snippet(lambda: prompt(torch.bfloat16), grade=ROPE, rotated=True)
def complex_rope_bf16(q, k, v, freqs):
    return attend(rotate(q, freqs), rotate(k, freqs), v)


@snippet(prompt, grade=ROPE, rotated=True)
def complex_rope_in_sdpa(q, k, v, freqs):
    """Frequencies first, as in llama 4; heads in front."""
    freqs = freqs[None, :, None]

    def turn(x):
        pairs = torch.view_as_complex(wide(x).reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(freqs * pairs).flatten(3).type_as(x).transpose(1, 2)

    return F.scaled_dot_product_attention(turn(q), turn(k), v.transpose(1, 2), is_causal=True, enable_gqa=True)


@snippet(prompt, grade=ROPE, rotated=True)
def complex_rope_heads_first(q, k, v, freqs):
    def turn(x):
        pairs = torch.view_as_complex(wide(x).reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs).reshape(x.shape).to(x.dtype)

    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    return F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)


@snippet(lambda: by_length(), grade=ROPE, rotated=True)
def frequencies_made_by_polar(q, k, v, positions):
    steps = 100.0 ** (-torch.arange(0, D, 2, device=q.device).float() / D)
    angles = torch.outer(positions.float(), steps)
    freqs = torch.polar(torch.ones_like(angles), angles)
    return attend(rotate(q, freqs), rotate(k, freqs), v)


@snippet(decode, grade=FULL, rotated=True)
def llama_decode(q, k, v, kc, vc, freqs, start):
    return attend(*append(q, k, v, kc, vc, freqs, start))


@snippet(step, grade=FULL, rotated=True)
def llama_prompt(q, k, v, kc, vc, freqs, start):
    length = q.shape[1]
    mask = torch.full((length, length), -torch.inf, device=q.device).triu(1)
    mask = torch.hstack((torch.zeros((length, start), device=q.device), mask)).type_as(q)
    return attend(*append(q, k, v, kc, vc, freqs, start), mask)


@snippet(lambda: step(3, torch.bfloat16, B), grade=FULL, rotated=True)
def llama_as_many_sequences_as_the_cache(q, k, v, kc, vc, freqs, start):
    return attend(*append(q, k, v, kc, vc, freqs, start))


@snippet(step, grade=FULL, rotated=True)
def llama_cache_returned(q, k, v, kc, vc, freqs, start):
    return attend(*append(q, k, v, kc, vc, freqs, start)), kc.sum(1), vc[:, 1:]


@snippet(decode, grade=FULL, rotated=True)
def llama_with_sdpa(q, k, v, kc, vc, freqs, start):
    q, k, v = (t.transpose(1, 2) for t in append(q, k, v, kc, vc, freqs, start))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


# ---- near misses ----


@snippet(prompt, reason="conjugate", rotated=None)
def rotated_backwards(q, k, v, freqs):
    return attend(rotate(q, freqs.conj()), rotate(k, freqs.conj()), v)


@snippet(prompt, reason="of the key is not that of the query", rotated=False)
def other_frequencies_for_the_key(q, k, v, freqs):
    return attend(rotate(q, freqs), rotate(k, freqs + 0.1), v)


@snippet(lambda: (*prompt()[:3], torch.randn(L, HKV, D // 2, dtype=torch.complex64)), reason="differs between heads")
def frequencies_of_each_head(q, k, v, freqs):
    def turn(x):
        pairs = torch.view_as_complex(wide(x).reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs.repeat(1, x.shape[2] // HKV, 1)).flatten(3).type_as(x)

    return attend(turn(q), turn(k), v)


@snippet(prompt, reason="is not RoPE", rotated=None)
def halves_as_complex_numbers(q, k, v, freqs):
    """Rotate-half order written back as neighbours: another function than either."""

    def turn(x):
        halves = wide(x).reshape(*x.shape[:-1], 2, -1).transpose(-1, -2).contiguous()
        return torch.view_as_real(torch.view_as_complex(halves) * freqs[None, :, None]).flatten(3).type_as(x)

    return attend(turn(q), turn(k), v)


@snippet(step, reason="ends before|not a write", rotated=None)
def prefix_ends_before_the_new_tokens(q, k, v, kc, vc, freqs, start):
    q, keys, values = append(q, k, v, kc, vc, freqs, start)
    return attend(q, keys[:, :-1], values[:, :-1])


@snippet(step, reason="not a write", rotated=None)
def oldest_token_dropped(q, k, v, kc, vc, freqs, start):
    q, keys, values = append(q, k, v, kc, vc, freqs, start)
    return attend(q, keys[:, 1:], values[:, 1:])


@snippet(step, reason="not a write", rotated=None)
def other_sequences_than_the_written(q, k, v, kc, vc, freqs, start):
    q, _, _ = append(q, k, v, kc, vc, freqs, start)
    end = start + q.shape[1]
    return attend(q, kc[1:, :end], vc[1:, :end])


@snippet(step, reason="as it was before", rotated=None)
def cache_read_before_the_write(q, k, v, kc, vc, freqs, start):
    before = kc[: q.shape[0]].sum()
    return attend(*append(q, k, v, kc, vc, freqs, start)) + before


@snippet(step, reason="before the attention does", rotated=None)
def query_made_from_the_updated_prefix(q, k, v, kc, vc, freqs, start):
    q, keys, values = append(q, k, v, kc, vc, freqs, start)
    return attend(q + keys.mean(), keys, values)
