"""A small transformer in the style of gpt-fast: plain PyTorch, written for `torch.compile`.

Nothing in this file knows about fi_ops. It is the kind of code the rewrites must recognise as it is:

- static KV caches as module buffers, updated by index assignment: `k_cache[:, :, input_pos] = k`;
- a boolean causal mask buffer indexed by the positions of the step;
- interleaved RoPE from a `[max_len, head_dim / 2, 2]` table of cos and sin;
- grouped-query attention, by `repeat_interleave` or by `enable_gqa=True`;
- RMSNorm, SwiGLU, and a sampler: temperature, top-k, softmax, and argmax(p / exponential noise).

Use:
    model = Transformer(ModelArgs(n_layer=2, dim=64, n_head=4, n_kv_head=2, vocab_size=256))
    model.setup_caches(max_batch_size=1, max_seq_length=128)
    logits = model(idx, input_pos)                  # idx [B, L], input_pos [L] -> [B, L, vocab_size]
    token, probs = sample(logits, temperature=0.8, top_k=200)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F


def find_multiple(n: int, k: int) -> int:
    """The smallest multiple of k that is not below n."""
    return n if n % k == 0 else n + k - n % k


@dataclass
class ModelArgs:
    """The shape of a model; fields left at -1 or None are derived from the others."""

    block_size: int = 2048
    vocab_size: int = 32000
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = -1
    dim: int = 4096
    head_dim: int = -1
    intermediate_size: int | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    gqa: str = "repeat_interleave"  # or "enable_gqa"

    def __post_init__(self) -> None:
        if self.n_kv_head == -1:
            self.n_kv_head = self.n_head
        if self.intermediate_size is None:
            self.intermediate_size = find_multiple(8 * self.dim // 3, 256)
        if self.head_dim == -1:
            self.head_dim = self.dim // self.n_head
        if self.n_head % self.n_kv_head != 0:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.gqa not in ("repeat_interleave", "enable_gqa"):
            raise ValueError(f"gqa must be 'repeat_interleave' or 'enable_gqa', got {self.gqa!r}")


class KVCache(nn.Module):
    """Keys and values of every position seen so far, `[batch, heads, max_seq_length, head_dim]`."""

    def __init__(
        self, max_batch_size: int, max_seq_length: int, n_heads: int, head_dim: int, dtype: torch.dtype, device=None
    ) -> None:
        super().__init__()
        shape = (max_batch_size, n_heads, max_seq_length, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def update(self, input_pos: Tensor, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k_val
        v_out[:, :, input_pos] = v_val
        return k_out, v_out


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(torch.mean(x32 * x32, dim=-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.intermediate_size, bias=False)
        self.w3 = nn.Linear(args.dim, args.intermediate_size, bias=False)
        self.w2 = nn.Linear(args.intermediate_size, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = args.n_head, args.n_kv_head, args.head_dim
        self.gqa = args.gqa
        self.wqkv = nn.Linear(args.dim, (args.n_head + 2 * args.n_kv_head) * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_head * args.head_dim, args.dim, bias=False)
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor, input_pos: Tensor | None = None) -> Tensor:
        bsz, seqlen, _ = x.shape
        q_size, kv_size = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        q, k, v = self.wqkv(x).split([q_size, kv_size, kv_size], dim=-1)

        q = q.view(bsz, seqlen, self.n_head, self.head_dim)
        k = k.view(bsz, seqlen, self.n_kv_head, self.head_dim)
        v = v.view(bsz, seqlen, self.n_kv_head, self.head_dim)

        q = apply_rotary_emb(q, freqs_cis)
        k = apply_rotary_emb(k, freqs_cis)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))

        if self.kv_cache is not None:
            k, v = self.kv_cache.update(input_pos, k, v)

        if self.gqa == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            groups = self.n_head // self.n_kv_head
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)

        return self.wo(y.transpose(1, 2).contiguous().view(bsz, seqlen, q_size))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, input_pos: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask, input_pos)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layer))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.max_batch_size = -1
        self.max_seq_length = -1

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Allocate the caches, the RoPE table and the mask, in the weights' dtype and on their device."""
        if self.max_seq_length >= max_seq_length and self.max_batch_size >= max_batch_size:
            return
        args, weight = self.args, self.output.weight
        max_seq_length = find_multiple(max_seq_length, 8)
        self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
        for layer in self.layers:
            layer.attention.kv_cache = KVCache(
                max_batch_size, max_seq_length, args.n_kv_head, args.head_dim, weight.dtype, weight.device
            )
        freqs_cis = precompute_freqs_cis(max_seq_length, args.head_dim, args.rope_base, weight.dtype)
        causal_mask = torch.tril(torch.ones(max_seq_length, max_seq_length, dtype=torch.bool))
        self.register_buffer("freqs_cis", freqs_cis.to(weight.device), persistent=False)
        self.register_buffer("causal_mask", causal_mask.to(weight.device), persistent=False)

    def forward(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        """idx `[B, L]` token ids at positions input_pos `[L]`; logits `[B, L, vocab_size]`."""
        mask = self.causal_mask[None, None, input_pos]
        freqs_cis = self.freqs_cis[input_pos]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, input_pos, freqs_cis, mask)
        return self.output(self.norm(x))


def precompute_freqs_cis(seq_len: int, head_dim: int, base: float = 10000.0, dtype=torch.float32) -> Tensor:
    """cos and sin of every position and frequency, `[seq_len, head_dim / 2, 2]`."""
    freqs = 1.0 / (base ** (torch.arange(0, head_dim, 2)[: head_dim // 2].float() / head_dim))
    angles = torch.outer(torch.arange(seq_len).float(), freqs)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(dtype)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i + 1]) of x `[B, L, H, D]` by the angles of freqs_cis `[L, D / 2, 2]`."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    freqs_cis = freqs_cis.view(1, pairs.size(1), 1, pairs.size(3), 2)
    rotated = torch.stack(
        [
            pairs[..., 0] * freqs_cis[..., 0] - pairs[..., 1] * freqs_cis[..., 1],
            pairs[..., 1] * freqs_cis[..., 0] + pairs[..., 0] * freqs_cis[..., 1],
        ],
        -1,
    )
    return rotated.flatten(3).type_as(x)


def multinomial_sample_one_no_sync(probs: Tensor) -> Tensor:
    """One draw a row: the first of independent exponential clocks with rates `probs`; int32, no device sync."""
    q = torch.empty_like(probs).exponential_(1)
    return torch.argmax(probs / q, dim=-1, keepdim=True).to(dtype=torch.int)


def logits_to_probs(logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    logits = logits / max(temperature, 1e-5)
    if top_k is not None:
        v, _ = torch.topk(logits, min(top_k, logits.size(-1)))
        pivot = v.select(-1, -1).unsqueeze(-1)
        logits = torch.where(logits < pivot, -float("Inf"), logits)
    return F.softmax(logits, dim=-1)


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw the next token of each sequence from logits `[B, L, V]`: (token `[B, 1]`, probs `[B, V]`)."""
    probs = logits_to_probs(logits[:, -1], temperature, top_k)
    return multinomial_sample_one_no_sync(probs), probs
