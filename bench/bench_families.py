"""Hugging Face families of different structure: `torch.compile` as it is, against the same with fi_ops enabled.

Two layers each (so that eight families compile in a few minutes; `--full` for all twelve) and a small vocabulary; random
weights, bfloat16, `fullgraph=True`. CPU: width 1024. CUDA: the width of the family's model of 4 to 9B (GPT-OSS: of 20B,
with 4 experts; encoders are "large"). Three jobs of a decoder, and the first alone of an encoder:

forward   a prompt without a cache, up to the hidden states of all positions
prefill   the same into an empty `StaticCache` of 4,096 (CUDA 8,192) slots, as `generate` does with such a cache
decode    the logits of one more token of each sequence, at 2,000 tokens in the cache; on CUDA `mode="reduce-overhead"`

Every call starts at the same position. All experts of a mixture are asked for, so that rounding can't choose others. The
cost is one read of the weights and of what is live in the cache; a prompt's, its products. The name of ours says how many
of the graph's sites were rewritten; Inductor's cache of whole graphs is off, because a graph from there counts none.
"""

from __future__ import annotations

import copy
import functools
import gc
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fi_ops.library import Cost

from .harness import Candidate, Case, Options, within_budget
from .whole_models import compiled_step, rewritten


@dataclass(frozen=True)
class Sizes:
    config: dict[str, int]
    """Of every family that says nothing else."""
    slots: int
    prompt: int
    in_cache: int
    batches: tuple[int, ...]
    encoder_batch: int
    turn: float  # seconds


SIZES = {
    "cpu": Sizes(
        dict(
            hidden_size=1024, num_attention_heads=16, num_key_value_heads=4, intermediate_size=2816,
            num_hidden_layers=2, vocab_size=8192, max_position_embeddings=4096,
        ),
        slots=4096, prompt=512, in_cache=2000, batches=(1, 8), encoder_batch=1, turn=0.0,
    ),
    "cuda": Sizes(
        dict(
            hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
            num_hidden_layers=2, vocab_size=32000, max_position_embeddings=8192,
        ),
        slots=8192, prompt=1024, in_cache=2000, batches=(1, 16), encoder_batch=32, turn=0.02,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    name: str
    """The prefix of its classes in transformers."""
    config: dict[str, Any] = field(default_factory=dict)
    """What makes its attention its own, on every device."""
    cuda: dict[str, Any] = field(default_factory=dict)
    """Its widths there."""
    implementation: str = "sdpa"
    label: str = ""
    """What tables call it, where that is not `name`."""
    head: str = "ForCausalLM"
    """Of its class; "Model" is an encoder."""
    padding_mask: bool = False
    """It is given one over the whole cache, as `generate` does; without it, some releases can't compile the family."""
    pixels: bool = False

    @property
    def key(self) -> str:
        return self.label or self.name


def _partial_rope(factor: float) -> dict[str, Any]:
    return dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=factor)


LLAMA3_ROPE = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=2048,
)  # fmt: skip
LARGE = dict(hidden_size=1024, num_attention_heads=16, num_key_value_heads=16, intermediate_size=4096)

FAMILIES = (
    Family("Llama", dict(rope_parameters=LLAMA3_ROPE), label="Llama-3.1"),
    Family("Qwen3", dict(head_dim=64), dict(head_dim=128, intermediate_size=12288)),
    Family(
        "Gemma2",
        dict(head_dim=64, sliding_window=4096),
        dict(hidden_size=3584, num_attention_heads=16, num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256),
        implementation="eager",
    ),
    Family(
        "Phi3",
        dict(rope_parameters=_partial_rope(0.75), pad_token_id=0),
        dict(hidden_size=3072, num_attention_heads=24, num_key_value_heads=8, intermediate_size=8192),
    ),
    Family("GPTNeoX", dict(rope_parameters=_partial_rope(0.25)), dict(intermediate_size=16384)),
    Family(
        "GptOss",
        dict(head_dim=64, intermediate_size=704, num_local_experts=4, num_experts_per_tok=4, pad_token_id=0),
        dict(hidden_size=2880, num_attention_heads=64, num_key_value_heads=8, intermediate_size=2880),
        implementation="eager",
    ),
    Family("Bloom", implementation="eager", padding_mask=True),
    Family("Falcon", dict(multi_query=True, parallel_attn=True, alibi=False)),
    Family("Llama", implementation="flex_attention", label="Llama, flex"),
    Family(
        "DeepseekV3",
        dict(
            num_key_value_heads=16, q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
            v_head_dim=128, first_k_dense_replace=2,  # its experts are left out
        ),
        dict(
            hidden_size=7168, num_attention_heads=128, num_key_value_heads=128, q_lora_rank=1536, intermediate_size=18432,
        ),
    ),
    Family("Bert", dict(LARGE, max_position_embeddings=512), head="Model"),
    Family("ViT", dict(LARGE, image_size=224, patch_size=16), head="Model", pixels=True),
)  # fmt: skip
STANDARD = ("Llama-3.1", "Qwen3", "Gemma2", "GPTNeoX", "GptOss", "Bloom", "Bert", "ViT")
QUICK = ("Llama-3.1", "Gemma2", "GptOss", "Bert")


@dataclass(frozen=True)
class Job:
    phase: str
    """forward, prefill, decode."""
    batch: int
    tokens: int
    """Of the prompt, or in the cache."""

    @property
    def started_at(self) -> int:
        """The position of the first new token."""
        return self.tokens if self.phase == "decode" else 0


class Subject:
    """A model and, for the jobs that have one, a static cache, which is set back to where it was."""

    def __init__(self, model: torch.nn.Module, family: Family, job: Job, slots: int) -> None:
        self.model, self.family, self.job, self.slots = model, family, job, slots
        self.cache: Any = None
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        if job.phase != "forward":
            self._make_cache()

    def _make_cache(self) -> None:
        from transformers import StaticCache

        self.cache = StaticCache(self.model.config, max_cache_len=self.slots)
        first = torch.zeros(self.job.batch, 1, dtype=torch.long, device=self.device)
        self.model(first, past_key_values=self.cache, **self._masks(1))  # makes its tensors
        self.saved = []
        for layer in self.cache.layers:
            for cache in (layer.keys, layer.values):
                cache.zero_()
                cache[:, :, : self.job.started_at].normal_()
                # A ring that is full moves on with every token.
                self.saved.append(cache.clone() if cache.shape[2] < self.slots else None)
        self.lengths = [layer.cumulative_length for layer in self.cache.layers]
        self.started = [torch.full_like(length, self.job.started_at) for length in self.lengths]

    def _masks(self, tokens: int) -> dict[str, torch.Tensor]:
        if not self.family.padding_mask or self.cache is None:
            return {}
        live = torch.arange(self.slots, device=self.device) < tokens
        return {"attention_mask": live.long().expand(self.job.batch, -1).contiguous()}

    def hold(self) -> None:
        """Set the position back; by itself it moves on with every call. (torch compiles again for another number of tokens in a
        sliding layer, which counts in Python.)"""
        if self.cache is None:
            return
        torch._foreach_copy_(self.lengths, self.started)
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.job.started_at

    def restore(self) -> None:
        """Set the position back, and the contents that have moved on."""
        self.hold()
        if self.cache is not None:
            caches = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
            for cache, saved in zip(caches, self.saved, strict=True):
                if saved is not None:
                    cache.copy_(saved)

    def in_dtype(self, model: torch.nn.Module) -> Subject:
        """The same over `model`, which is this one in another dtype."""
        other = copy.copy(self)
        other.model, other.dtype = model, next(model.parameters()).dtype
        if self.cache is not None:
            other.cache = copy.deepcopy(self.cache)
            for layer in other.cache.layers:
                layer.keys, layer.values = layer.keys.to(other.dtype), layer.values.to(other.dtype)
                layer.dtype = other.dtype
            other.lengths = [layer.cumulative_length for layer in other.cache.layers]
        return other

    def inputs(self) -> torch.Tensor:
        config, batch = self.model.config, self.job.batch
        if self.family.pixels:
            shape = (batch, 3, config.image_size, config.image_size)
            return torch.randn(shape, device=self.device).to(self.dtype)
        tokens = 1 if self.job.phase == "decode" else self.job.tokens
        return torch.randint(config.vocab_size, (batch, tokens), device=self.device)

    def step(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The job over `inputs`: hidden states `[batch, tokens, hidden_size]`, or logits `[batch, vocab_size]`."""
        model, cache = self.model, self.cache
        if self.job.phase == "decode":
            masks = self._masks(self.job.tokens + 1)
            return lambda x: model(input_ids=x, past_key_values=cache, **masks).logits[:, -1]
        if self.job.phase == "prefill":
            body, masks = model.base_model, self._masks(self.job.tokens)
            return lambda x: body(input_ids=x, past_key_values=cache, use_cache=True, **masks)[0]
        if self.family.head == "Model":
            return lambda x: model(x)[0]
        body = model.base_model
        return lambda x: body(input_ids=x, use_cache=False)[0]

    def answer(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the model says in eager mode (where FlexAttention would be compiled, and is eager attention instead)."""
        self.restore()
        inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs
        config, implementation = self.model.config, self.model.config._attn_implementation
        config._attn_implementation = "eager" if implementation == "flex_attention" else implementation
        try:
            return self.step()(inputs)
        finally:
            config._attn_implementation = implementation


def build(family: Family, sizes: Sizes, dtype: torch.dtype, device: str) -> torch.nn.Module:
    import transformers

    own = sizes.config | family.config | (family.cuda if device == "cuda" else {})
    config = getattr(transformers, f"{family.name}Config")(**own)
    cls = getattr(transformers, f"{family.name}{family.head}")
    with torch.device(device):
        return cls._from_config(config, dtype=dtype, attn_implementation=family.implementation).eval()


def _cost(subject: Subject) -> Cost:
    """Decode: the weights and the live part of the cache, read once. A prompt: its matrix products, and the weights."""
    model, job, config = subject.model, subject.job, subject.model.config
    head = model.get_output_embeddings() if job.phase == "decode" else None
    table = model.get_input_embeddings() if not subject.family.pixels else None
    unread = {id(module.weight) for module in (table, model.get_output_embeddings()) if module is not None}
    unread -= {id(head.weight)} if head is not None else set()
    weights = [p for p in model.parameters() if id(p) not in unread]
    read, count = sum(p.nbytes for p in weights), sum(p.numel() for p in weights)
    if job.phase == "decode":
        for layer in subject.cache.layers:
            for cache in (layer.keys, layer.values):
                read += cache[:, :, : job.tokens + 1].numel() * cache.element_size()
        return Cost(read, 2 * job.batch * count)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hasattr(config, "v_head_dim"):  # head_dim is what RoPE turns
        head_dim = (config.qk_head_dim + config.v_head_dim) // 2
    pairs = job.tokens**2 if subject.family.head == "Model" else job.tokens * (job.tokens + 1) // 2
    attention = 4 * pairs * config.num_attention_heads * head_dim * config.num_hidden_layers
    return Cost(read, job.batch * (2 * job.tokens * count + attention))


def _sites(counts: Counter) -> str:
    """How much was rewritten, as the name of a candidate says it."""
    found = [f"{counts[kind]} of {counts[kind + '_candidates']} {kind}" for kind in ("attention", "linear")]
    return ", ".join(text for text in found if not text.endswith(" of 0 linear"))


def jobs(family: Family, options: Options, sizes: Sizes) -> list[Job]:
    prompt, in_cache = options.length or sizes.prompt, options.length or sizes.in_cache
    if family.head == "Model":
        tokens = 197 if family.pixels else min(prompt, 512)
        return [Job("forward", options.batch or sizes.encoder_batch, tokens)]
    forward = Job("forward", 1, prompt)
    if family.implementation == "flex_attention":  # transformers' block mask of a static cache is wrong in stock torch
        return [forward]
    batches = (options.batch,) if options.batch else sizes.batches[-1:] if options.quick else sizes.batches
    return [forward, Job("prefill", 1, prompt), *(Job("decode", batch, in_cache) for batch in batches)]


def families(options: Options) -> list[Family]:
    if options.only:
        return [f for f in FAMILIES if options.only.lower() in f.key.lower()]
    return [f for f in FAMILIES if options.full or f.key in (QUICK if options.quick else STANDARD)]


def _warm_all(options: Options) -> None:
    """Each family in a process of its own, all at once."""
    command = [sys.executable, "-m", "bench", "families", "--warm", "--device", options.device]
    running = [subprocess.Popen([*command, "--only", family.key]) for family in families(options)]
    failed = [child.args[-1] for child in running if child.wait()]
    if failed:
        raise RuntimeError(f"not compiled (see above): {', '.join(failed)}")


def cases(options: Options) -> Iterator[Case]:
    if options.warm and not options.only:
        _warm_all(options)
        return
    sizes = SIZES[options.device]
    for family in families(options):
        yield from _cases_of(family, sizes, options)
        torch.compiler.reset()  # what was compiled is done with, and may hold gigabytes
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def _cases_of(family: Family, sizes: Sizes, options: Options) -> Iterator[Case]:
    dtype, device = options.pick(torch.bfloat16), options.device
    model = build(family, sizes, dtype, device)

    @functools.cache
    def precise() -> torch.nn.Module:
        precise = copy.deepcopy(model).to(torch.float32 if device == "cuda" else torch.float64)
        precise.config._experts_implementation = "eager"  # their grouped product is not for float64
        return precise

    for job in jobs(family, options, sizes):
        print(f"\n{family.key}, {job.phase}, B={job.batch}:", flush=True)
        subject = Subject(model, family, job, sizes.slots)
        inputs = subject.inputs()
        candidates = [_candidate(subject, inputs, ours, device) for ours in (False, True)]
        slots = "" if job.phase != "decode" else f" of {sizes.slots} slots"
        yield Case(
            f"{family.key} {job.phase}, B={job.batch}, {job.tokens}{slots}, {family.implementation}",
            candidates,
            _cost(subject),
            None if options.warm or options.kernels else _check(subject, inputs, precise()),
            dtype,
            unit="ms",
            turn=sizes.turn,
        )


def _candidate(subject: Subject, inputs: torch.Tensor, ours: bool, device: str) -> Candidate:
    """The compiled job; each call of it starts at the same position."""
    mode = "reduce-overhead" if device == "cuda" and subject.job.phase == "decode" else None
    subject.restore()
    before = rewritten()
    # Transformers makes FlexAttention's block masks in a way that warns, at which stock torch breaks the graph. (Not for
    # the others: torch 2.11 logs a traceback for each graph that it compiles with this set.)
    flex = subject.family.implementation == "flex_attention"
    quiet = torch._dynamo.config.patch(ignore_logging_functions={warnings.warn} if flex else set())
    with torch._inductor.config.patch(fx_graph_cache=False), quiet:
        call = compiled_step(subject.step(), (inputs,), ours, mode)
    name = f"torch.compile + fi_ops: {_sites(rewritten() - before)}" if ours else "torch.compile"

    def held() -> object:
        subject.hold()
        return call()

    return Candidate(name, held, ours=ours, capture=False, rewind=subject.restore)


def _check(subject: Subject, inputs: torch.Tensor, precise: torch.nn.Module) -> Callable[[object], str]:
    """By the model in eager mode at higher precision (float32 on CUDA, where float64 is slow), plain math attention."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = subject.in_dtype(precise).answer(inputs)
    return within_budget(expected, subject.answer(inputs))
