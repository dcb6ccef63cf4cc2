"""Attention without RoPE as nanoGPT, x-transformers and torch.nn write it."""

import math

import torch
import torch.nn.functional as F

from . import snippet
from .eager import wide
from .sdpa import B, D, H, L, qkv

C = H * D


def hidden(dtype=torch.float32):
    return (torch.randn(B, L, 3 * C, dtype=dtype),)


def split(x):
    batch, length, _ = x.shape
    return (t.view(batch, length, H, D).transpose(1, 2) for t in x.split(C, dim=2))


@snippet(hidden)
def nanogpt(x):
    q, k, v = split(x)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
    return y.transpose(1, 2).contiguous().view(B, -1, C)


def with_triangle():
    return *hidden(), torch.tril(torch.ones(2 * L, 2 * L)).view(1, 1, 2 * L, 2 * L)


@snippet(with_triangle)
def nanogpt_written_out(x, triangle):
    q, k, v = split(x)
    att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    att = att.masked_fill(triangle[:, :, :L, :L] == 0, float("-inf"))
    y = F.dropout(F.softmax(att, dim=-1), 0.1, training=False) @ v
    return y.transpose(1, 2).contiguous().view(B, -1, C)


@snippet(with_triangle, grade="", reason="set to 0")
def masked_after_the_softmax_instead(x, triangle):
    q, k, v = split(x)
    att = ((q @ k.mT) * 0.25).masked_fill(triangle[:, :, :L, :L] == 0, 0.0)
    return F.softmax(att, dim=-1) @ v


def masked():
    return *qkv(), torch.rand(B, L) > 0.2


def einsum_attention(q, k, v, keep, causal=True):
    """x-transformers: 'b h i d, b h j d -> b h i j', masks set to the lowest number of the dtype."""
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * D**-0.5
    lowest = -torch.finfo(scores.dtype).max
    scores = scores.masked_fill(~keep[:, None, None, :], lowest)
    if causal:
        rows, columns = scores.shape[-2:]
        above = torch.ones((rows, columns), dtype=torch.bool, device=q.device).triu(columns - rows + 1)
        scores = scores.masked_fill(above, lowest)
    weights = scores.softmax(dim=-1, dtype=wide(scores).dtype).type_as(scores)
    return torch.einsum("b h i j, b h j d -> b h i d", weights, v)


@snippet(masked)
def einsum(q, k, v, keep):
    return einsum_attention(q, k, v, keep).permute(0, 2, 1, 3).reshape(B, L, C)


@snippet(lambda: (*qkv(dtype=torch.bfloat16), torch.rand(B, L) > 0.2))
def einsum_bf16(q, k, v, keep):
    return einsum_attention(q, k, v, keep, causal=False)


@snippet(lambda: (*hidden(), torch.rand(B, L) > 0.2))
def einsum_by_length(x, keep):
    """Heads where a projection leaves them."""
    q, k, v = (t.view(B, L, H, D) for t in x.chunk(3, dim=-1))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    scores = scores.masked_fill(~keep[:, None, None, :], -torch.inf)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(B, L, C)


@snippet(lambda: (torch.randn(B, H, L, D), torch.randn(B, L, D), torch.randn(B, L, D)), grade=None)
def einsum_of_one_kv_head(q, k, v):
    """x-transformers' `one_kv_head`: heads are rows of one product."""
    scores = torch.einsum("b h i d, b j d -> b h i j", q, k) * D**-0.5
    return torch.einsum("b h i j, b j d -> b h i d", scores.softmax(-1), v)


@snippet(lambda: qkv(q_len=D, kv_len=D))
def einsum_of_keys_over_queries(q, k, v):
    """As many queries as keys, and their roles exchanged: attention of the keys."""
    scores = torch.einsum("bhid,bhjd->bhji", q, k) * 0.25
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


@snippet(lambda: qkv(q_len=D, kv_len=D), grade=None)
def einsum_to_columns(q, k, v):
    """As many queries as columns of a head, so that shapes tell nothing: the values are multiplied by the weights."""
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.25).softmax(-1)
    return torch.einsum("bhij,bhjd->bhdi", weights, v)


@snippet(qkv, grade="", reason="weights are used elsewhere")
def einsum_with_talking_weights(q, k, v):
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.25).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v), weights.mean(1)


@snippet(lambda: (*qkv(), torch.randn(H, H)), grade=None)
def talking_heads(q, k, v, mix):
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * 0.25).softmax(-1)
    weights = torch.einsum("bhij,hg->bgij", weights, mix)
    return torch.einsum("bhij,bhjd->bhid", weights, v)
