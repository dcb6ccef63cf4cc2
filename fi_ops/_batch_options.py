"""What the batch wrappers' arguments mean for the ops: names of dtypes, backends, scales, splits and positions' tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._arguments import refuse, require
from .library._spec import FLOATS, FP8

_KV_LAYOUTS = ("NHD", "HND")
_POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")
# FlashInfer's names; there is one implementation a device, which chooses by shape.
_BACKENDS = ("auto", "fa2", "fa3", "cudnn", "cutlass", "cute-dsl", "trtllm-gen")
_UNIT_KEYS = 64  # fixed_split_size of the ops is a multiple of it
_NO_SPLIT = 1 << 30  # longer than any request


@dataclass(frozen=True)
class Settings:
    """The numbers and modes of attention that `plan` fixes for the runs that follow."""

    causal: bool = False
    pos_encoding_mode: str = "NONE"
    window_left: int = -1
    logits_soft_cap: float = 0.0
    sm_scale: float | None = None  # None: 1 / sqrt(head_dim)
    rope_scale: float = 1.0
    rope_theta: float = 1e4
    fixed_split_size: int = 0  # in keys


def settings_of(
    function: str, *, causal=False, pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, sm_scale=None,
    rope_scale=None, rope_theta=None, fixed_split_size=0,
) -> Settings:  # fmt: skip
    """Settings of FlashInfer's arguments, None where they have a default."""
    require(
        function,
        pos_encoding_mode in _POS_ENCODING_MODES,
        f"pos_encoding_mode must be one of {_POS_ENCODING_MODES}, got {pos_encoding_mode!r}; rotate q and k beforehand for others",
    )
    require(
        function,
        window_left >= -1,
        f"window_left must be -1 (no window) or more, got {window_left}; pass -1 for none",
    )
    return Settings(
        causal, pos_encoding_mode, window_left, logits_soft_cap or 0.0, sm_scale, 1.0 if rope_scale is None else rope_scale,
        1e4 if rope_theta is None else rope_theta, fixed_split_size,
    )  # fmt: skip


def check_kv_layout(function: str, kv_layout: str) -> None:
    require(
        function,
        kv_layout in _KV_LAYOUTS,
        f"kv_layout must be one of {_KV_LAYOUTS}, got {kv_layout!r}; pass 'NHD' or 'HND'",
    )


def check_heads(function: str, num_qo_heads: int, num_kv_heads: int) -> None:
    require(
        function,
        num_kv_heads >= 1 and num_qo_heads % num_kv_heads == 0,
        f"num_qo_heads must be a multiple of num_kv_heads, got {num_qo_heads} and {num_kv_heads}; repeat or drop heads",
    )


def check_backend(function: str, backend: str) -> None:
    require(function, backend in _BACKENDS, f"backend must be one of {_BACKENDS}, got {backend!r}; leave it at 'auto'")


def refuse_given(function: str, why: str, **arguments) -> None:
    """RuntimeError where an argument is given that would change results and that there is nothing here to obey."""
    for name, value in arguments.items():
        require(function, value is None, f"{name} is not supported: {why}; leave it out")


def positional_scales(function: str, q: torch.Tensor, args: tuple, q_scale, k_scale, v_scale) -> dict:
    """q_scale, k_scale and v_scale: by name or, where q is fp8, all three by position, as FlashInfer takes them."""
    named = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    if q.dtype in FP8 and len(args) == 3 and all(scale is None for scale in named.values()):
        return dict(zip(named, args, strict=True))
    require(
        function,
        not args,
        f"got {len(args)} positional arguments too many, which FlashInfer hands to kernels of jit_args (or, three, takes as an "
        f"fp8 query's scales); pass q_scale, k_scale, v_scale and sinks by name",
    )
    return named


def dtype_of(function: str, name: str, dtype: str | torch.dtype | None, allowed: tuple[torch.dtype, ...]):
    """A dtype or its name ("float16") as a torch.dtype; None stays."""
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    require(
        function,
        found in allowed,
        f"{name} must be one of {', '.join(str(t).removeprefix('torch.') for t in allowed)}, got {dtype}; convert the tensor",
    )
    return found


def dtypes_of(function: str, q_data_type, kv_data_type, o_data_type=None, fp8_queries: bool = False):
    """The dtypes of query, keys and values (query's by default) and output (query's, unless that is fp8); None: any."""
    query = dtype_of(function, "q_data_type", q_data_type, (*FLOATS, *FP8) if fp8_queries else FLOATS)
    keys = dtype_of(function, "kv_data_type", kv_data_type, (*FLOATS, *FP8))
    output = dtype_of(function, "o_data_type", o_data_type, FLOATS)
    if output is None and query not in FP8:
        output = query
    return query, query if keys is None else keys, output


def with_data_type(q_data_type, kv_data_type, data_type):
    """(q_data_type, kv_data_type), of which FlashInfer's older data_type says those that are left out; fp8 of keys alone."""
    if data_type is None:
        return q_data_type, kv_data_type
    is_fp8 = data_type in FP8 or data_type in [str(t).removeprefix("torch.") for t in FP8]
    if q_data_type in (None, "float16") and not is_fp8:
        q_data_type = data_type
    return q_data_type, data_type if kv_data_type is None else kv_data_type


def split_keys(function: str, fixed_split_size: int | None, disable_split_kv: bool, page_size: int) -> int:
    """The ops' fixed_split_size, in keys, of FlashInfer's, in pages (None and -1 are none), and of disable_split_kv."""
    if disable_split_kv:
        return _NO_SPLIT
    if fixed_split_size is None or fixed_split_size == -1:
        return 0
    require(
        function,
        fixed_split_size > 0,
        f"fixed_split_size must be a number of pages, or None or -1 for none, got {fixed_split_size}; pass 1 or more",
    )
    return -(-fixed_split_size * page_size // _UNIT_KEYS) * _UNIT_KEYS


def scales_of(function: str, q: torch.Tensor, num_kv_heads: int, scale: float, q_scale, k_scale, v_scale):
    """(q, scale, q_scale, k_scale, v_scale) as the ops take them, of numbers, tensors of one element and tensors of one a head.

    Numbers for q and k multiply the logits' scale; a tensor for k, and one for all of q, becomes k_scale. A tensor of a number a
    query head becomes q_scale where q is fp8, else it multiplies q itself, in its dtype.
    """
    query_scale = key_scale = None
    for name, factor in (("q_scale", q_scale), ("k_scale", k_scale)):
        if not isinstance(factor, torch.Tensor):
            scale = scale if factor is None else scale * factor
            continue
        flat = factor.reshape(-1).float()
        heads = q.shape[1] if name == "q_scale" else num_kv_heads
        if flat.shape[0] not in (1, heads):
            refuse(
                function,
                f"{name} must be a number or a tensor of 1 or {heads} elements, got {flat.shape[0]}; pass one a head",
            )
        if name == "q_scale" and flat.shape[0] not in (1, num_kv_heads):
            if q.dtype in FP8:
                query_scale = flat
            else:
                q = (q * flat[:, None]).to(q.dtype)
        else:
            key_scale = flat if key_scale is None else key_scale * flat
    if v_scale is None:
        value_scale = None
    elif isinstance(v_scale, torch.Tensor):
        value_scale = v_scale.reshape(-1).float()
    else:
        value_scale = torch.full((1,), v_scale, dtype=torch.float32, device=q.device)
    return q, scale, query_scale, key_scale, value_scale


def cos_sin_table(length: int, head_dim: int, rope_scale: float, rope_theta: float, device) -> torch.Tensor:
    """float32 `[length, head_dim]`: the cosines of all pairs, then the sines, of positions 0 on."""
    positions = torch.arange(length, device=device)
    return torch.cat(torch.ops.fi.rope_cos_sin(positions, head_dim, rope_scale=rope_scale, rope_theta=rope_theta), -1)
