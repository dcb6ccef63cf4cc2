"""Caches that no op appends to: what they hold is not what is attended to, or not where an op would look for it. The write is left
as it is, and the attention over what the model makes of the cache is still one op."""

import torch

from . import snippet
from .cache import HKV, LMAX, B, H, attend, step
from .rope import D

PAGE = 4


def holding(dtype):
    def inputs():
        q, k, v, kc, vc, positions, mask = step()
        return q, k, v, kc.to(dtype), vc.to(dtype), positions, mask

    return inputs


def quantised():
    q, k, v, kc, vc, positions, mask = step()
    kc, vc = ((cache * 50).round().to(torch.int8) for cache in (kc, vc))
    scales = ((torch.rand(B, HKV, LMAX, 1) + 0.5) / 50 for _ in range(2))  # logits of ordinary size
    return q, k, v, kc, vc, *scales, positions, mask


@snippet(quantised, reason="no append: .*is not a write to a static cache")
def int8_with_scales(q, k, v, kc, vc, k_scales, v_scales, positions, mask):
    """One scale a token and head, as gpt-fast quantises its cache."""
    attended = []
    for cache, scales, new in ((kc, k_scales, k), (vc, v_scales, v)):
        scale = new.abs().amax(-1, keepdim=True) / 127
        cache[:, :, positions] = (new / scale).round().to(torch.int8)
        scales[:, :, positions] = scale
        attended.append(cache.to(q.dtype) * scales)
    return attend(q, *attended, mask)


@snippet(quantised, reason="no append: .*is not a write to a static cache")
def the_last_tokens_unquantised(q, k, v, kc, vc, k_scales, v_scales, positions, mask):
    """Old tokens as int8, new ones as they are behind them, as Hugging Face's QuantizedCache has them."""
    k, v = torch.cat((kc * k_scales, k), 2), torch.cat((vc * v_scales, v), 2)
    return attend(q, k, v, torch.nn.functional.pad(mask, (0, 3), value=True))


@snippet(holding(torch.float8_e4m3fn), reason="no append: .*is not a write to a static cache")
def float8(q, k, v, kc, vc, positions, mask):
    kc[:, :, 4:7] = k.to(kc.dtype)
    vc[:, :, 4:7] = v.to(vc.dtype)
    return attend(q, kc.to(q.dtype), vc.to(q.dtype), mask)


@snippet(holding(torch.bfloat16), reason="no append: .*is not a write to a static cache")
def narrower_than_the_query(q, k, v, kc, vc, positions, mask):
    kc, vc = (cache.to(torch.bfloat16) for cache in (kc, vc))
    kc[:, :, positions] = k.to(kc.dtype)
    vc[:, :, positions] = v.to(vc.dtype)
    return attend(q, kc.to(q.dtype), vc.to(q.dtype), mask)


def pages():
    q, k, v, *_, positions, mask = step()
    caches = (torch.randn(B * LMAX, HKV, D) for _ in range(2))
    slots = torch.arange(B * LMAX).view(B, -1, PAGE).flip(1).reshape(B, LMAX)
    return q, k, v, *caches, slots, positions, mask


@snippet(pages, reason="no append: .*is not a write to a static cache")
def paged(q, k, v, kc, vc, slots, positions, mask):
    """Written and read by a table of slots, as vLLM's caches are."""
    for cache, new in ((kc, k), (vc, v)):
        cache[slots[:, positions].flatten()] = new.transpose(1, 2).reshape(-1, HKV, D)
    return attend(q, *(cache[slots].transpose(1, 2) for cache in (kc, vc)), mask)


@snippet(step, reason="no append: .*may count from the end")
def rolled(q, k, v, kc, vc, positions, mask):
    """A window that moves on by as many slots as there are new tokens."""
    for cache, new in ((kc, k), (vc, v)):
        cache.copy_(torch.roll(cache, -3, 2))
        cache[:, :, -3:] = new
    return attend(q, kc, vc, mask)


def transposed_keys():
    q, k, v, kc, vc, positions, mask = step()
    return q, k, v, kc.transpose(2, 3).contiguous(), vc, positions, mask


@snippet(transposed_keys, grade="", reason="query heads|stride")
def keys_by_head_dim(q, k, v, kc, vc, positions, mask):
    """[B, H, D, L], so that the product needs no transpose: the ops read keys by rows."""
    kc[:, :, :, positions] = k.transpose(2, 3)
    vc[:, :, positions] = v
    keys, values = (x[:, :, None].expand(-1, -1, H // HKV, -1, -1).flatten(1, 2) for x in (kc, vc))
    scores = (q @ keys) * D**-0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values


def by_token():
    q, k, v, kc, vc, positions, mask = step()
    return q, k, v, *(cache.permute(2, 0, 1, 3).contiguous() for cache in (kc, vc)), positions, mask


@snippet(by_token, reason="no append")
def tokens_first(q, k, v, kc, vc, positions, mask):
    """[L, B, H, D]"""
    kc[positions], vc[positions] = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
    return attend(q, kc.permute(1, 2, 0, 3), vc.permute(1, 2, 0, 3), mask)
