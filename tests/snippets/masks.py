"""Biases, masks and sinks as eager code applies them: several at a site, under the scale, in `baddbmm`."""

import torch

from . import snippet
from .sdpa import B, D, H, L, qkv

LOWEST = torch.finfo(torch.float32).min


def biased():
    """queries, keys, values; a bias per head (T5, ALiBi); a causal mask of numbers"""
    return *qkv(), torch.randn(1, H, L, L), torch.full((L, L), LOWEST).triu(1)


def with_sinks(dtype=torch.float32):
    q, k, v = qkv(dtype=dtype)
    return q, k, v, torch.randn(H, dtype=dtype)


def merged(t):
    return t.reshape(B * H, *t.shape[2:])


@snippet(biased)
def position_bias_and_mask(q, k, v, bias, mask):
    return (q @ k.mT + bias + mask).softmax(-1) @ v


@snippet(biased)
def bias_under_the_scale(q, k, v, bias, mask):
    return ((q @ k.mT + bias) * 0.25 + mask).softmax(-1) @ v


@snippet(biased)
def bias_and_lowest_number(q, k, v, bias, mask):
    """MPT; the first row keeps nothing, so it is the mean of all values."""
    keep = (mask == 0) & (torch.arange(L, device=q.device) > 0)[:, None]
    return ((q @ k.mT) * 0.25 + bias[0]).masked_fill(~keep, LOWEST).softmax(-1) @ v


@snippet(biased)
def lowest_number_as_a_tensor(q, k, v, bias, mask):
    """GPT-Neo"""
    return torch.where(mask == 0, q @ k.mT, torch.tensor(LOWEST, dtype=q.dtype)).softmax(-1) @ v


@snippet(biased)
def bias_and_never(q, k, v, bias, mask):
    return torch.where(mask == 0, (q @ k.mT) * 0.25 + bias, -torch.inf).softmax(-1) @ v


@snippet(lambda: (*qkv(), torch.randn(B * H, 1, L)), dynamic_grade="")
def baddbmm_with_bias(q, k, v, bias):
    """BLOOM"""
    scores = torch.baddbmm(bias, merged(q), merged(k).transpose(1, 2), beta=0.5, alpha=0.25)
    return (scores.view(B, H, L, L).softmax(-1).view(B * H, L, L) @ merged(v)).view(B, H, L, D)


@snippet(lambda: (*qkv(), torch.zeros(1)), dynamic_grade="")
def baddbmm_without_bias(q, k, v, nothing):
    scores = torch.baddbmm(nothing, merged(q), merged(k).transpose(1, 2), beta=0, alpha=0.25)
    return (scores.view(B, H, L, L).softmax(-1).view(B * H, L, L) @ merged(v)).view(B, H, L, D)


def _attend_with_sinks(q, k, v, sinks, mask=None):
    """GPT-OSS"""
    scores = (q @ k.mT) * 0.25
    logits = torch.cat([scores if mask is None else scores + mask, sinks], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return logits.softmax(-1)[..., :-1] @ v


@snippet(with_sinks)
def sinks(q, k, v, sinks):
    return _attend_with_sinks(q, k, v, sinks.reshape(1, -1, 1, 1).expand(B, -1, L, -1))


@snippet(lambda: with_sinks(torch.bfloat16))
def sinks_bf16(q, k, v, sinks):
    mask = torch.full((L, L), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    return _attend_with_sinks(q, k, v, sinks.reshape(1, -1, 1, 1).expand(B, -1, L, -1), mask)


@snippet(lambda: (*qkv(), torch.randn(B, H, L, 1)), grade="", reason="not one number for each of")
def sinks_of_each_row(q, k, v, sinks):
    return _attend_with_sinks(q, k, v, sinks)


@snippet(with_sinks, grade="", reason="scores come from aten.sub")
def scores_shifted_against_sinks(q, k, v, sinks):
    scores = (q @ k.mT) * 0.25
    scores = scores - scores.amax(-1, keepdim=True)
    return torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(B, -1, L, -1)], -1).softmax(-1)[..., :-1] @ v


@snippet(lambda: (*qkv(), torch.randn(1, H, 1, 1)), grade=None)
def sinks_in_front(q, k, v, sinks):
    """Not the column that is dropped: weights and values are shifted against each other."""
    logits = torch.cat([sinks.expand(B, -1, L, -1), (q @ k.mT) * 0.25], dim=-1)
    return logits.softmax(-1)[..., 1:] @ v


@snippet(
    lambda: (*qkv(kv_len=L + 1)[:2], torch.randn(B, H, L, D)), grade="", reason="dropped, and it is not that of sinks"
)
def last_key_dropped(q, k, v):
    return ((q @ k.mT) * 0.25).softmax(-1)[..., :-1] @ v


@snippet(biased, grade="", reason="before the soft cap")
def bias_under_the_soft_cap(q, k, v, bias, mask):
    return (torch.tanh((q @ k.mT + bias) / 30.0) * 30.0 + mask).softmax(-1) @ v


@snippet(biased, grade="", reason="and then scaled")
def lowest_number_under_the_scale(q, k, v, bias, mask):
    return ((q @ k.mT).masked_fill(mask != 0, LOWEST) * 0.25).softmax(-1) @ v


@snippet(biased, grade="", reason="which operand is the mask")
def bias_of_the_query(q, k, v, bias, mask):
    """Relative positions by a product with the query."""
    relative = bias.repeat(1, 1, 1, D)[..., :D]
    return (q @ k.mT + q @ relative.mT).softmax(-1) @ v
