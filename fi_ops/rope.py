"""Rotary embedding with FlashInfer's names, arguments and defaults (`flashinfer.rope`), over `torch.ops.fi`.

Arguments that recur:
    q, k: `[nnz, num_qo_heads, head_dim]` and `[nnz, num_kv_heads, head_dim]`, ragged: the tokens of all requests one after the
        other; one dtype (float32, bfloat16, float16), last dim contiguous, other strides free.
    indptr: int32 or int64 `[batch + 1]`, from 0 to nnz: request i has the tokens `indptr[i]:indptr[i + 1]`.
    offsets: int32 or int64 `[batch]`: the position of each request's first token.
    pos_ids: int32 or int64 `[nnz]`: the position of each token.
    rotary_dim: how much of the head is rotated, even; None is all of it.
    interleave: False pairs (i, i + rotary_dim / 2) (NeoX), True pairs (2i, 2i + 1) (GPT-J).
    rope_scale, rope_theta: the angle of pair i at a position is `position / rope_scale * rope_theta^(-2i / rotary_dim)`.
    low_freq_factor, high_freq_factor, old_context_len: Llama 3.1's frequency scaling (see `torch.ops.fi.rope_cos_sin`).

The functions without `_inplace` return (q, k) rotated, in the inputs' shapes, dtypes and order of strides; those with it write
q and k. Angles in float64: right to float32 rounding at any position. All raise `RuntimeError` for shapes, dtypes, devices or
strides that don't fit, before anything is written.
"""

from __future__ import annotations

import torch

from ._arguments import require

__all__ = [
    "apply_llama31_rope",
    "apply_llama31_rope_inplace",
    "apply_llama31_rope_pos_ids",
    "apply_llama31_rope_pos_ids_inplace",
    "apply_rope",
    "apply_rope_inplace",
    "apply_rope_pos_ids",
    "apply_rope_pos_ids_inplace",
    "apply_rope_with_cos_sin_cache",
    "apply_rope_with_cos_sin_cache_inplace",
]


def _positions(function: str, q: torch.Tensor, indptr: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The position of each token, from its request's indptr and offset; no value is read back, so this compiles."""
    require(function, q.dim() == 3, f"q must be [nnz, num_qo_heads, head_dim], got {list(q.shape)}; reshape it")
    require(
        function,
        indptr.dim() == 1 and offsets.dim() == 1 and indptr.shape[0] == offsets.shape[0] + 1,
        f"indptr must be [batch + 1] and offsets [batch], got {list(indptr.shape)} and {list(offsets.shape)}; check the batch size",
    )
    for name, t in (("indptr", indptr), ("offsets", offsets)):
        require(
            function,
            t.dtype in (torch.int32, torch.int64),
            f"{name} must be int32 or int64, got {t.dtype}; convert it with .to()",
        )
        require(
            function,
            t.device == q.device,
            f"{name} must be on q's device {q.device}, got {t.device}; move it with .to()",
        )
    nnz = q.shape[0]
    if (
        q.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(indptr, torch._subclasses.FakeTensor)
    ):
        values = indptr.tolist()
        require(
            function,
            values[0] == 0 and values[-1] == nnz,
            f"indptr must go from 0 to q's {nnz} tokens, got {values[0]} to {values[-1]}; check it",
        )
        require(function, values == sorted(values), "indptr must not decrease, got one that does; sort the requests")
    token = torch.arange(nnz, device=q.device, dtype=indptr.dtype)
    request = torch.searchsorted(indptr[1:].contiguous(), token, right=True)
    return token - indptr[request] + offsets[request]


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)[None]


def _rotate(function: str, q, k, cos, sin, positions, interleave: bool, rotary_dim: int, in_place: bool):
    for name, t in (("q", q), ("k", k)):
        require(function, t.dim() == 3, f"{name} must be [nnz, num_heads, head_dim], got {list(t.shape)}; reshape it")
    op = torch.ops.fi.rope_ if in_place else torch.ops.fi.rope
    rotated = op(
        _heads_first(q), _heads_first(k), cos[None], sin[None], positions, interleaved=interleave, rotary_dim=rotary_dim
    )
    return None if in_place else tuple(x[0].transpose(0, 1) for x in rotated)


def _rotate_at(function: str, q, k, pos_ids, rotary_dim, interleave: bool, in_place: bool, **scaling):
    require(function, q.dim() == 3, f"q must be [nnz, num_qo_heads, head_dim], got {list(q.shape)}; reshape it")
    require(function, pos_ids.dim() == 1, f"pos_ids must be [nnz], got {list(pos_ids.shape)}; reshape it")
    rotary_dim = q.shape[-1] if rotary_dim is None else rotary_dim
    require(
        function, rotary_dim > 0, f"rotary_dim must be positive or None, got {rotary_dim}; None rotates the whole head"
    )
    cos, sin = torch.ops.fi.rope_cos_sin(pos_ids, rotary_dim, **scaling)
    return _rotate(function, q, k, cos, sin, None, interleave, rotary_dim, in_place)


def _plain(rope_scale: float, rope_theta: float) -> dict:
    return {"rope_scale": float(rope_scale), "rope_theta": float(rope_theta)}


def _llama31(rope_scale: float, rope_theta: float, low: float, high: float, old_context_len: int) -> dict:
    factors = {"low_freq_factor": float(low), "high_freq_factor": float(high), "old_context_len": int(old_context_len)}
    return _plain(rope_scale, rope_theta) | factors


def apply_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE of ragged queries and keys, positions from indptr and offsets; arguments as in the module.

    Returns:
        q and k rotated.

    Source: FlashInfer `apply_rope`.
    """
    where = _positions("apply_rope", q, indptr, offsets)
    return _rotate_at("apply_rope", q, k, where, rotary_dim, interleave, False, **_plain(rope_scale, rope_theta))


def apply_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope` in place. Source: FlashInfer `apply_rope_inplace`."""
    where = _positions("apply_rope_inplace", q, indptr, offsets)
    _rotate_at("apply_rope_inplace", q, k, where, rotary_dim, interleave, True, **_plain(rope_scale, rope_theta))


def apply_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE of ragged queries and keys at the positions `pos_ids`; arguments as in the module.

    Returns:
        q and k rotated.

    Source: FlashInfer `apply_rope_pos_ids`.
    """
    return _rotate_at(
        "apply_rope_pos_ids", q, k, pos_ids, rotary_dim, interleave, False, **_plain(rope_scale, rope_theta)
    )


def apply_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope_pos_ids` in place. Source: FlashInfer `apply_rope_pos_ids_inplace`."""
    _rotate_at(
        "apply_rope_pos_ids_inplace", q, k, pos_ids, rotary_dim, interleave, True, **_plain(rope_scale, rope_theta)
    )


def apply_llama31_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE with Llama 3.1's frequencies, positions from indptr and offsets; arguments as in the module.

    Returns:
        q and k rotated.

    Source: FlashInfer `apply_llama31_rope`.
    """
    where = _positions("apply_llama31_rope", q, indptr, offsets)
    scaling = _llama31(rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return _rotate_at("apply_llama31_rope", q, k, where, rotary_dim, interleave, False, **scaling)


def apply_llama31_rope_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    indptr: torch.Tensor,
    offsets: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope` in place. Source: FlashInfer `apply_llama31_rope_inplace`."""
    where = _positions("apply_llama31_rope_inplace", q, indptr, offsets)
    scaling = _llama31(rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    _rotate_at("apply_llama31_rope_inplace", q, k, where, rotary_dim, interleave, True, **scaling)


def apply_llama31_rope_pos_ids(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE with Llama 3.1's frequencies at the positions `pos_ids`; arguments as in the module.

    Returns:
        q and k rotated.

    Source: FlashInfer `apply_llama31_rope_pos_ids`.
    """
    scaling = _llama31(rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    return _rotate_at("apply_llama31_rope_pos_ids", q, k, pos_ids, rotary_dim, interleave, False, **scaling)


def apply_llama31_rope_pos_ids_inplace(
    q: torch.Tensor,
    k: torch.Tensor,
    pos_ids: torch.Tensor,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1,
    high_freq_factor: float = 4,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope_pos_ids` in place. Source: FlashInfer `apply_llama31_rope_pos_ids_inplace`."""
    scaling = _llama31(rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len)
    _rotate_at("apply_llama31_rope_pos_ids_inplace", q, k, pos_ids, rotary_dim, interleave, True, **scaling)


def _with_cache(function: str, positions, query, key, head_size: int, cos_sin_cache, is_neox: bool, in_place: bool):
    for name, t in (("query", query), ("key", key)):
        require(
            function,
            t.dim() == 2 and head_size > 0 and t.shape[1] % head_size == 0,
            f"{name} must be [nnz, num_heads * head_size] with head_size {head_size}, got {list(t.shape)}; check head_size",
        )
    require(
        function,
        cos_sin_cache.dtype == torch.float32 and cos_sin_cache.dim() == 2 and cos_sin_cache.shape[1] % 2 == 0,
        f"cos_sin_cache must be float32 [max_seq_len, rotary_dim], got {cos_sin_cache.dtype} {list(cos_sin_cache.shape)}; "
        f"cat cos and sin along the last dimension",
    )
    require(function, positions.dim() == 1, f"positions must be [nnz], got {list(positions.shape)}; flatten it")
    cos, sin = cos_sin_cache.chunk(2, -1)
    q, k = (t.unflatten(1, (t.shape[1] // head_size, head_size)) for t in (query, key))
    rotated = _rotate(function, q, k, cos, sin, positions, not is_neox, cos_sin_cache.shape[1], in_place)
    return None if in_place else tuple(x.flatten(1) for x in rotated)


def apply_rope_with_cos_sin_cache(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE by a table of cos and sin, in vLLM's and SGLang's form.

    Args:
        positions: int32 or int64 `[nnz]`: the row of the table that each token takes; out of range is an error.
        query: `[nnz, num_qo_heads * head_size]`, float32, bfloat16 or float16.
        key: `[nnz, num_kv_heads * head_size]`, query's dtype.
        head_size: the size of one head; the first `rotary_dim` elements of each are rotated.
        cos_sin_cache: float32 `[max_seq_len, rotary_dim]`, the cosines of all pairs, then the sines.
        is_neox: True pairs (i, i + rotary_dim / 2), False pairs (2i, 2i + 1).

    Returns:
        query and key rotated, in their shapes and dtypes.

    Source: FlashInfer `apply_rope_with_cos_sin_cache`.
    """
    function = "apply_rope_with_cos_sin_cache"
    return _with_cache(function, positions, query, key, head_size, cos_sin_cache, is_neox, in_place=False)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """`apply_rope_with_cos_sin_cache` in place. Source: FlashInfer `apply_rope_with_cos_sin_cache_inplace`."""
    function = "apply_rope_with_cos_sin_cache_inplace"
    _with_cache(function, positions, query, key, head_size, cos_sin_cache, is_neox, in_place=True)
