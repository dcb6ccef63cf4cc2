"""The first calls that FlashInfer's documentation shows, with only the import changed and the device set.

    python examples/readme_flashinfer.py [device]

One sequence of 2,048 tokens: a decode step, an append of 128 tokens, a prefill, each plain and with RoPE applied to
queries and keys inside the kernel. The calls, their arguments and their defaults are FlashInfer's.
"""

from __future__ import annotations

import sys

import torch

import fi_ops as flashinfer

KV_LEN, APPEND_LEN = 2048, 128
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 32, 128


def run(device: torch.device | str) -> dict[str, torch.Tensor]:
    """Every output by name, with the tensors it was computed from."""
    k = torch.randn(KV_LEN, NUM_KV_HEADS, HEAD_DIM).half().to(device)
    v = torch.randn(KV_LEN, NUM_KV_HEADS, HEAD_DIM).half().to(device)
    out = {"k": k, "v": v}

    # decode: one new token over the whole cache
    q = torch.randn(NUM_QO_HEADS, HEAD_DIM).half().to(device)
    out["decode.q"] = q
    out["decode"] = flashinfer.single_decode_with_kv_cache(q, k, v)
    out["decode.rope"] = flashinfer.single_decode_with_kv_cache(q, k, v, pos_encoding_mode="ROPE_LLAMA")

    # append: the last 128 tokens of the cache are the new ones, causal among themselves
    q = torch.randn(APPEND_LEN, NUM_QO_HEADS, HEAD_DIM).half().to(device)
    out["append.q"] = q
    out["append"] = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)
    out["append.rope"] = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, pos_encoding_mode="ROPE_LLAMA")

    # prefill: every token is new; without a mask, and causal
    q = torch.randn(KV_LEN, NUM_QO_HEADS, HEAD_DIM).half().to(device)
    out["prefill.q"] = q
    out["prefill.full"] = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=False)
    out["prefill"] = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)
    out["prefill.rope"] = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, pos_encoding_mode="ROPE_LLAMA")
    return out


def main() -> int:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = sys.argv[1] if len(sys.argv) > 1 else default
    torch.manual_seed(0)
    for name, tensor in run(device).items():
        if name not in ("k", "v") and not name.endswith(".q"):
            print(f"{name:14s} {tuple(tensor.shape)!s:16s} {tensor.dtype}  norm {tensor.float().norm():.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
