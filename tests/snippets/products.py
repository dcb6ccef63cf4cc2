"""Attention by products of other orders than [B, H, L, D]: heads behind the length, and heads merged with the batch."""

import torch
import torch.nn.functional as F

from . import FULL, snippet
from .cache import LMAX
from .rope import HKV, ROPE, B, D, H, L, angles, rotate_half, tables_half
from .sdpa import qkv

C = H * D


def heads_behind(kv_len=L):
    return torch.randn(B, L, H, D), torch.randn(B, kv_len, H, D), torch.randn(B, kv_len, H, D)


def by_length(q, k, v, mask=None):
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.finfo(scores.dtype).max)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@snippet(heads_behind)
def einsum_heads_behind_length(q, k, v):
    return by_length(q, k, v)


@snippet(lambda: tuple(t.bfloat16() for t in heads_behind(L + 3)))
def einsum_flash_attention_reference(q, k, v):
    mask = torch.ones(L, L + 3, dtype=torch.bool, device=q.device).tril(3)
    scores = torch.einsum("bthd,bshd->bhts", q, k * D**-0.5).masked_fill(~mask, -torch.inf)
    return torch.einsum("bhts,bshd->bthd", torch.softmax(scores, dim=-1).to(v.dtype), v)


@snippet(heads_behind)
def einsum_with_maximum_taken_off(q, k, v):
    """lucidrains: for half precision"""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@snippet(lambda: (*heads_behind(), torch.arange(L)), grade=ROPE, rotated=True)
def einsum_after_rope(q, k, v, positions):
    cos, sin = (t.unsqueeze(2) for t in tables_half(positions, q))
    q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
    return by_length(q, k, v, torch.ones(L, L, dtype=torch.bool, device=q.device).tril())


def step():
    caches = (torch.randn(B, LMAX, H, D), torch.randn(B, LMAX, H, D))
    return *(torch.randn(B, 3, H, D) for _ in range(3)), *caches, torch.arange(4, 7)


@snippet(step, grade=FULL, rotated=True)
def einsum_over_a_cache(q, k, v, k_cache, v_cache, positions):
    cos, sin = (t.unsqueeze(2) for t in tables_half(positions, q))
    q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
    k_cache[:, positions] = k
    v_cache[:, positions] = v
    return by_length(q, k_cache, v_cache, torch.arange(LMAX, device=q.device) <= positions[:, None])


def sequence_first():
    return torch.randn(L, B, C), torch.randn(L, B, C), torch.randn(L, B, C)


def merged(x):
    """[L, B, C] as [B * H, L, D]"""
    return x.contiguous().view(x.shape[0], -1, D).transpose(0, 1)


@snippet(sequence_first)
def fairseq(q, k, v):
    q, k, v = merged(q), merged(k), merged(v)
    weights = torch.bmm(q * D**-0.5, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).transpose(0, 1).contiguous().view(L, B, C)


@snippet(lambda: (*sequence_first(), torch.arange(L)[None] >= torch.tensor([[L], [L - 2]])), dynamic_grade="")
def fairseq_with_padding(q, k, v, padding):
    """The mask is where the heads are to be seen, as far as their number is one."""
    q, k, v = merged(q), merged(k), merged(v)
    scores = torch.bmm(q * D**-0.5, k.transpose(1, 2)).view(B, H, L, L)
    scores = scores.masked_fill(padding[:, None, None], -torch.inf).view(B * H, L, L)
    return torch.bmm(scores.softmax(-1), v).transpose(0, 1).contiguous().view(L, B, C)


def merged_heads():
    return torch.randn(B * H, L, D), torch.randn(B * H, L, D), torch.randn(B * H, L, D)


@snippet(lambda: (*merged_heads(), torch.randn(B * H, L, L)))
def bmm_of_merged_heads(q, k, v, bias):
    return torch.bmm(torch.baddbmm(bias, q, k.mT, alpha=0.25).softmax(-1), v)


@snippet(lambda: (*merged_heads(), torch.arange(L)[None] < torch.tensor([[L], [L - 2]])))
def einsum_of_merged_heads(q, k, v, keep):
    """Stable Diffusion's first: `(b h) n d`"""
    scores = torch.einsum("b i d, b j d -> b i j", q, k) * D**-0.5
    keep = keep[:, None, None].expand(B, H, 1, L).reshape(B * H, 1, L)
    scores = scores.masked_fill(~keep, -torch.finfo(scores.dtype).max)
    return torch.einsum("b i j, b j d -> b i d", scores.softmax(-1), v)


@snippet(lambda: (torch.randn(L, H, D), torch.randn(L, H, D), torch.randn(L, H, D)))
def einsum_without_a_batch(q, k, v):
    scores = torch.einsum("qhd,khd->hqk", q, k) * D**-0.5
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@snippet(qkv)
def scores_viewed_and_back(q, k, v):
    scores = (q @ k.mT).view(B * H, L, L) * 0.25
    return scores.softmax(-1).view(B, H, L, L) @ v


@snippet(merged_heads)
def product_used_twice(q, k, v):
    out = torch.bmm((torch.bmm(q, k.mT) * 0.25).softmax(-1), v)
    return out.view(B, H, L, D).transpose(1, 2), out + 1


# ---- near misses ----


@snippet(heads_behind, grade=None)
def weights_of_the_keys(q, k, v):
    """As many keys as queries: the weights are turned round."""
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * 0.25).softmax(-1)
    return torch.einsum("bhij,bihd->bjhd", weights, v)


@snippet(merged_heads, grade=None)
def merged_weights_of_the_keys(q, k, v):
    return torch.bmm((torch.bmm(q, k.mT) * 0.25).softmax(-1).mT, v)


@snippet(lambda: (*qkv(heads=H, kv_heads=H), torch.rand(B * H // 2, 1, 1, L)), grade="", reason="scores of [24] heads")
def scores_viewed_as_other_heads(q, k, v, bias):
    scores = ((q @ k.mT) * 0.25).view(B * H // 2, 2, L, L) + bias
    return scores.softmax(-1).view(B, H, L, L) @ v


@snippet(lambda: (torch.randn(B, L, H, D), *qkv(kv_heads=HKV)[1:]), grade=None)
def einsum_of_groups(q, k, v):
    """Grouped heads as a dimension of their own, rows of one product."""
    q = q.view(B, L, HKV, H // HKV, D)
    weights = (torch.einsum("bikgd,bkjd->bkgij", q, k) * 0.25).softmax(-1)
    return torch.einsum("bkgij,bkjd->bikgd", weights, v).reshape(B, L, C)


@snippet(lambda: (*heads_behind(), torch.arange(L)), grade="attention", reason="is not RoPE", rotated=None)
def angles_added_to_heads_behind(q, k, v, positions):
    turned = torch.cat((angles(positions, q), angles(positions, q)), dim=-1).unsqueeze(2)
    return by_length(q + turned, k + turned, v)


@snippet(merged_heads, grade=None)
def log_softmax(q, k, v):
    scores = torch.bmm(q, k.mT) * 0.25
    return torch.bmm(F.log_softmax(scores, dim=-1), v)
