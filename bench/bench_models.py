"""A decode step of whole stock models, sampling included: `torch.compile` as it is, against the same with fi_ops enabled.

CPU: 4 layers, dim 1024, 16 query and 4 KV heads of 64, vocabulary 32000, 2,000 tokens in a cache built for 4,096.
CUDA: 8 layers of Llama-3-8B's shape (dim 4096, 32 query and 8 KV heads of 128, vocabulary 128256), 2,000 tokens (and for
one case 7,900) in a cache built for 8,192, `mode="reduce-overhead"`.
All bfloat16, `fullgraph=True`. The cost is one read of the weights and of the live part of the cache.

The position stands still (gpt-fast: it is an argument) or is set back before each turn (the static cache counts its own).
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fi_ops.library import Cost

from . import stock
from .harness import Candidate, Case, Options, within_budget
from .whole_models import compiled_step

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from gpt_fast_model import ModelArgs, Transformer
from gpt_fast_model import sample as gpt_fast_sample


@dataclass(frozen=True)
class Sizes:
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    slots: int  # in the cache
    top_p: float  # of the Hugging Face sampler; torch 2.11 can't compile the sort of many rows for CUDA
    turn: float  # seconds


SIZES = {
    "cpu": Sizes(4, 1024, 16, 4, 64, 2816, 32000, 4096, top_p=0.95, turn=0.0),
    "cuda": Sizes(8, 4096, 32, 8, 128, 14336, 128256, 8192, top_p=1.0, turn=0.03),
}
IN_CACHE, MANY_IN_CACHE = 2000, 7900


class GptFast:
    """The gpt-fast style model of `examples/`: caches are buffers, positions an argument."""

    name = "gpt-fast model"

    def __init__(self, sizes: Sizes, batch: int, dtype: torch.dtype, device: str) -> None:
        args = ModelArgs(
            block_size=sizes.slots, vocab_size=sizes.vocab, n_layer=sizes.layers, n_head=sizes.heads,
            n_kv_head=sizes.kv_heads, dim=sizes.dim, head_dim=sizes.head_dim, intermediate_size=sizes.ffn,
        )  # fmt: skip
        with torch.device(device):
            self.model = Transformer(args).to(dtype).eval()
        self.model.setup_caches(batch, sizes.slots)
        self.position = torch.zeros(1, dtype=torch.long, device=device)

    def caches(self) -> list[torch.Tensor]:
        caches = [layer.attention.kv_cache for layer in self.model.layers]
        return [t for cache in caches for t in (cache.k_cache, cache.v_cache)]

    def in_dtype(self, dtype: torch.dtype) -> GptFast:
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model).to(dtype)
        return other

    def step(self) -> Callable:
        model, position = self.model, self.position

        def step(token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model(token, position)
            return gpt_fast_sample(logits, temperature=0.8, top_k=200)[0], logits[:, -1]

        return step

    def set_position(self, tokens: int) -> None:
        self.position.fill_(tokens)


class HuggingFaceLlama:
    """`LlamaForCausalLM` over a `StaticCache`, which counts its own position."""

    name = "Hugging Face Llama, StaticCache"

    def __init__(self, sizes: Sizes, batch: int, dtype: torch.dtype, device: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

        config = LlamaConfig(
            vocab_size=sizes.vocab, hidden_size=sizes.dim, intermediate_size=sizes.ffn, num_hidden_layers=sizes.layers,
            head_dim=sizes.head_dim, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
            max_position_embeddings=sizes.slots,
        )  # fmt: skip
        with torch.device(device):
            self.model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
        self.cache = StaticCache(config, max_cache_len=sizes.slots)
        self.cache.early_initialization(batch, sizes.kv_heads, sizes.head_dim, dtype, torch.device(device))
        self.top_p = sizes.top_p

    def caches(self) -> list[torch.Tensor]:
        return [t for layer in self.cache.layers for t in (layer.keys, layer.values)]

    def in_dtype(self, dtype: torch.dtype) -> HuggingFaceLlama:
        other = copy.copy(self)
        other.model, other.cache = copy.deepcopy(self.model).to(dtype), copy.deepcopy(self.cache)
        for layer in other.cache.layers:
            layer.keys, layer.values, layer.dtype = layer.keys.to(dtype), layer.values.to(dtype), dtype
        return other

    def step(self) -> Callable:
        model, cache, top_p = self.model, self.cache, self.top_p

        def step(token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model(input_ids=token, past_key_values=cache).logits[:, -1]
            return stock.hf_sample(logits.float() / 0.8, 50, top_p), logits

        return step

    def set_position(self, tokens: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(tokens)


def _logits(subject: Any, token: torch.Tensor, tokens: int) -> torch.Tensor:
    subject.set_position(tokens)
    return subject.step()(token)[1]


def _check(subject: Any, token: torch.Tensor, tokens: int, device: str):
    """By the model in eager mode at higher precision (float32 on CUDA, where float64 would not fit), plain math attention."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = _logits(subject.in_dtype(torch.float32 if device == "cuda" else torch.float64), token, tokens)
    return within_budget(expected, _logits(subject, token, tokens), lambda out: out[1])


def batches(options: Options) -> tuple[int, ...]:
    if options.batch:
        return (options.batch,)
    if options.device == "cuda":
        return (16,) if options.quick else (1, 16)
    return (1,) if options.quick else (1, 8)


def cases(options: Options) -> Iterator[Case]:
    for kind in (GptFast, HuggingFaceLlama):
        for batch in batches(options):
            print(f"\n{kind.name}, B={batch}:", flush=True)
            torch.compiler.reset()  # what was compiled before is done with, and may hold gigabytes
            yield from _cases_of(kind, batch, options)
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


def _cases_of(kind: type, batch: int, options: Options) -> Iterator[Case]:
    dtype, device, sizes = options.pick(torch.bfloat16), options.device, SIZES[options.device]
    subject = kind(sizes, batch, dtype, device)
    token = torch.randint(sizes.vocab, (batch, 1), device=device)
    weights = sum(p.nbytes for p in subject.model.parameters()) - sizes.vocab * sizes.dim * dtype.itemsize
    steps: list[Callable] = []
    many = device == "cuda" and batch > 1 and kind is GptFast and not options.quick
    for tokens in (IN_CACHE, MANY_IN_CACHE) if many else (IN_CACHE,):
        for cache in subject.caches():
            cache[:, :, :tokens].normal_()
        subject.set_position(tokens)
        if not steps:  # the same code serves every position
            mode = "reduce-overhead" if device == "cuda" else None
            steps = [compiled_step(subject.step(), (token,), ours, mode) for ours in (False, True)]
        names = ("torch.compile", "torch.compile + fi_ops")
        live = 2 * sizes.layers * batch * sizes.kv_heads * tokens * sizes.head_dim * dtype.itemsize
        yield Case(
            f"{kind.name}, B={batch}, {tokens} of {sizes.slots} slots, {str(dtype).removeprefix('torch.')}",
            [
                Candidate(
                    name, step, ours=ours, capture=False, rewind=lambda tokens=tokens: subject.set_position(tokens)
                )
                for name, step, ours in zip(names, steps, (False, True), strict=True)
            ],
            Cost(weights + live, 2 * batch * weights // dtype.itemsize),
            None if options.warm or options.kernels else _check(subject, token, tokens, device),
            dtype,
            unit="ms",
            turn=sizes.turn,
        )
