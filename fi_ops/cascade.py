"""Merging of attention states with FlashInfer's names, arguments and defaults (`flashinfer.cascade`), over `torch.ops.fi`.

A state is the output of attention over a part of the keys, v `[seq_len, num_heads, head_dim]` (float32, bfloat16 or float16),
and the base-2 log-sum-exp of its logits, s `[seq_len, num_heads]`. A state with s = -inf contributes nothing, whatever its v
holds; where all are -inf the result is 0 and -inf. `RuntimeError` for shapes, dtypes, devices or strides that don't fit.
"""

from __future__ import annotations

import torch

__all__ = ["merge_state", "merge_state_in_place", "merge_states"]


def merge_state(
    v_a: torch.Tensor, s_a: torch.Tensor, v_b: torch.Tensor, s_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge two states.

    Args:
        v_a, v_b: `[seq_len, num_heads, head_dim]`, one dtype.
        s_a, s_b: `[seq_len, num_heads]`, converted to float32 where they are not.

    Returns:
        v `[seq_len, num_heads, head_dim]` in v_a's dtype and s `[seq_len, num_heads]`, float32.

    Source: FlashInfer `merge_state`.
    """
    return torch.ops.fi.merge_state(v_a, s_a.float(), v_b, s_b.float())


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """Merge another state into (v, s), in place.

    Args:
        v: `[seq_len, num_heads, head_dim]`, overwritten.
        s: `[seq_len, num_heads]`, overwritten; must be float32 (FlashInfer converts, and then writes to the copy).
        v_other: like v.
        s_other: like s, converted to float32 where it is not.
        mask: bool `[seq_len]`, the tokens to merge; others keep their state. None merges all.

    Source: FlashInfer `merge_state_in_place`.
    """
    torch.ops.fi.merge_state_in_place(v, s, v_other, s_other.float(), mask)


def merge_states(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge any number of states.

    Args:
        v: `[seq_len, num_states, num_heads, head_dim]`.
        s: `[seq_len, num_states, num_heads]`, converted to float32 where it is not.

    Returns:
        v `[seq_len, num_heads, head_dim]` in v's dtype and s `[seq_len, num_heads]`, float32.

    Source: FlashInfer `merge_states`.
    """
    return torch.ops.fi.merge_states(v, s.float())
