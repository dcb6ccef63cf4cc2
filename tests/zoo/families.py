"""The registry: one entry a family, most popular first. To add a family, add an entry and run `make zoo`.

An entry keeps what makes the family's attention its own (grouped heads, head_dim, windows, soft caps, partial or scaled
RoPE, sinks, biases, experts) and is small in everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LAYERS = 2
WINDOW = 8
"""Longer than the prompt and shorter than prompt and decode steps, so that windows fill and slide on the way."""

ALL, SDPA_EAGER, EAGER_FLEX, EAGER = ("sdpa", "eager", "flex"), ("sdpa", "eager"), ("eager", "flex"), ("eager",)

# Weights are larger than the families' own initial ones: logits far from 0 let an error in the attention show.
COMMON = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ALTERNATING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)

LATENT = dict(
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=12,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
)
"""Keys and values are expanded from 16 numbers a token, as the cache has them."""


@dataclass(frozen=True)
class Family:
    name: str
    """The prefix of its classes in transformers."""
    config: dict[str, Any] = field(default_factory=dict)
    """What it has besides `COMMON`."""
    implementations: tuple[str, ...] = ALL
    head: str = "ForCausalLM"
    label: str = ""
    """What tables call it, where that is not `name`."""
    kind: str = "decoder"
    """decoder; encoder (one bidirectional forward); encoder-decoder."""
    prefill_sites: int = LAYERS
    decode_sites: int = LAYERS
    """Attentions that one forward computes."""
    config_class: str = ""
    """Where it is not `{name}Config`."""
    inputs: str = "ids"
    """What the prompt is: ids, pixels, features."""
    caches: tuple[str, ...] = ("static", "dynamic")
    """Those that stock torch compiles in one graph."""
    positions: bool = False
    """It is told the positions; it would find them in a way that does not compile in one graph."""

    @property
    def key(self) -> str:
        return self.label or self.name


FAMILIES = (
    Family("Llama"),
    Family(
        "Llama",
        dict(
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            )
        ),
        label="Llama-3.1",
    ),
    Family("Mistral", dict(head_dim=16, sliding_window=WINDOW)),
    Family("Qwen2"),
    Family("Qwen3", dict(head_dim=32)),
    Family("Gemma", dict(head_dim=32, num_key_value_heads=1)),
    Family("Gemma2", dict(head_dim=16, query_pre_attn_scalar=24, **ALTERNATING), EAGER_FLEX),
    Family(
        "Gemma3",
        dict(head_dim=16, query_pre_attn_scalar=24, **ALTERNATING),
        config_class="Gemma3TextConfig",
    ),
    Family("Phi3", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    Family("Phi"),
    Family("GPTNeoX", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25))),
    Family("GPTJ", dict(rotary_dim=8, n_positions=64), EAGER),
    Family("Glm", dict(head_dim=16)),
    Family("Glm4", dict(head_dim=16)),
    Family("Olmo2"),
    Family("Granite", dict(attention_multiplier=0.2, residual_multiplier=0.5)),
    Family("Cohere", dict(use_qk_norm=True)),
    Family("Cohere2", dict(**ALTERNATING)),
    Family(
        "StableLm",
        dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25)),
        SDPA_EAGER,
    ),
    Family("Starcoder2", dict(sliding_window=WINDOW)),
    Family("SmolLM3", dict(no_rope_layers=[1, 0])),
    Family("Mixtral", dict(**EXPERTS)),
    Family("Qwen2Moe", dict(shared_expert_intermediate_size=32, **EXPERTS)),
    Family("Qwen3Moe", dict(head_dim=32, **EXPERTS)),
    Family("GptOss", dict(head_dim=16, **ALTERNATING, **EXPERTS), EAGER),
    Family(
        "Llama4",
        dict(head_dim=16, intermediate_size_mlp=96, attention_chunk_size=WINDOW, **EXPERTS),
        config_class="Llama4TextConfig",
    ),
    Family("Olmo3", dict(**ALTERNATING)),
    Family("Exaone4", dict(**ALTERNATING)),
    Family("GPT2", dict(n_positions=64), SDPA_EAGER, head="LMHeadModel"),
    Family("GPTBigCode", dict(n_positions=64, n_embd=64, n_layer=LAYERS, n_head=4), SDPA_EAGER),
    Family(
        "GPTNeo",
        dict(num_layers=LAYERS, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=WINDOW),
        EAGER,
        caches=("dynamic",),  # in a static one transformers' local layers count their window from its end
    ),
    Family("OPT", dict(ffn_dim=96, word_embed_proj_dim=64), positions=True),
    Family("Falcon", dict(num_kv_heads=2, new_decoder_architecture=True), SDPA_EAGER),
    Family("Falcon", dict(alibi=True, multi_query=False), SDPA_EAGER, label="Falcon-ALiBi", caches=("dynamic",)),
    Family("Mpt", dict(max_seq_len=64), EAGER, caches=("dynamic",)),
    Family("Bloom", dict(), EAGER),
    Family("DeepseekV2", dict(**LATENT, topk_method="greedy", n_shared_experts=1)),
    Family("DeepseekV3", dict(**LATENT)),
    Family("Bert", dict(), head="Model", kind="encoder", decode_sites=0, caches=("none",)),
    Family(
        "ViT",
        dict(image_size=16, patch_size=4),
        head="Model",
        kind="encoder",
        inputs="pixels",
        decode_sites=0,
        caches=("none",),
    ),
    Family(
        "T5",
        dict(d_model=64, d_kv=16, d_ff=96, num_layers=LAYERS, num_heads=4, initializer_factor=1.0),
        SDPA_EAGER,
        head="ForConditionalGeneration",
        kind="encoder-decoder",
        prefill_sites=3 * LAYERS,
        decode_sites=2 * LAYERS,
    ),
    Family(
        "Whisper",
        dict(
            d_model=64,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            num_mel_bins=8,
            max_source_positions=12,
            max_target_positions=64,
            decoder_start_token_id=1,
            init_std=0.15,
        ),
        head="ForConditionalGeneration",
        kind="encoder-decoder",
        inputs="features",
        prefill_sites=3 * LAYERS,
        decode_sites=2 * LAYERS,
    ),
)

BY_KEY = {family.key: family for family in FAMILIES}
