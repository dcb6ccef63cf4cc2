"""Merging of attention states: outputs over parts of the keys, each with its LSE, become the output over all of them.

A state is v `[seq_len, num_heads, head_dim]` (any strides with a contiguous last dimension) and s `[seq_len, num_heads]`, float32,
the base-2 log-sum-exp of the logits. A state with s = -inf saw no key: it contributes nothing, whatever its v holds (NaN too);
all -inf give output 0 and -inf. float32 inside, v rounded once. The functions of FlashInfer's `cascade` module.
"""

from __future__ import annotations

import math

import torch

from ._checks import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_writable,
)
from ._reference import accumulate_dtype
from ._spec import FLOATS, Cost, ErrorSample, Sample, op


def _check_state(name: str, v_name: str, v, s_name: str, s, like, like_name: str) -> None:
    check_same_device(name, v_name, v, like_name, like)
    check_same_dtype(name, v_name, v, like_name, like)
    check_shape(name, v_name, v, like.shape, "[seq_len, num_heads, head_dim]")
    check_last_dim_contiguous(name, v_name, v)
    check_same_device(name, s_name, s, like_name, like)
    check_dtype(name, s_name, s, (torch.float32,))
    check_shape(name, s_name, s, like.shape[:2], "[seq_len, num_heads]")


def _check_first_state(name: str, v_name: str, v, s_name: str, s) -> None:
    check_dtype(name, v_name, v, FLOATS)
    check_ndim(name, v_name, v, 3, "[seq_len, num_heads, head_dim]")
    _check_state(name, v_name, v, s_name, s, v, v_name)


def _empty_state(v, seq_len, num_heads, head_dim):
    return (
        torch.empty((seq_len, num_heads, head_dim), dtype=v.dtype, device=v.device),
        torch.empty((seq_len, num_heads), dtype=torch.float32, device=v.device),
    )


def _merge_state_fake(v_a, s_a, v_b, s_b):
    name = "merge_state"
    _check_first_state(name, "v_a", v_a, "s_a", s_a)
    _check_state(name, "v_b", v_b, "s_b", s_b, v_a, "v_a")
    return _empty_state(v_a, *v_a.shape)


def _in_place_fake(v, s, v_other, s_other, mask=None):
    name = "merge_state_in_place"
    _check_first_state(name, "v", v, "s", s)
    _check_state(name, "v_other", v_other, "s_other", s_other, v, "v")
    check_writable(name, "v", v)
    check_writable(name, "s", s)
    if mask is not None:
        check_same_device(name, "mask", mask, "v", v)
        check_dtype(name, "mask", mask, (torch.bool,))
        check_shape(name, "mask", mask, (v.shape[0],), "[seq_len]")


def _merge_states_fake(v, s):
    name = "merge_states"
    check_dtype(name, "v", v, FLOATS)
    check_ndim(name, "v", v, 4, "[seq_len, num_states, num_heads, head_dim]")
    check_last_dim_contiguous(name, "v", v)
    check_same_device(name, "s", s, "v", v)
    check_dtype(name, "s", s, (torch.float32,))
    check_shape(name, "s", s, v.shape[:3], "[seq_len, num_states, num_heads]")
    seq_len, _, num_heads, head_dim = v.shape
    return _empty_state(v, seq_len, num_heads, head_dim)


# ---- samples ----


def _state(device, dtype, *shape):
    return torch.randn(*shape, device=device).to(dtype), torch.randn(shape[:-1], device=device) * 5


def _with_empty(s: torch.Tensor, every: int) -> torch.Tensor:
    s = s.clone()
    s.view(-1)[::every] = -math.inf
    return s


def _merge_state_samples(device, dtype):
    yield Sample((*_state(device, dtype, 7, 3, 128), *_state(device, dtype, 7, 3, 128)), name="typical")
    yield Sample((*_state(device, dtype, 2, 3, 41), *_state(device, dtype, 2, 3, 41)), name="odd head_dim")
    (va, sa), (vb, sb) = _state(device, dtype, 6, 4, 64), _state(device, dtype, 6, 4, 64)
    yield Sample((va, _with_empty(sa, 2), vb, _with_empty(sb, 3)), name="empty states, also both")
    yield Sample(
        (va, _with_empty(sa, 1), torch.full_like(va, math.nan), _with_empty(sb, 1)),
        name="all empty, NaN in an unread v",
    )
    yield Sample((va, sa + 1e4, vb, sb - 1e4), name="LSEs far apart")
    big_v, big_s = _state(device, dtype, 8, 4, 3, 80)
    yield Sample((big_v[::2, 0], big_s[::2, 0], big_v[1::2, 2], big_s[1::2, 2]), name="strided")
    heads_first = torch.randn(4, 6, 64, device=device).to(dtype).transpose(0, 1)
    yield Sample((heads_first, sa.t().contiguous().t(), vb, sb), name="heads outermost")
    yield Sample((va[:1].expand(6, 4, 64), sa[:, :1].expand(6, 4), vb, sb), name="expanded")
    yield Sample((*_state(device, dtype, 0, 4, 64), *_state(device, dtype, 0, 4, 64)), name="no tokens")


def _in_place_samples(device, dtype):
    for sample in _merge_state_samples(device, dtype):
        if sample.name != "expanded":
            yield sample
    mask = torch.arange(7, device=device) % 3 != 0
    yield Sample((*_state(device, dtype, 7, 3, 64), *_state(device, dtype, 7, 3, 64), mask), name="mask")
    strided = mask.repeat_interleave(2)[::2]
    yield Sample((*_state(device, dtype, 7, 3, 64), *_state(device, dtype, 7, 3, 64), strided), name="strided mask")


def _merge_states_samples(device, dtype):
    yield Sample(_state(device, dtype, 7, 5, 3, 64), name="typical")
    yield Sample(_state(device, dtype, 2, 33, 3, 41), name="many states, odd head_dim")
    v, s = _state(device, dtype, 4, 3, 2, 64)
    yield Sample((v, _with_empty(s, 2)), name="empty states")
    s = s.clone()
    s[1], s[2, 1] = -math.inf, -math.inf
    v = v.clone()
    v[1], v[2, 1] = math.nan, math.nan
    yield Sample((v, s), name="a token all empty, NaN in unread values")
    v, s = _state(device, dtype, 5, 2, 4, 80)
    yield Sample((v.transpose(1, 2), s.transpose(1, 2)), name="states and heads transposed")
    yield Sample(_state(device, dtype, 3, 1, 2, 64), name="one state")
    yield Sample(_state(device, dtype, 3, 0, 2, 64), name="no states")
    yield Sample(_state(device, dtype, 0, 3, 2, 64), name="no tokens")


def _pair_errors(device, first: str, other: str):
    def names(prefix: str):
        return (f"{prefix}_a", f"{prefix}_b") if first == "a" else (prefix, f"{prefix}_other")

    (v1, v2), (s1, s2) = names("v"), names("s")
    (va, sa), (vb, sb) = _state(device, torch.float32, 4, 2, 8), _state(device, torch.float32, 4, 2, 8)
    yield ErrorSample((va.double(), sa, vb, sb), rf"{v1} must be float32, bfloat16 or float16, got float64; convert")
    yield ErrorSample((va[0], sa, vb, sb), rf"{v1} must be \[seq_len, num_heads, head_dim\], got \[2, 8\]; reshape")
    yield ErrorSample(
        (va.mT, sa, vb, sb), rf"{v1} must have a contiguous last dimension, got strides \[16, 1, 8\]; call"
    )
    yield ErrorSample((va, sa.half(), vb, sb), rf"{s1} must be float32, got float16; convert")
    yield ErrorSample((va, sa.t(), vb, sb), rf"{s1} must be \[seq_len, num_heads\] = \[4, 2\], got \[2, 4\]; check")
    yield ErrorSample((va, sa, vb.half(), sb), rf"{v2} must have {v1}'s dtype float32, got float16; convert")
    yield ErrorSample(
        (va, sa, vb[:3], sb), rf"{v2} must be \[seq_len, num_heads, head_dim\] = \[4, 2, 8\], got \[3, 2, 8\]; check"
    )
    yield ErrorSample((va, sa, vb, sb[:, :1]), rf"{s2} must be \[seq_len, num_heads\] = \[4, 2\], got \[4, 1\]; check")
    yield ErrorSample((va, sa, vb, sb.double()), rf"{s2} must be float32, got float64; convert")
    yield ErrorSample(
        (va, sa, vb.clone().requires_grad_(), sb), r"has no backward, got an input that requires grad; call it under"
    )


def _merge_state_errors(device):
    yield from _pair_errors(device, "a", "b")


def _in_place_errors(device):
    yield from _pair_errors(device, "", "other")
    (v, s), other = _state(device, torch.float32, 4, 2, 8), _state(device, torch.float32, 4, 2, 8)
    mask = torch.ones(4, dtype=torch.bool, device=device)
    yield ErrorSample((v, s, *other, mask.int()), r"mask must be bool, got int32; convert")
    yield ErrorSample((v, s, *other, mask[:3]), r"mask must be \[seq_len\] = \[4\], got \[3\]; check")
    yield ErrorSample(
        (v[:1].expand(4, 2, 8), s, *other), r"v is written and must not be expanded, got strides \[0, 8, 1\]; call"
    )
    yield ErrorSample(
        (v, s[:, :1].expand(4, 2), *other), r"s is written and must not be expanded, got strides \[2, 0\]; call"
    )


def _merge_states_errors(device):
    v, s = _state(device, torch.float32, 4, 3, 2, 8)
    yield ErrorSample((v.int(), s), r"v must be float32, bfloat16 or float16, got int32; convert")
    yield ErrorSample((v[0], s), r"v must be \[seq_len, num_states, num_heads, head_dim\], got \[3, 2, 8\]; reshape")
    yield ErrorSample((v.mT, s), r"v must have a contiguous last dimension, got strides \[48, 16, 1, 8\]; call")
    yield ErrorSample((v, s.bfloat16()), r"s must be float32, got bfloat16; convert")
    yield ErrorSample((v, s[0]), r"s must be \[seq_len, num_states, num_heads\] = \[4, 3, 2\], got \[3, 2\]; check")
    yield ErrorSample(
        (v.clone().requires_grad_(), s), r"has no backward, got an input that requires grad; call it under"
    )


def _pair_cost(v, s, v_other, s_other, mask=None):
    return Cost(bytes=3 * (v.nbytes + s.nbytes), flops=3 * v.numel())


def _states_cost(v, s):
    states = max(v.shape[1], 1)
    return Cost(bytes=v.nbytes + s.nbytes + (v.nbytes + s.nbytes) // states, flops=2 * v.numel())


# ---- references ----


def _merge(v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States along dim 1: v `[seq_len, num_states, num_heads, head_dim]`, s `[seq_len, num_states, num_heads]`."""
    dtype = accumulate_dtype(v)
    v, s = v.to(dtype), s.to(dtype)
    top = s.amax(1, keepdim=True) if s.shape[1] else s.new_full((s.shape[0], 1, s.shape[2]), -math.inf)
    weights = torch.where(s == -math.inf, 0, torch.exp2(s - top))
    total = weights.sum(1)
    used = torch.where((s == -math.inf)[..., None], 0, v)
    merged = (used * weights[..., None]).sum(1) / torch.where(total == 0, 1, total)[..., None]
    return merged, top.squeeze(1) + torch.log2(total)


@op(
    "(Tensor v_a, Tensor s_a, Tensor v_b, Tensor s_b) -> (Tensor, Tensor)",
    fake=_merge_state_fake,
    samples=_merge_state_samples,
    errors=_merge_state_errors,
    cost=_pair_cost,
)
def merge_state(v_a, s_a, v_b, s_b):
    """The attention state over the keys of both: `(2^s_a v_a + 2^s_b v_b) / (2^s_a + 2^s_b)` and `log2(2^s_a + 2^s_b)`."""
    v, s = _merge(torch.stack((v_a, v_b), 1), torch.stack((s_a, s_b), 1))
    return v.to(v_a.dtype), s.to(s_a.dtype)


@op(
    "(Tensor(a!) v, Tensor(b!) s, Tensor v_other, Tensor s_other, Tensor? mask=None) -> ()",
    fake=_in_place_fake,
    samples=_in_place_samples,
    errors=_in_place_errors,
    cost=_pair_cost,
)
def merge_state_in_place(v, s, v_other, s_other, mask=None):
    """`merge_state` of (v, s) and the other into (v, s), where `mask` (bool, `[seq_len]`) says so; other tokens stay."""
    merged_v, merged_s = _merge(torch.stack((v, v_other), 1), torch.stack((s, s_other), 1))
    if mask is not None:
        merged_v = torch.where(mask[:, None, None], merged_v, v)
        merged_s = torch.where(mask[:, None], merged_s, s)
    v.copy_(merged_v)
    s.copy_(merged_s)


@op(
    "(Tensor v, Tensor s) -> (Tensor, Tensor)",
    fake=_merge_states_fake,
    samples=_merge_states_samples,
    errors=_merge_states_errors,
    cost=_states_cost,
)
def merge_states(v, s):
    """All states of dim 1 merged into one: v `[seq_len, num_states, num_heads, head_dim]`, s `[seq_len, num_states, num_heads]`."""
    merged_v, merged_s = _merge(v, s)
    return merged_v.to(v.dtype), merged_s.to(s.dtype)
