"""Pieces that several references share: what attention and rotary embedding *are*, in plain torch, for any dtype."""

from __future__ import annotations

import math

import torch

LOG2E = math.log2(math.e)


def accumulate_dtype(t: torch.Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def dequantised(t: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """`t [batch or tokens, heads, ...]` times its scale, one or one a head, in `dtype`."""
    if scale is None:
        return t.to(dtype)
    wide = accumulate_dtype(t)
    return (t.to(wide) * scale.to(wide).view(1, -1, *(1,) * (t.dim() - 2))).to(dtype)


def attend(
    query,
    key,
    value,
    mask,
    positions,
    causal,
    window_left,
    scale,
    logits_soft_cap,
    alibi_slopes,
    sinks,
    weights_dtype=None,
):
    """The definition of attention: (output, LSE base 2). `positions` `[batch or 1, qo_len]` places the query rows.

    `weights_dtype`: the 8-bit one to which 256 times the weights are rounded before they meet the values; not in float64.
    Arguments otherwise as `fi::attention` (see `attention.py`).
    """
    dtype = accumulate_dtype(query)
    group = query.shape[1] // max(key.shape[1], 1)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if logits_soft_cap > 0:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    distance = torch.arange(key.shape[2], device=query.device) - positions[:, None, :, None].to(
        query.device
    )  # j - position
    if alibi_slopes is not None:
        logits = logits + alibi_slopes.to(dtype)[:, None, None] * distance
    excluded = torch.zeros((), dtype=torch.bool, device=query.device)
    if causal:
        excluded = excluded | (distance > 0)
    if window_left >= 0:
        excluded = excluded | (distance < -window_left)
    if mask is not None and mask.dtype == torch.bool:
        excluded = excluded | ~mask
    elif mask is not None:
        logits = logits + mask.to(dtype)
    logits = logits.masked_fill(excluded, -math.inf)

    top = logits.amax(-1, keepdim=True) if key.shape[2] else logits.new_full((*logits.shape[:-1], 1), -math.inf)
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None]
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -math.inf, 0)
    weights = torch.exp(logits - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    if weights_dtype is not None and dtype != torch.float64:
        weights = (weights * 256).to(weights_dtype).to(dtype) / 256
    output = (weights @ v) / total.masked_fill(total == 0, 1)
    lse = (torch.log2(total) + top * LOG2E).squeeze(-1)
    return output.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, rotary_dim: int) -> torch.Tensor:
    """RoPE on `x [batch, heads, len, head_dim]` by `cos`, `sin` `[batch or 1, len, R or 2R]`, 2R = rotary_dim (0: head_dim).

    Pairs (a, b) are (i, i + R) (rotate-half, NeoX) or (2i, 2i + 1) (interleaved, GPT-J) and become (a cos - b sin, b cos + a sin);
    a table R wide has one value a pair, a table 2R wide one for each element. Products in float32 (float64 for float64),
    rounded once to x's dtype.
    """
    dtype = accumulate_dtype(x)
    r = (rotary_dim or x.shape[-1]) // 2
    if cos.shape[-1] == r:
        cos, sin = (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    rotary, rest = x[..., : 2 * r].to(dtype), x[..., 2 * r :]
    a, b = (rotary[..., ::2], rotary[..., 1::2]) if interleaved else (rotary[..., :r], rotary[..., r:])
    partner = torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)
    turned = rotary * cos.to(dtype)[:, None] + partner * sin.to(dtype)[:, None]
    return torch.cat((turned.to(x.dtype), rest), -1)
