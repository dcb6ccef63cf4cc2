"""RoPE in front of attention: rotate-half and interleaved, whole and partial, and what only looks like it."""

import torch
import torch.nn.functional as F

from . import snippet

B, H, HKV, L, D = 2, 4, 2, 6, 16
ROPE = "rope + attention"


def qkv_positions():
    return torch.randn(B, H, L, D), torch.randn(B, HKV, L, D), torch.randn(B, HKV, L, D), torch.arange(3, 3 + L)


def by_length():
    return torch.randn(B, L, H, D), torch.randn(B, L, HKV, D), torch.randn(B, L, HKV, D), torch.arange(3, 3 + L)


def angles(positions, like, dim=D):
    frequencies = 100.0 ** (-torch.arange(0, dim, 2, device=like.device).to(like.dtype) / dim)
    return positions[None, :, None].to(like.dtype) * frequencies


def tables_half(positions, like, dim=D):
    """Hugging Face: [1, L, D], the second half repeats the first."""
    embedding = torch.cat((angles(positions, like, dim),) * 2, dim=-1)
    return embedding.cos() * 1.0, embedding.sin() * 1.0


def tables_pairs(positions, like, dim=D):
    """GPT-J: [1, L, D], every value twice."""
    embedding = torch.repeat_interleave(angles(positions, like, dim), 2, dim=-1)
    return embedding.cos(), embedding.sin()


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_every_two(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@snippet(qkv_positions, grade=ROPE, rotated=True)
def huggingface(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    return attend(q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v)


def in_bfloat16():
    return *(t.bfloat16() for t in qkv_positions()[:3]), torch.arange(3, 3 + L)


def normed(x):
    """In float32; in float64 where the reference is computed in that."""
    return F.rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), (D,))


@snippet(in_bfloat16, grade=ROPE, rotated=True)
def normed_in_float32_and_rounded(q, k, v, positions):
    """Gemma 3: what is rotated is the cast's result, not what was cast."""
    cos, sin = (t.unsqueeze(1).to(q.dtype) for t in tables_half(positions, q))
    q, k = normed(q).type_as(q), normed(k).type_as(k)
    return attend(q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v)


@snippet(in_bfloat16, reason="rotates torch.float32 to torch.bfloat16", rotated=None)
def normed_and_rotated_in_float32(q, k, v, positions):
    """Rounded once, after both."""
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, normed(q)))
    wide_q, wide_k = normed(q), normed(k)
    q, k = (x * cos + rotate_half(x) * sin for x in (wide_q, wide_k))
    return attend(q.type_as(v), k.type_as(v), v)


@snippet(by_length, grade=ROPE, rotated=True)
def rotated_before_transpose(q, k, v, positions):
    cos, sin = (t.unsqueeze(2) for t in tables_half(positions, q))
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    return attend(*(t.transpose(1, 2) for t in (q, k, v)))


@snippet(qkv_positions, grade=ROPE, rotated=True)
def gptj_every_two(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in tables_pairs(positions, q))
    return attend(q * cos + rotate_every_two(q) * sin, k * cos + rotate_every_two(k) * sin, v)


@snippet(qkv_positions, grade=ROPE, rotated=True)
def gpt_oss_half_tables(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in (angles(positions, q).cos(), angles(positions, q).sin()))

    def rotate(x):
        a, b = torch.chunk(x, 2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    return attend(rotate(q), rotate(k), v)


def gpt_fast_rotate(x, freqs):
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    freqs = freqs.view(1, pairs.size(1), 1, pairs.size(3), 2)
    a, b = pairs[..., 0], pairs[..., 1]
    out = torch.stack([a * freqs[..., 0] - b * freqs[..., 1], b * freqs[..., 0] + a * freqs[..., 1]], -1)
    return out.flatten(3)


def gpt_fast_table(positions, like):
    return torch.stack((angles(positions, like)[0].cos(), angles(positions, like)[0].sin()), dim=-1)


@snippet(by_length, grade=ROPE, rotated=True)
def gpt_fast(q, k, v, positions):
    freqs = gpt_fast_table(positions, q)
    return attend(*(t.transpose(1, 2) for t in (gpt_fast_rotate(q, freqs), gpt_fast_rotate(k, freqs), v)))


@snippet(qkv_positions, grade=ROPE, rotated=True)
def partial_rotary(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q, 8))

    def rotate(x):
        turned, rest = x[..., :8], x[..., 8:]
        return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)

    return attend(rotate(q), rotate(k), v)


@snippet(qkv_positions, grade=ROPE, rotated=True)
def halves_of_cos_differ(q, k, v, positions):
    """Not a rotation, but what the ops do with tables of the full width."""
    base = angles(positions, q)
    table = torch.cat((base.cos(), base.sin()), dim=-1).unsqueeze(1)
    sin = tables_half(positions, q)[1].unsqueeze(1)
    return attend(q * table + rotate_half(q) * sin, k * table + rotate_half(k) * sin, v)


def qkv_tables():
    return *qkv_positions()[:3], torch.rand(1, 1, L, D), torch.rand(1, 1, L, D)


@snippet(qkv_tables, grade=ROPE, rotated=True)
def tables_given(q, k, v, cos, sin):
    """Nothing says what is in them."""
    return attend(q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v)


@snippet(qkv_tables, grade=ROPE, rotated=True)
def tables_given_interleaved(q, k, v, cos, sin):
    return attend(q * cos + rotate_every_two(q) * sin, k * cos + rotate_every_two(k) * sin, v)


@snippet(lambda: (*qkv_positions()[:3], torch.rand(L, 8), torch.rand(L, 8)), grade=ROPE, rotated=True)
def tables_given_for_part_of_the_head(q, k, v, cos, sin):
    def rotate(x):
        turned, rest = x[..., :8], x[..., 8:]
        return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)

    return attend(rotate(q), rotate(k), v)


# ---- near misses: attention alone ----


@snippet(qkv_positions, reason="cos of the key|sin of the key", rotated=False)
def cos_and_sin_swapped_for_the_key(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    return attend(q * cos + rotate_half(q) * sin, k * sin + rotate_half(k) * cos, v)


@snippet(qkv_positions, reason="is not RoPE", rotated=None)
def rotated_the_other_way(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    return attend(q * cos - rotate_half(q) * sin, k * cos - rotate_half(k) * sin, v)


@snippet(qkv_positions, reason="which .* rotates", rotated=None)
def another_tensor_is_rotated(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    return attend(q * cos + rotate_half(q + 1) * sin, k * cos + rotate_half(k) * sin, v)


@snippet(qkv_positions, reason="is not RoPE", rotated=False)
def only_the_query_is_rotated(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    return attend(q * cos + rotate_half(q) * sin, k, v)


@snippet(qkv_positions, reason="reads the rotated query too", rotated=False)
def rotated_query_is_returned(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    q = q * cos + rotate_half(q) * sin
    return attend(q, k * cos + rotate_half(k) * sin, v), q


@snippet(qkv_positions, reason="reads the rotated key too", rotated=False)
def rotated_key_is_returned(q, k, v, positions):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    k = k * cos + rotate_half(k) * sin
    return attend(q * cos + rotate_half(q) * sin, k, v), k


@snippet(
    lambda: (*qkv_tables()[:3], torch.rand(1, H, L, D), torch.rand(1, 1, L, D)), reason="between heads", rotated=None
)
def tables_of_each_head(q, k, v, cos, sin):
    return attend(q * cos + rotate_half(q) * sin, k * cos[:, :HKV] + rotate_half(k) * sin, v)


@snippet(by_length, reason="other way round", rotated=None)
def explicit_with_cos_and_sin_swapped(q, k, v, positions):
    freqs = gpt_fast_table(positions, q)

    def rotate(x):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        cos, sin = (freqs.view(1, L, 1, D // 2, 2)[..., i] for i in (0, 1))
        a, b = pairs[..., 0], pairs[..., 1]
        return torch.stack([a * cos - b * sin, b * sin + a * cos], -1).flatten(3)

    return attend(*(t.transpose(1, 2) for t in (rotate(q), rotate(k), v)))
