"""A decode step of whole stock models, sampling included: `torch.compile` as it is, against the same with fi_ops enabled.

4 layers, dim 1024, 16 query and 4 KV heads of 64, vocabulary 32000, bfloat16, 2,000 tokens in a cache built for 4,096.
The cost is one read of the weights and of the live part of the cache.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fi_ops
from fi_ops.library import Cost

from . import stock
from .harness import Candidate, Case, Options, within_budget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from gpt_fast_model import ModelArgs, Transformer
from gpt_fast_model import sample as gpt_fast_sample

LAYERS, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 4, 1024, 16, 4, 64, 2816, 32000
CACHE_LEN, IN_CACHE = 4096, 2000


class GptFast:
    """The gpt-fast style model of `examples/`: caches are buffers, positions an argument."""

    name = "gpt-fast model"

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_kv_head": KV_HEADS, "dim": DIM, "intermediate_size": FFN}
        self.model = Transformer(ModelArgs(block_size=CACHE_LEN, vocab_size=VOCAB, **sizes)).to(dtype).eval()
        self.model.setup_caches(batch, CACHE_LEN)
        for layer in self.model.layers:
            layer.attention.kv_cache.k_cache[:, :, :IN_CACHE].normal_()
            layer.attention.kv_cache.v_cache[:, :, :IN_CACHE].normal_()

    def double(self) -> GptFast:
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model).double()
        return other

    def step(self) -> Callable:
        model, position = self.model, torch.tensor([IN_CACHE])

        def step(token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model(token, position)
            return gpt_fast_sample(logits, temperature=0.8, top_k=200)[0], logits[:, -1]

        return step

    def rewind(self) -> None:
        pass


class HuggingFaceLlama:
    """`LlamaForCausalLM` over a `StaticCache`, which counts its own position."""

    name = "Hugging Face Llama, StaticCache"

    def __init__(self, batch: int, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=LAYERS, head_dim=HEAD_DIM,
            num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=CACHE_LEN,
        )  # fmt: skip
        self.model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
        self.cache = StaticCache(config, max_cache_len=CACHE_LEN)
        self.cache.early_initialization(batch, KV_HEADS, HEAD_DIM, dtype, torch.device("cpu"))
        for layer in self.cache.layers:
            layer.keys[:, :, :IN_CACHE].normal_()
            layer.values[:, :, :IN_CACHE].normal_()

    def double(self) -> HuggingFaceLlama:
        other = copy.copy(self)
        other.model, other.cache = copy.deepcopy(self.model).double(), copy.deepcopy(self.cache)
        for layer in other.cache.layers:
            layer.keys, layer.values, layer.dtype = layer.keys.double(), layer.values.double(), torch.float64
        return other

    def step(self) -> Callable:
        model, cache = self.model, self.cache

        def step(token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model(input_ids=token, past_key_values=cache).logits[:, -1]
            return stock.hf_sample(logits.float() / 0.8, 50, 0.95), logits

        return step

    def rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(IN_CACHE)


def _compiled(subject, token: torch.Tensor, ours: bool) -> Callable[[], object]:
    """The compiled step as a call without arguments; compiled here, so that fi_ops is enabled for that alone."""
    step = torch.compile(stock.own_code(subject.step()), dynamic=False)

    def call():
        subject.rewind()
        return step(token)

    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fi_ops.enable")
        with fi_ops.enabled() if ours else contextlib.nullcontext():
            call()
    print(f"  compiled {'with fi_ops' if ours else 'as it is'} in {time.perf_counter() - began:.0f} s", flush=True)
    return call


def _logits(subject, token: torch.Tensor) -> torch.Tensor:
    subject.rewind()
    return subject.step()(token)[1]


def cases(options: Options) -> Iterator[Case]:
    dtype = options.pick(torch.bfloat16)
    for kind in (GptFast, HuggingFaceLlama):
        for batch in (options.batch,) if options.batch else (1,) if options.quick else (1, 8):
            print(f"\n{kind.name}, B={batch}:", flush=True)
            subject, token = kind(batch, dtype), torch.randint(VOCAB, (batch, 1))
            expected, same = _logits(subject.double(), token), _logits(subject, token)
            weights = sum(p.nbytes for p in subject.model.parameters()) - VOCAB * DIM * dtype.itemsize
            live = 2 * LAYERS * batch * KV_HEADS * IN_CACHE * HEAD_DIM * dtype.itemsize
            yield Case(
                f"{kind.name}, B={batch}, {str(dtype).removeprefix('torch.')}",
                [
                    Candidate("torch.compile", _compiled(subject, token, ours=False)),
                    Candidate("torch.compile + fi_ops", _compiled(subject, token, ours=True), ours=True),
                ],
                Cost(weights + live, 2 * batch * weights // dtype.itemsize),
                within_budget(expected, same, lambda out: out[1]),
                dtype,
            )
