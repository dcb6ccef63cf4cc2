"""`F.scaled_dot_product_attention` in all its forms."""

import torch
import torch.nn.functional as F

from . import snippet

B, H, HKV, L, D = 2, 4, 2, 6, 16


def qkv(heads=H, kv_heads=H, q_len=L, kv_len=L, dim=D, dtype=torch.float32):
    return (
        torch.randn(B, heads, q_len, dim, dtype=dtype),
        torch.randn(B, kv_heads, kv_len, dim, dtype=dtype),
        torch.randn(B, kv_heads, kv_len, dim, dtype=dtype),
    )


def grouped():
    return qkv(kv_heads=HKV)


def masked():
    return (*qkv(), torch.rand(L, L) > 0.3)


@snippet(qkv)
def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@snippet(lambda: qkv(dtype=torch.bfloat16))
def plain_bf16(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@snippet(lambda: qkv(q_len=3))
def causal_is_top_left(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@snippet(qkv)
def scale_given(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=0.3)


@snippet(masked)
def bool_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@snippet(lambda: (*qkv(), torch.zeros(L, L, dtype=torch.bool)))
def fully_masked_rows(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@snippet(lambda: (*qkv(), torch.randn(B, 1, L, L)))
def additive_mask(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@snippet(lambda: (*qkv(), torch.rand(B, L) > 0.3))
def key_padding_mask(q, k, v, keep):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :].expand(B, 1, L, L))


@snippet(lambda: (*qkv(), torch.rand(L, L) > 0.3))
def mask_transposed(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.t())


@snippet(grouped)
def enable_gqa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@snippet(grouped)
def repeat_kv_expand_reshape(q, k, v):
    k = k[:, :, None].expand(B, HKV, H // HKV, L, D).reshape(B, H, L, D)
    v = v[:, :, None].expand(B, HKV, H // HKV, L, D).reshape(B, H, L, D)
    return F.scaled_dot_product_attention(q, k, v)


@snippet(grouped)
def repeat_kv_interleave(q, k, v):
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


@snippet(grouped)
def repeat_kv_before_transpose(q, k, v):
    k, v = (t.transpose(1, 2).repeat_interleave(2, dim=2).transpose(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


@snippet(grouped)
def heads_tiled_not_repeated(q, k, v):
    """`repeat` puts heads in another order than grouped attention reads them: they must stay repeated."""
    return F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))


@snippet(lambda: (*qkv(), torch.rand(L, L) > 0.3))
def two_layers(q, k, v, mask):
    h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.scaled_dot_product_attention(h, k, v, attn_mask=mask).transpose(1, 2).reshape(B, L, H * D)


@snippet(qkv)
def output_viewed_heads_first(q, k, v):
    """A view of stock's output that is none of ours: the op's output is laid out as [B, L, H, D]."""
    return F.scaled_dot_product_attention(q, k, v, scale=0.2).reshape(B * H, L, D) + 1


@snippet(lambda: qkv(dtype=torch.float64), grade="", reason="float64")
def double_precision(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@snippet(lambda: tuple(t[0] for t in qkv()), grade="", reason="3 dimensions")
def without_batch(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@snippet(lambda: (*qkv()[:2], torch.randn(B, H, D, L)), grade="", reason="value has stride")
def value_not_contiguous(q, k, v):
    return F.scaled_dot_product_attention(q, k, v.transpose(2, 3))


@snippet(lambda: (torch.randn(1, H, L, D), *qkv()[1:]), grade="", reason="batch")
def query_broadcast_over_batch(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@snippet(qkv, grade="", reason="autocast")
def under_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v)
