"""A small transformer with multi-head latent attention as DeepSeek's own inference code spells it, in both of its forms.

"naive" keeps keys and values of each head in its caches, "absorb" the compressed ones, and attends to those. Caches are buffers
for `MAX_BATCH` sequences of `MAX_SEQ` tokens, written at `[:batch, start_pos:end_pos]` and read at `[:batch, :end_pos]`, where
`start_pos` is an int.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

MAX_BATCH, MAX_SEQ, VOCAB, DIM = 3, 24, 32, 48
N_HEADS, QK_NOPE_HEAD_DIM, QK_ROPE_HEAD_DIM, V_HEAD_DIM, KV_LORA_RANK, Q_LORA_RANK = 4, 16, 8, 12, 32, 24
QK_HEAD_DIM = QK_NOPE_HEAD_DIM + QK_ROPE_HEAD_DIM


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is done in float32 there; in float64 where the model is."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


def apply_rotary_emb(x, freqs_cis):
    """x [batch, tokens, heads, D]; neighbours are a pair."""
    pairs = torch.view_as_complex(x.to(wide(x.dtype)).view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis.view(1, x.size(1), 1, -1)).flatten(3).to(x.dtype)


class MLA(nn.Module):
    def __init__(self, attn_impl: str):
        super().__init__()
        self.attn_impl, self.softmax_scale = attn_impl, QK_HEAD_DIM**-0.5
        self.wq_a, self.q_norm = nn.Linear(DIM, Q_LORA_RANK, bias=False), RMSNorm(Q_LORA_RANK)
        self.wq_b = nn.Linear(Q_LORA_RANK, N_HEADS * QK_HEAD_DIM, bias=False)
        self.wkv_a, self.kv_norm = nn.Linear(DIM, KV_LORA_RANK + QK_ROPE_HEAD_DIM, bias=False), RMSNorm(KV_LORA_RANK)
        self.wkv_b = nn.Linear(KV_LORA_RANK, N_HEADS * (QK_NOPE_HEAD_DIM + V_HEAD_DIM), bias=False)
        self.wo = nn.Linear(N_HEADS * V_HEAD_DIM, DIM, bias=False)
        caches = {"kv_cache": (KV_LORA_RANK,), "pe_cache": (QK_ROPE_HEAD_DIM,)}
        if attn_impl == "naive":
            caches = {"k_cache": (N_HEADS, QK_HEAD_DIM), "v_cache": (N_HEADS, V_HEAD_DIM)}
        for name, sizes in caches.items():
            self.register_buffer(name, torch.zeros(MAX_BATCH, MAX_SEQ, *sizes), persistent=False)

    def forward(self, x, start_pos, freqs_cis, mask):
        bsz, seqlen, _ = x.size()
        end_pos = start_pos + seqlen
        q = self.wq_b(self.q_norm(self.wq_a(x))).view(bsz, seqlen, N_HEADS, QK_HEAD_DIM)
        q_nope, q_pe = torch.split(q, [QK_NOPE_HEAD_DIM, QK_ROPE_HEAD_DIM], dim=-1)
        q_pe = apply_rotary_emb(q_pe, freqs_cis)
        kv, k_pe = torch.split(self.wkv_a(x), [KV_LORA_RANK, QK_ROPE_HEAD_DIM], dim=-1)
        kv, k_pe = self.kv_norm(kv), apply_rotary_emb(k_pe.unsqueeze(2), freqs_cis)
        if self.attn_impl == "naive":
            kv = self.wkv_b(kv).view(bsz, seqlen, N_HEADS, QK_NOPE_HEAD_DIM + V_HEAD_DIM)
            k_nope, v = torch.split(kv, [QK_NOPE_HEAD_DIM, V_HEAD_DIM], dim=-1)
            self.k_cache[:bsz, start_pos:end_pos] = torch.cat([k_nope, k_pe.expand(-1, -1, N_HEADS, -1)], dim=-1)
            self.v_cache[:bsz, start_pos:end_pos] = v
            q = torch.cat([q_nope, q_pe], dim=-1)
            scores = torch.einsum("bshd,bthd->bsht", q, self.k_cache[:bsz, :end_pos]) * self.softmax_scale
        else:
            wkv_b = self.wkv_b.weight.view(N_HEADS, -1, KV_LORA_RANK)
            q_nope = torch.einsum("bshd,hdc->bshc", q_nope, wkv_b[:, :QK_NOPE_HEAD_DIM])
            self.kv_cache[:bsz, start_pos:end_pos] = kv
            self.pe_cache[:bsz, start_pos:end_pos] = k_pe.squeeze(2)
            scores = torch.einsum("bshc,btc->bsht", q_nope, self.kv_cache[:bsz, :end_pos])
            scores = scores + torch.einsum("bshr,btr->bsht", q_pe, self.pe_cache[:bsz, :end_pos])
            scores = scores * self.softmax_scale
        if mask is not None:
            scores += mask.unsqueeze(1)
        scores = scores.softmax(dim=-1, dtype=wide(x.dtype)).type_as(x)
        if self.attn_impl == "naive":
            x = torch.einsum("bsht,bthd->bshd", scores, self.v_cache[:bsz, :end_pos])
        else:
            x = torch.einsum("bsht,btc->bshc", scores, self.kv_cache[:bsz, :end_pos])
            x = torch.einsum("bshc,hdc->bshd", x, wkv_b[:, -V_HEAD_DIM:])
        return self.wo(x.flatten(2))


class Transformer(nn.Module):
    def __init__(self, attn_impl: str, layers: int = 2):
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, DIM), nn.Linear(DIM, VOCAB, bias=False)
        self.norms = nn.ModuleList(RMSNorm(DIM) for _ in range(layers))
        self.layers = nn.ModuleList(MLA(attn_impl) for _ in range(layers))
        half = QK_ROPE_HEAD_DIM // 2
        angles = torch.outer(torch.arange(MAX_SEQ), 100.0 ** -(torch.arange(half) / half))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, tokens, start_pos: int):
        """Logits of each of `tokens` [batch, tokens], which stand from start_pos on."""
        seqlen = tokens.size(1)
        freqs_cis, mask, x = self.freqs_cis[start_pos : start_pos + seqlen], None, self.embed(tokens)
        if seqlen > 1:  # there, for start_pos == 0 only
            mask = torch.full((seqlen, start_pos + seqlen), float("-inf"), device=tokens.device).triu(start_pos + 1)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), start_pos, freqs_cis, mask)
        return self.head(x)
