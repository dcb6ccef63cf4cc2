"""FlexAttention with the standard score mods and mask mods, and some that are no mask, bias or soft cap."""

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from . import snippet
from .sdpa import B, D, H, L, grouped, qkv


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


@snippet(qkv)
def plain(q, k, v):
    return flex_attention(q, k, v)


@snippet(grouped)
def causal_grouped(q, k, v):
    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=q.device)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=True, scale=0.3)


@snippet(lambda: qkv(dtype=torch.bfloat16, kv_len=L + 3))
def window_at_the_end(q, k, v):
    offset = k.shape[2] - q.shape[2]

    def window(b, h, q_idx, kv_idx):
        return (q_idx + offset >= kv_idx) & (q_idx + offset - kv_idx < 4)

    mask = create_block_mask(window, None, None, q.shape[2], k.shape[2], device=q.device)
    return flex_attention(q, k, v, block_mask=mask)


@snippet(lambda: (*qkv(), torch.tensor([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 1, 1]])))
def documents(q, k, v, document):
    def same_document(b, h, q_idx, kv_idx):
        return causal(b, h, q_idx, kv_idx) & (document[b, q_idx] == document[b, kv_idx])

    mask = create_block_mask(same_document, B, None, q.shape[2], k.shape[2], device=q.device)
    return flex_attention(q, k, v, block_mask=mask)


@snippet(qkv)
def soft_cap(q, k, v):
    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=q.device)
    return flex_attention(q, k, v, lambda score, b, h, i, j: 20.0 * torch.tanh(score / 20.0), block_mask=mask)


@snippet(lambda: (*qkv(), torch.rand(H)))
def alibi(q, k, v, slopes):
    def bias(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=q.device)
    return flex_attention(q, k, v, bias, block_mask=mask)


@snippet(lambda: (*qkv(), torch.randn(H, L, L)))
def relative_positions_taken_off(q, k, v, table):
    def bias(score, b, h, q_idx, kv_idx):
        return 0.5 * (score - table[h, q_idx, kv_idx])

    return flex_attention(q, k, v, bias)


@snippet(qkv)
def causal_as_a_score_mod(q, k, v):
    def masked(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx >= kv_idx, score, -float("inf"))

    return flex_attention(q, k, v, masked)


@snippet(lambda: (*qkv(), torch.zeros(H, dtype=torch.bool)))
def heads_that_see_nothing(q, k, v, seeing):
    mask = create_block_mask(lambda b, h, i, j: seeing[h] & (i >= j), None, H, q.shape[2], k.shape[2], device=q.device)
    return flex_attention(q, k, v, block_mask=mask)


@snippet(qkv, grade="", reason="in a score mod")
def squared_scores(q, k, v):
    return flex_attention(q, k, v, lambda score, b, h, i, j: score * score)


@snippet(lambda: (*qkv(), torch.rand(H, L)), grade="", reason="in a score mod")
def scores_scaled_by_key(q, k, v, factor):
    return flex_attention(q, k, v, lambda score, b, h, i, j: score * factor[h, j])


@snippet(lambda: (*qkv(), torch.rand(H)), grade="", reason="before the soft cap")
def bias_under_the_soft_cap(q, k, v, slopes):
    return flex_attention(q, k, v, lambda score, b, h, i, j: 20.0 * torch.tanh((score + slopes[h] * j) / 20.0))


@snippet(qkv, grade="", reason="multiplies the score by -1")
def scores_turned_round(q, k, v):
    return flex_attention(q, k, v, lambda score, b, h, i, j: -1.0 * score)


@snippet(qkv)
def log_sum_exp_returned(q, k, v):
    return flex_attention(q, k, v, return_lse=True)


@snippet(grouped)
def log_sum_exp_as_a_gate(q, k, v):
    """GPT-OSS: sinks, from outside"""
    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device=q.device)
    soft_capped = lambda score, b, h, i, j: 20.0 * torch.tanh(score / 20.0)  # noqa: E731
    out, lse = flex_attention(q, k, v, soft_capped, block_mask=mask, enable_gqa=True, return_lse=True)
    return out * torch.sigmoid(lse - 0.3)[..., None].to(out.dtype)


@snippet(lambda: (*qkv(), torch.arange(H) > 0))
def log_sum_exp_of_rows_that_see_nothing(q, k, v, seeing):
    mask = create_block_mask(lambda b, h, i, j: seeing[h] & (i >= j), None, H, q.shape[2], k.shape[2], device=q.device)
    out, lse = flex_attention(q, k, v, block_mask=mask, return_lse=True)
    return out, lse.exp()


@snippet(qkv, grade="", reason="more than its output")
def log_sum_exp_alone(q, k, v):
    return flex_attention(q, k, v, return_lse=True)[1]


def decoding():
    """queries, keys and values of one token, caches, its position"""
    cache = (torch.randn(B, H, 4 * L, D) for _ in range(2))
    return *qkv(q_len=1, kv_len=1), *cache, torch.tensor([7])


@snippet(decoding, grade="append + attention")
def gpt_fast_decode(q, k, v, k_cache, v_cache, position):
    """The mask mod of one row of the whole mask, which the position moves."""
    k_cache[:, :, position] = k
    v_cache[:, :, position] = v

    def at_position(b, h, q_idx, kv_idx):
        return causal(b, h, q_idx + position[0], kv_idx)

    mask = create_block_mask(at_position, None, None, 1, k_cache.shape[2], device=q.device)
    return flex_attention(q, k_cache, v_cache, block_mask=mask)
