"""Static KV caches: written at the positions of the step, then attended to."""

import torch
import torch.nn.functional as F

from . import FULL, snippet
from .rope import D, gpt_fast_rotate, gpt_fast_table, rotate_half, tables_half

B, H, HKV, LMAX = 2, 4, 2, 12
APPEND = "append + attention"


def step(length=3, start=4, batch=B):
    q, k, v = (torch.randn(batch, h, length, D) for h in (H, HKV, HKV))
    caches = (torch.randn(batch, HKV, LMAX, D), torch.randn(batch, HKV, LMAX, D))
    positions = torch.arange(start, start + length)
    mask = (torch.arange(LMAX) <= positions[:, None])[None, None]
    return q, k, v, *caches, positions, mask


def decode():
    return step(1)


def by_length():
    q, k, v, kc, vc, positions, mask = step()
    return (*(t.transpose(1, 2).contiguous() for t in (q, k, v, kc, vc)), positions, mask)


def attend(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def repeat_kv(x):
    return x[:, :, None].expand(*x.shape[:2], H // HKV, *x.shape[2:]).reshape(x.shape[0], H, *x.shape[2:])


@snippet(step, grade=APPEND)
def index_put(q, k, v, kc, vc, positions, mask):
    kc[:, :, positions] = k
    vc[:, :, positions] = v
    return attend(q, kc, vc, mask)


def counted(length):
    return (*step(length)[:5], torch.tensor(4))


@snippet(lambda: counted(1), grade=APPEND)
def counting_cache(q, k, v, kc, vc, count):
    """Hugging Face's StaticCache counts its tokens itself, in a tensor; here one token a step."""
    positions = torch.arange(q.shape[2], device=q.device) + count
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    mask = torch.arange(LMAX, device=q.device) <= positions[:, None]
    out = attend(q, kc, vc, mask)
    count.add_(q.shape[2])
    return out


@snippet(lambda: counted(3), grade=APPEND)
def counting_cache_of_several_tokens(q, k, v, kc, vc, count):
    return counting_cache(q, k, v, kc, vc, count)


@snippet(lambda: step(1, batch=1), grade=APPEND)
def index_put_one_row(q, k, v, kc, vc, positions, mask):
    """Index assignment drops the leading 1 of what it writes."""
    kc[:, :, positions] = k
    vc[:, :, positions] = v
    return attend(q, kc, vc, mask)


@snippet(decode, grade=APPEND)
def index_copy(q, k, v, kc, vc, positions, mask):
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    return attend(q, kc, vc, mask)


@snippet(decode, grade=APPEND)
def index_copy_repeat_kv(q, k, v, kc, vc, positions, mask):
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, repeat_kv(kc), repeat_kv(vc), attn_mask=mask)


@snippet(by_length, grade=APPEND)
def cache_laid_out_by_length(q, k, v, kc, vc, positions, mask):
    kc[:, positions] = k
    vc[:, positions] = v
    return attend(*(t.transpose(1, 2) for t in (q, kc, vc)), mask)


def part_of_larger():
    q, k, v, kc, vc, positions, mask = by_length()
    return q, k, v, torch.cat((kc, kc))[B:], torch.cat((vc, vc))[B:], positions, mask


# A view by heads, whose address torch before 2.13 gets wrong; dynamic=True makes a symbol of where the caches begin.
@snippet(part_of_larger, grade=APPEND if torch.__version__ >= "2.13" else "attention")
def caches_that_begin_inside_others(q, k, v, kc, vc, positions, mask):
    return cache_laid_out_by_length(q, k, v, kc, vc, positions, mask)


def part_of_larger_by_heads():
    q, k, v, kc, vc, positions, mask = step()
    return q, k, v, torch.cat((kc, kc))[B:], torch.cat((vc, vc))[B:], positions, mask


@snippet(part_of_larger_by_heads, grade=APPEND)
def caches_as_they_are_that_begin_inside_others(q, k, v, kc, vc, positions, mask):
    return index_put(q, k, v, kc, vc, positions, mask)


@snippet(step, reason="as it was before the write|shape of the slots|positions for")
def slots_that_are_written_from_the_cache_itself(q, k, v, kc, vc, positions, mask):
    """What a kernel would read while it writes."""
    kc[:, :, positions] = kc[:, :, :3]
    vc[:, :, positions] = v
    return attend(q, kc, vc, mask)


@snippet(step, grade=FULL, rotated=True)
def huggingface(q, k, v, kc, vc, positions, mask):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, repeat_kv(kc), repeat_kv(vc), attn_mask=mask)


@snippet(step, grade=FULL, rotated=True)
def huggingface_eager(q, k, v, kc, vc, positions, mask):
    cos, sin = (t.unsqueeze(1) for t in tables_half(positions, q))
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    scores = torch.matmul(q, repeat_kv(kc).transpose(2, 3)) * D**-0.5
    scores = scores + torch.where(mask, 0.0, torch.finfo(torch.float32).min).to(q.dtype)
    return torch.matmul(scores.softmax(-1), repeat_kv(vc))


# dynamic=True writes through whole slices of the transposed cache, which end in a slice_scatter.
@snippet(by_length, grade=FULL, dynamic_grade="attention")
def gpt_fast(q, k, v, kc, vc, positions, mask):
    freqs = gpt_fast_table(positions, q)
    q, k = gpt_fast_rotate(q, freqs), gpt_fast_rotate(k, freqs)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    kc, vc = kc.transpose(1, 2), vc.transpose(1, 2)
    kc[:, :, positions] = k
    vc[:, :, positions] = v
    return attend(q, kc, vc, mask)


@snippet(step, grade=APPEND)
def cache_read_after(q, k, v, kc, vc, positions, mask):
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    return attend(q, kc, vc, mask), kc.sum(), vc.mean(2)


def slice_step():
    q, k, v, kc, vc, _, mask = step()
    return q, k, v, kc, vc, 4, mask


@snippet(slice_step, grade=APPEND)
def slice_copy(q, k, v, kc, vc, start, mask):
    kc[:, :, start : start + k.shape[2]] = k
    vc[:, :, start : start + k.shape[2]].copy_(v)
    return attend(q, kc, vc, mask)


@snippet(slice_step, reason="different positions")
def slice_copy_to_different_positions(q, k, v, kc, vc, start, mask):
    kc[:, :, start : start + k.shape[2]] = k
    vc[:, :, start + 1 : start + 1 + k.shape[2]] = v
    return attend(q, kc, vc, mask)


@snippet(slice_step, grade=APPEND, dynamic_grade="attention")
def slice_copy_broadcast(q, k, v, kc, vc, start, mask):
    kc[:, :, start : start + 3] = k[:, :, :1]
    vc[:, :, start : start + 3] = v[:, :, :1]
    return attend(q, kc, vc, mask)


@snippet(slice_step, grade=APPEND)
def slice_copy_then_prefix_read(q, k, v, kc, vc, start, mask):
    """Attention over the filled part only."""
    kc[:, :, start : start + k.shape[2]] = k
    vc[:, :, start : start + k.shape[2]] = v
    end = start + k.shape[2]
    return attend(q, kc[:, :, :end], vc[:, :, :end], mask[..., :end])


@snippet(step, reason="negative positions")
def last_slot_by_a_negative_index(q, k, v, kc, vc, positions, mask):
    last = torch.tensor([-1])
    kc[:, :, last] = k[:, :, :1]
    vc[:, :, last] = v[:, :, :1]
    return attend(q[:, :, :1], kc, vc, mask[:, :, :1])


# ---- near misses ----


@snippet(step, reason="as it was before the write")
def cache_read_before_the_write(q, k, v, kc, vc, positions, mask):
    before = kc.sum()
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    return attend(q, kc, vc, mask) + before


@snippet(step, reason="before the attention does")
def query_made_from_the_updated_cache(q, k, v, kc, vc, positions, mask):
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    return attend(q + kc.mean(), kc, vc, mask)


@snippet(lambda: (*step(), torch.arange(5, 8)), reason="different positions")
def key_and_value_at_different_positions(q, k, v, kc, vc, positions, mask, others):
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, others, v)
    return attend(q, kc, vc, mask)


@snippet(step, reason="accumulates")
def accumulated(q, k, v, kc, vc, positions, mask):
    kc.index_put_(
        (torch.arange(B)[:, None], torch.arange(HKV)[None]), kc[:, :, :1].squeeze(2)[:, :, None] * 0, accumulate=True
    )
    vc.index_copy_(2, positions, v)
    return attend(q, kc, vc, mask)


@snippet(step, reason="not stored back")
def cache_updated_out_of_place(q, k, v, kc, vc, positions, mask):
    return attend(q, kc.index_copy(2, positions, k), vc.index_copy(2, positions, v), mask)


@snippet(step, grade="append + attention")
def is_causal_over_a_cache(q, k, v, kc, vc, positions, mask):
    """Query i sees the slots up to i, wherever the new keys go."""
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, kc, vc, is_causal=True, enable_gqa=True)


@snippet(
    lambda: (*step(), torch.randn(B, H, 2, D), torch.ones(1, 1, 2, LMAX, dtype=torch.bool)), reason="positions for"
)
def other_queries_than_new_keys(q, k, v, kc, vc, positions, mask, others, keep):
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    return attend(others, kc, vc, keep)


@snippet(step, reason="one cache|as it was")
def keys_are_values(q, k, v, kc, vc, positions, mask):
    kc.index_copy_(2, positions, k)
    return attend(q, kc, kc, mask)


@snippet(lambda: step(4), reason="not a write")
def concatenated(q, k, v, kc, vc, positions, mask):
    """A cache that grows: `DynamicCache`."""
    k, v = torch.cat((kc, k), dim=2), torch.cat((vc, v), dim=2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True), k, v
