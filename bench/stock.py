"""What people run today: the peers of the benches. Stock torch, and FlashInfer where it is installed."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .harness import Candidate, Options


def own_code(fn: Callable) -> Callable:
    """The function with a code object of its own: Dynamo keeps compiled code by code object."""
    return types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


def eager(name: str, fn: Callable, copies: list[tuple]) -> Candidate:
    return Candidate(name, fn, inputs=copies)


def compiled(name: str, fn: Callable, copies: list[tuple]) -> Candidate:
    return Candidate(name, torch.compile(own_code(fn), dynamic=False), inputs=copies)


def eager_and_compiled(name: str, fn: Callable, copies: list[tuple], options: Options) -> list[Candidate]:
    """Both ways to run a stock function, over argument tuples in turn."""
    both = [eager(f"{name}, eager", fn, copies)]
    return [*both, compiled(f"{name}, compiled", fn, copies)] if options.compiled else both


# ------------------------------------------------------------------------------------------------ samplers


def hf_sample(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Hugging Face's top-k and top-p warpers, softmax and multinomial, as `generate(do_sample=True)` runs them."""
    if top_k > 0:
        logits = logits.masked_fill(logits < torch.topk(logits, top_k)[0][..., -1, None], -float("inf"))
    if top_p < 1.0:
        sorted_logits, sorted_indices = torch.sort(logits, descending=False)
        cumulative = sorted_logits.softmax(dim=-1).cumsum(dim=-1)
        remove = cumulative <= (1 - top_p)
        remove[..., -1:] = False
        logits = logits.masked_fill(remove.scatter(1, sorted_indices, remove), -float("inf"))
    return torch.multinomial(F.softmax(logits, dim=-1), num_samples=1).squeeze(1)


def gpt_fast_sample(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """gpt-fast's sampler: top-k, softmax, argmax over independent exponential clocks."""
    values, _ = torch.topk(logits, min(top_k, logits.size(-1)))
    logits = torch.where(logits < values.select(-1, -1).unsqueeze(-1), -float("Inf"), logits)
    probs = F.softmax(logits, dim=-1)
    return torch.argmax(probs / torch.empty_like(probs).exponential_(1), dim=-1)


def vllm_sample(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """vLLM's sampler in torch: one sort, k and p by row `[batch]`, softmax, argmax over independent exponential clocks."""
    ascending, ids = logits.sort(dim=-1, descending=False)
    kth = ascending.gather(1, (ascending.size(1) - top_k.to(torch.long)).unsqueeze(1))
    ascending.masked_fill_(ascending < kth, -float("inf"))
    removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p.unsqueeze(1)
    removed[:, -1] = False
    ascending.masked_fill_(removed, -float("inf"))
    probs = torch.empty_like(ascending).scatter_(-1, ids, ascending).softmax(dim=-1, dtype=torch.float32)
    return probs.div_(torch.empty_like(probs).exponential_()).argmax(dim=-1)


def speculate(draft_probs, draft_ids, uniform, target_probs) -> torch.Tensor:
    """A chain of draft tokens accepted as gpt-fast does, for a batch: the first refused one and what is behind it are replaced
    by a draw from what the target has over the draft. Returns `[batch, num_speculative_tokens + 1]`, -1 behind the last."""
    batch, num, _ = draft_probs.shape
    p = draft_probs.gather(2, draft_ids[..., None])[..., 0]
    q = target_probs[:, :num].gather(2, draft_ids[..., None])[..., 0]
    accepted = (uniform[:, :num] * p < q).int().cumprod(1).sum(1)
    rows = torch.arange(batch, device=accepted.device)
    draft = torch.where((accepted < num)[:, None], draft_probs[rows, accepted.clamp_max(num - 1)], 0.0)
    final = torch.multinomial((target_probs[rows, accepted] - draft).clamp_min_(0.0), 1)
    places = torch.arange(num + 1, device=accepted.device)
    ids = torch.cat([draft_ids, draft_ids[:, :1]], 1)
    return torch.where(places < accepted[:, None], ids, torch.where(places == accepted[:, None], final, -1))


def flashinfer_sample(logits: torch.Tensor, top_k: int | torch.Tensor, top_p: float | torch.Tensor) -> torch.Tensor:
    """FlashInfer's kernel for the filters asked for; those for a single one start from probabilities."""
    sampling = flashinfer().sampling
    if isinstance(top_k, torch.Tensor) or (top_k > 0 and top_p < 1.0):
        return sampling.top_k_top_p_sampling_from_logits(logits, top_k, top_p)
    probs = torch.softmax(logits, dim=-1)
    if top_k > 0:
        return sampling.top_k_sampling_from_probs(probs, top_k)
    return sampling.top_p_sampling_from_probs(probs, top_p)


# ------------------------------------------------------------------------------------------------ attention


def sdpa(query, key, value, causal: bool = False) -> torch.Tensor:
    """torch's choice of kernel; GQA by its own flag."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def sdpa_padded_value(query, key, value, causal: bool = False) -> torch.Tensor:
    """`sdpa` where value is narrower than query and key, for kernels that need one width: what models of 192/128 do."""
    padded = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    return sdpa(query, key, padded, causal)[..., : value.shape[-1]]


def sdpa_masked(query, key, value, mask) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def sdpa_repeat_kv(query, key, value, mask=None) -> torch.Tensor:
    """What stock models do over a static cache: repeat the heads of the whole cache, mask the empty slots."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def with_backend(backend: SDPBackend, fn: Callable) -> Callable:
    """The function with torch held to one SDPA kernel."""

    def call(*args):
        with sdpa_kernel(backend):
            return fn(*args)

    return call


def flex(query, key, value, block_mask=None) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)


def flex_peer(copies: list[tuple], keep: Callable | None = None) -> Candidate:
    """Compiled FlexAttention; `keep(batch, head, query index, key index)` is its mask, planned in the first, untimed call."""
    compiled_flex = torch.compile(own_code(flex), dynamic=False)

    @functools.cache
    def plan() -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        query, key = copies[0][:2]
        sizes = (query.shape[0], None, query.shape[2], key.shape[2])
        return None if keep is None else create_block_mask(keep, *sizes, device=str(query.device))

    return Candidate("FlexAttention, compiled", lambda q, k, v, *_: compiled_flex(q, k, v, plan()), inputs=copies)


def causal_rule(batch, head, i, j):
    """FlexAttention's way to say causal."""
    return i >= j


def dense_peers(copies: list[tuple], options: Options, with_flex: bool = False) -> list[Candidate]:
    """For inputs (query, key, value) or (query, key, value, causal), no mask."""
    if options.device == "cpu":
        return eager_and_compiled("torch SDPA", sdpa, copies, options)
    causal = len(copies[0]) > 3 and copies[0][3]
    narrow = copies[0][2].shape[-1] < copies[0][0].shape[-1]
    flash = ("torch flash, value padded", sdpa_padded_value) if narrow else ("torch flash", sdpa)
    peers = [
        eager(flash[0], with_backend(SDPBackend.FLASH_ATTENTION, flash[1]), copies),
        eager("torch cuDNN", with_backend(SDPBackend.CUDNN_ATTENTION, sdpa), copies),
    ]
    if with_flex and options.compiled:
        peers.append(flex_peer(copies, causal_rule if causal else None))
    if flashinfer() and copies[0][0].shape[0] == 1:
        peers += flashinfer_peers(copies, causal)
    return peers


def masked_peers(copies: list[tuple], options: Options, with_flex: bool = False) -> list[Candidate]:
    """For inputs (query, key, value, bool mask [batch or 1, 1, 1, kv_len])."""
    if options.device == "cpu":
        return eager_and_compiled("torch repeat_kv + mask", sdpa_repeat_kv, copies, options)
    peers = [
        eager("torch repeat_kv + mask", sdpa_repeat_kv, copies),
        eager("torch cuDNN, masked", with_backend(SDPBackend.CUDNN_ATTENTION, sdpa_masked), copies),
    ]
    if with_flex and options.compiled:
        live = copies[0][3].expand(copies[0][0].shape[0], 1, 1, -1)
        peers.append(flex_peer(copies, lambda batch, head, i, j: live[batch, 0, 0, j]))
    return peers


# ------------------------------------------------------------------------------------------------ FlashInfer


@functools.cache
def flashinfer() -> Any:
    """FlashInfer where it is installed and loads, else None."""
    try:
        import flashinfer
        import flashinfer.sampling
    except Exception:
        return None
    return flashinfer


def flashinfer_backends() -> tuple[str, ...]:
    """Its templates for prompts that this card runs: FA3 is for Hopper."""
    return ("fa2", "fa3") if torch.cuda.get_device_capability()[0] == 9 else ("fa2",)


def flashinfer_peers(copies: list[tuple], causal: bool = False) -> list[Candidate]:
    """Its kernels for one sequence, on its own layout (query `[len, heads, head_dim]`), made outside the timing."""
    library = flashinfer()
    own = [(q[0].transpose(0, 1).contiguous(), k[0], v[0]) for q, k, v, *_ in copies]

    def decode(query, key, value):
        return library.single_decode_with_kv_cache(query[0], key, value, kv_layout="HND")[None, :, None]

    def prefill(backend: str, options: dict) -> Callable:
        def attend(query, key, value):
            out = library.single_prefill_with_kv_cache(
                query, key, value, causal=causal, kv_layout="HND", backend=backend, **options
            )
            return out.transpose(0, 1)[None]

        return attend

    query, key, value = own[0]
    if query.shape[0] == 1:
        return [Candidate("FlashInfer", decode, inputs=own)]
    if query.dtype.itemsize > 1:
        return [Candidate(f"FlashInfer {b.upper()}", prefill(b, {}), inputs=own) for b in flashinfer_backends()]
    heads = query.shape[1], key.shape[0], value.shape[0]
    scales = {f"scale_{x}": torch.ones(n, device=query.device) for x, n in zip("qkv", heads, strict=True)}
    options = dict(scales, o_dtype=torch.bfloat16)
    return [Candidate(f"FlashInfer {b.upper()}", prefill(b, options), inputs=own) for b in flashinfer_backends()[1:]]
