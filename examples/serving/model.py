"""Llama over a paged KV cache, in plain PyTorch and fi_ops: reads Hugging Face's `config.json` and `*.safetensors`.

A step's tokens are ragged: `[tokens]` of all requests one after the other, whatever each has (one token, or a chunk of its
prompt). What differs from a textbook Llama is two lines of `Attention.forward`: RoPE and the cache write are one op, and
attention reads the pages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fi_ops  # noqa: F401  (defines torch.ops.fi)


@dataclass(frozen=True)
class LlamaConfig:
    """What `config.json` says, by its names; `rope` are the arguments of `torch.ops.fi.rope_cos_sin`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: dict
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_directory(cls, directory: Path) -> LlamaConfig:
        path = Path(directory) / "config.json"
        if not path.exists():
            raise ValueError(f"{directory} has no config.json; pass the directory of a Hugging Face checkpoint")
        given = json.loads(path.read_text())
        if given.get("model_type") != "llama" or given.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"{path} is of a model of type {given.get('model_type')!r} with {given.get('hidden_act')!r}; "
                "this engine runs Llama with SiLU"
            )
        heads = given["num_attention_heads"]
        eos = given.get("eos_token_id")
        return cls(
            **{name: given[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
            num_attention_heads=heads,
            num_key_value_heads=given.get("num_key_value_heads") or heads,
            head_dim=given.get("head_dim") or given["hidden_size"] // heads,
            max_position_embeddings=given.get("max_position_embeddings", 2048),
            rms_norm_eps=given.get("rms_norm_eps", 1e-6),
            rope=_rope_arguments(given),
            tie_word_embeddings=given.get("tie_word_embeddings", False),
            attention_bias=given.get("attention_bias", False),
            mlp_bias=given.get("mlp_bias", False),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )


def _rope_arguments(config: dict) -> dict:
    """Newer configurations have `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    arguments = {"rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))}
    if kind == "default":
        return arguments
    if kind == "linear":
        return arguments | {"rope_scale": float(rope["factor"])}
    if kind == "llama3":
        return arguments | {
            "rope_scale": float(rope["factor"]),
            "low_freq_factor": float(rope["low_freq_factor"]),
            "high_freq_factor": float(rope["high_freq_factor"]),
            "old_context_len": int(rope["original_max_position_embeddings"]),
        }
    raise ValueError(f"RoPE scaling {kind!r} is not supported; default, linear and llama3 are")


@dataclass
class PagedBatch:
    """Where a step's tokens stand: the arguments that the ops share, by their names (`fi_ops.paged_attention`)."""

    qo_indptr: torch.Tensor  # [requests + 1]
    kv_indices: torch.Tensor  # [pages of all requests, or more]
    kv_indptr: torch.Tensor  # [requests + 1]
    kv_last_page_len: torch.Tensor  # [requests]
    batch_indices: torch.Tensor  # [tokens], -1: padding
    positions: torch.Tensor  # [tokens]
    plan: torch.Tensor

    @property
    def table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.kv_indices, self.kv_indptr, self.kv_last_page_len


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim, self.group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        self.heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
        inner = config.num_attention_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: torch.Tensor, batch: PagedBatch, cos_sin: torch.Tensor, cache) -> torch.Tensor:
        k_cache, v_cache = cache
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = qkv.split(self.heads, dim=1)
        query = torch.ops.fi.rope_append_paged_kv_cache(
            query, key, value, cos_sin, batch.batch_indices, batch.positions, k_cache, v_cache, *batch.table
        )
        out = torch.ops.fi.paged_attention(
            query, k_cache, v_cache, batch.qo_indptr, *batch.table, plan=batch.plan, causal=True
        )
        return self.o_proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, batch: PagedBatch, cos_sin: torch.Tensor, cache) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), batch, cos_sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """`forward(tokens [tokens], batch, caches)`: logits `[requests, vocab_size]` of each request's last token.

    caches: for each layer a pair `[num_pages, page_size, num_kv_heads, head_dim]`, written. A request without tokens in this
    step gets logits that mean nothing.
    """

    cos_sin: torch.Tensor

    def __init__(self, config: LlamaConfig, max_len: int) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("cos_sin", torch.empty(max_len, config.head_dim), persistent=False)

    def forward(self, tokens: torch.Tensor, batch: PagedBatch, caches: list) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, batch, self.cos_sin, cache)
        last = (batch.qo_indptr[1:] - 1).clamp(min=0)
        return self.lm_head(self.norm(x[last]))

    @classmethod
    def from_directory(cls, directory: Path, dtype: torch.dtype, device: str, max_len: int) -> Llama:
        """The checkpoint's weights in `dtype`; positions to `max_len`."""
        config = LlamaConfig.from_directory(directory)
        with torch.device("meta"):
            model = cls(config, max_len)
        weights = _fused({name: tensor.to(device, dtype) for name, tensor in _weights(Path(directory))}, config)
        model.load_state_dict(weights, assign=True)
        if config.tie_word_embeddings:  # assignment has untied them
            model.lm_head.weight = model.embed_tokens.weight
        return model._ready(device)

    @classmethod
    def with_random_weights(cls, config: LlamaConfig, dtype: torch.dtype, device: str, max_len: int) -> Llama:
        """The model of a configuration alone, to measure how fast it is."""
        with torch.device("meta"):
            model = cls(config, max_len).to(dtype)
        model.to_empty(device=device)
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter) if parameter.dim() == 1 else torch.nn.init.normal_(parameter, std=0.02)
        return model._ready(device)

    def _ready(self, device: str) -> Llama:
        positions = torch.arange(len(self.cos_sin), device=device, dtype=torch.int32)
        self.cos_sin = torch.cat(torch.ops.fi.rope_cos_sin(positions, self.config.head_dim, **self.config.rope), dim=-1)
        return self.eval().requires_grad_(False)


def _weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all `*.safetensors`, less the prefix `model.`."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise RuntimeError("reading checkpoints needs safetensors; pip install safetensors tokenizers") from None
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} has no *.safetensors; convert the checkpoint with save_pretrained()")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (not a dictionary)
                if not name.endswith("rotary_emb.inv_freq"):
                    yield name.removeprefix("model."), tensors.get_tensor(name)


def _fused(weights: dict[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Projections that read the same input as one: a step reads each weight once, in fewer calls."""
    for i in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
                block = f"layers.{i}.{fused.partition('.')[0]}."
                names = [f"{block}{part}_proj.{kind}" for part in parts]
                if all(name in weights for name in names):
                    weights[f"layers.{i}.{fused}.{kind}"] = torch.cat([weights.pop(name) for name in names])
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]
    return weights


def new_caches(config: LlamaConfig, num_pages: int, page_size: int, dtype: torch.dtype, device: str) -> list:
    """Of each layer a pair of tensors of their own. (Views of one storage would be copied whole by functionalization.)"""
    shape = (num_pages, page_size, config.num_key_value_heads, config.head_dim)
    pair = lambda: tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))  # noqa: E731
    return [pair() for _ in range(config.num_hidden_layers)]
