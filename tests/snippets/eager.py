"""Attention written out: matmul, scale, mask, softmax, matmul."""

import math

import torch
import torch.nn.functional as F

from . import snippet
from .sdpa import HKV, B, D, H, L, grouped, qkv


def with_mask(dtype=torch.float32):
    mask = torch.where(torch.rand(B, 1, L, L) > 0.3, 0.0, torch.finfo(dtype).min).to(dtype)
    return (*qkv(dtype=dtype), mask)


def wide(x):
    """In float32; in float64 where the reference is computed in that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def repeat_kv(x):
    return x[:, :, None].expand(B, HKV, H // HKV, L, D).reshape(B, H, L, D)


@snippet(with_mask)
def huggingface(q, k, v, mask):
    weights = torch.matmul(q, k.transpose(2, 3)) * D**-0.5 + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


@snippet(lambda: with_mask(torch.bfloat16))
def huggingface_bf16(q, k, v, mask):
    return huggingface(q, k, v, mask)


@snippet(grouped)
def huggingface_grouped(q, k, v):
    weights = F.softmax(torch.matmul(q, repeat_kv(k).transpose(2, 3)) * 0.25, dim=-1)
    return torch.matmul(weights, repeat_kv(v))


@snippet(lambda: with_mask(torch.bfloat16))
def products_in_float32(q, k, v, mask):
    """GPT-J"""
    weights = (wide(q) @ wide(k).mT * 0.25 + mask).softmax(-1)
    return weights.to(v.dtype) @ v


@snippet(lambda: with_mask(torch.bfloat16))
def all_in_float32(q, k, v, mask):
    return (wide(q) @ wide(k).mT * 0.25 + mask).softmax(-1) @ wide(v)


@snippet(lambda: with_mask(torch.bfloat16), grade="", reason="query is torch.float32")
def query_scaled_in_float32(q, k, v, mask):
    """Half precision would round the query after its scale."""
    return ((wide(q) * 0.3) @ wide(k).mT + mask).softmax(-1).to(v.dtype) @ v


@snippet(qkv)
def divided_by_sqrt(q, k, v):
    return ((q @ k.mT) / math.sqrt(D)).softmax(-1) @ v


@snippet(qkv)
def query_scaled_first(q, k, v):
    return ((q * 0.25) @ k.transpose(-1, -2)).softmax(-1) @ v


@snippet(lambda: (*qkv(), torch.ones(L, L, dtype=torch.bool).tril()))
def masked_fill(q, k, v, mask):
    return ((q @ k.mT) * 0.25).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@snippet(with_mask)
def soft_capped(q, k, v, mask):
    scores = torch.tanh((q @ k.mT) * 0.25 / 30.0) * 30.0
    return (scores + mask).softmax(-1) @ v


@snippet(lambda: (torch.randn(B, H, L, D), torch.randn(B, L, H, D), torch.randn(B, H, L, D)))
def key_laid_out_by_length(q, k, v):
    return ((q @ k.permute(0, 2, 3, 1)) * 0.25).softmax(-1) @ v


@snippet(lambda: (*qkv(), torch.rand(H, 1, 1)), grade="", reason="scale is a tensor")
def scale_per_head(q, k, v, scale):
    return ((q @ k.mT) * scale).softmax(-1) @ v


@snippet(qkv, grade="", reason="weights are used elsewhere")
def weights_returned(q, k, v):
    weights = ((q @ k.mT) * 0.25).softmax(-1)
    return weights @ v, weights


@snippet(lambda: (*qkv(), torch.rand(L, L) > 0.3), grade="", reason="set to -10000")
def masked_with_a_small_number(q, k, v, mask):
    return ((q @ k.mT) * 0.25).masked_fill(mask, -1e4).softmax(-1) @ v


@snippet(qkv, grade="", reason="caps|soft cap")
def soft_cap_unbalanced(q, k, v):
    return (torch.tanh((q @ k.mT) / 30.0) * 20.0).softmax(-1) @ v


@snippet(qkv, grade=None)
def softmax_over_queries(q, k, v):
    """Another function altogether, so no site. (Inductor's own SDPA patterns of torch 2.13 take it for one.)"""
    return ((q @ k.mT) * 0.25).softmax(-2) @ v


@snippet(qkv, grade="", reason="not from a product")
def pooling_without_queries(q, k, v):
    return k.mean(-1, keepdim=True).expand(B, H, L, L).mT.softmax(-1) @ v
