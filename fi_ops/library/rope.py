"""Rotary embedding (RoPE) of queries and keys, out of place and in place, and its tables of cos and sin.

Shapes: query `[batch, num_qo_heads, len, head_dim]`, key `[batch, num_kv_heads, len, head_dim]`, any strides with a contiguous
last dimension (ragged `[nnz, heads, head_dim]` is the view `x.transpose(0, 1)[None]`). cos and sin: `[1 or batch, len, R or 2R]`,
or with `positions` (`[len]` or `[batch, len]`, int32 or int64) `[1 or batch, max_len, R or 2R]`, of which token (b, l) takes row
`positions[b, l]`. 2R = rotary_dim (0: head_dim); the rest of each head passes through. Pairs are (i, i + R) (rotate-half,
NeoX) or, interleaved, (2i, 2i + 1) (GPT-J). Tables R wide have one value a pair, tables 2R wide one for each element: there
the halves, or neighbours, need not be the same. Products in float32, rounded once. Sources: RoFormer; FlashInfer's `rope` module.
"""

from __future__ import annotations

import math

import torch

from ._attention_checks import check_cos_sin, number
from ._checks import (
    check,
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_writable,
)
from ._reference import rotate
from ._spec import FLOATS, INDEX_TYPES, Cost, ErrorSample, Sample, op

_ROPE = "Tensor cos, Tensor sin, Tensor? positions=None, *, bool interleaved=False, int rotary_dim=0"


def _check_rope(name: str, query, key, cos, sin, positions, rotary_dim: int) -> None:
    check_dtype(name, "query", query, FLOATS)
    check_ndim(name, "query", query, 4, "[batch, num_qo_heads, len, head_dim]")
    check_last_dim_contiguous(name, "query", query)
    batch, _, length, head_dim = query.shape
    check_same_device(name, "key", key, "query", query)
    check_same_dtype(name, "key", key, "query", query)
    check_ndim(name, "key", key, 4, "[batch, num_kv_heads, len, head_dim]")
    check_last_dim_contiguous(name, "key", key)
    check_shape(name, "key", key, (batch, key.shape[1], length, head_dim), "[batch, num_kv_heads, len, head_dim]")
    if positions is None:
        check_cos_sin(name, cos, sin, query, length, rotary_dim, "len")
        return
    check_ndim(name, "cos", cos, 3, "[1 or batch, max_len, R or 2R]")
    check_cos_sin(name, cos, sin, query, cos.shape[1], rotary_dim, "max_len")
    check_same_device(name, "positions", positions, "query", query)
    check_dtype(name, "positions", positions, INDEX_TYPES)
    if positions.dim() == 2:
        check_shape(name, "positions", positions, (batch, length), "[batch, len]")
    else:
        check_shape(name, "positions", positions, (length,), "[len] or [batch, len]")


def _rope_fake(query, key, cos, sin, positions=None, *, interleaved=False, rotary_dim=0):
    _check_rope("rope", query, key, cos, sin, positions, rotary_dim)
    return torch.empty_like(query), torch.empty_like(key)


def _rope_in_place_fake(query, key, cos, sin, positions=None, *, interleaved=False, rotary_dim=0):
    _check_rope("rope_", query, key, cos, sin, positions, rotary_dim)
    check_writable("rope_", "query", query)
    check_writable("rope_", "key", key)


def _cos_sin_fake(
    positions,
    rotary_dim,
    *,
    rope_scale=1.0,
    rope_theta=10000.0,
    low_freq_factor=0.0,
    high_freq_factor=0.0,
    old_context_len=0,
):
    name = "rope_cos_sin"
    check_dtype(name, "positions", positions, INDEX_TYPES)
    check(
        name,
        rotary_dim > 0 and rotary_dim % 2 == 0,
        lambda: (
            f"rotary_dim must be positive and even, got {rotary_dim}; pass the number of rotated elements of a head"
        ),
    )
    check(
        name,
        rope_scale > 0 and math.isfinite(rope_scale),
        lambda: f"rope_scale must be positive and finite, got {number(rope_scale)}; pass 1 for none",
    )
    check(
        name,
        rope_theta > 0 and math.isfinite(rope_theta),
        lambda: (
            f"rope_theta must be positive and finite, got {number(rope_theta)}; pass the model's base, such as 10000"
        ),
    )
    check(
        name,
        old_context_len >= 0,
        lambda: (
            f"old_context_len must be 0 (plain frequencies) or more, got {old_context_len}; pass 0 for no Llama 3.1 scaling"
        ),
    )
    check(
        name,
        old_context_len == 0 or 0 <= low_freq_factor < high_freq_factor < math.inf,
        lambda: (
            f"low_freq_factor and high_freq_factor must be 0 <= low < high with old_context_len, got {number(low_freq_factor)} "
            f"and {number(high_freq_factor)}; Llama 3.1 has 1 and 4"
        ),
    )
    shape = (*positions.shape, rotary_dim // 2)
    return tuple(torch.empty(shape, dtype=torch.float32, device=positions.device) for _ in range(2))


# ---- samples ----


def _table(device, dtype, batch: int, length: int, pairs: int, *, width: int = 1):
    """cos and sin of random angles, `[batch, length, width * pairs]`; width 2 has other ones for the two members of a pair."""
    angle = torch.randn(batch, length, width * pairs, device=device) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rope_samples(device, dtype, dense_only: bool = False):
    f32 = torch.float32

    def heads(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    def positions(*shape, high: int, index=torch.int64):
        return torch.randint(high, shape, device=device, dtype=index)

    repeated = [torch.cat((t, t), -1) for t in _table(device, dtype, 1, 5, 16)]
    yield Sample((heads(2, 6, 5, 32), heads(2, 3, 5, 32), *repeated), name="Hugging Face: full-width tables")
    halves = [t[..., :16] for t in repeated]
    yield Sample((heads(2, 6, 5, 32), heads(2, 3, 5, 32), *halves), name="first halves of full-width tables")
    for interleaved in (False, True):
        kind = {"interleaved": interleaved}
        word = "interleaved" if interleaved else "rotate-half"
        for width in (1, 2):
            table = _table(device, f32, 2, 7, 20, width=width)
            yield Sample((heads(2, 3, 7, 40), heads(2, 1, 7, 40), *table), kind, f"{word}, odd sizes, width {width}R")
        table = _table(device, dtype, 1, 3, 12, width=2)
        yield Sample(
            (heads(1, 2, 3, 80), heads(1, 2, 3, 80), *table), {**kind, "rotary_dim": 24}, f"{word}, partial rotary_dim"
        )
        nhd = [heads(2, 6, h, 64).transpose(1, 2) for h in (4, 2)]
        table = [t.expand(2, -1, -1) for t in _table(device, f32, 1, 6, 32)]
        yield Sample((*nhd, *table), kind, f"{word}, transposed views, expanded tables")
        table = _table(device, f32, 1, 50, 16)
        where = positions(2, 9, high=50, index=torch.int32)
        yield Sample(
            (heads(2, 4, 9, 32), heads(2, 4, 9, 32), *table, where), kind, f"{word}, int32 positions per batch"
        )
        wide = heads(3, 4, 1, 96)[..., 16:80], heads(3, 2, 1, 96)[..., 16:80]
        yield Sample(
            (*wide, *_table(device, dtype, 3, 8, 32), positions(1, high=8)),
            kind,
            f"{word}, one token, strided rows, positions [len]",
        )
    table = [t[:, ::2] for t in _table(device, f32, 1, 12, 8)]
    where = positions(2, 10, high=6)[:, ::2]
    yield Sample(
        (heads(2, 2, 5, 16), heads(2, 0, 5, 16), *table, where), name="strided tables and positions, no KV heads"
    )
    cache = torch.randn(40, 64, device=device)
    cos, sin = cache.chunk(2, -1)
    packed = heads(130, 6, 64).transpose(0, 1)[None]
    yield Sample(
        (packed[:, :4], packed[:, 4:], cos[None], sin[None], positions(130, high=40)),
        name="ragged, packed qk, cos-sin cache",
    )
    yield Sample((heads(1, 2, 0, 16), heads(1, 2, 0, 16), *_table(device, f32, 1, 0, 8)), name="no tokens")
    if not dense_only:
        yield Sample(
            (heads(1, 1, 4, 16).expand(2, 3, 4, 16), heads(2, 1, 4, 16), *_table(device, f32, 1, 4, 8)),
            name="expanded query",
        )


def _rope_in_place_samples(device, dtype):
    return _rope_samples(device, dtype, dense_only=True)


def _rope_errors(device):
    q, k = torch.randn(2, 4, 5, 16, device=device), torch.randn(2, 2, 5, 16, device=device)
    cos, sin = _table(device, torch.float32, 1, 5, 8)
    where = torch.arange(5, device=device)
    yield ErrorSample((q.double(), k, cos, sin), r"query must be float32, bfloat16 or float16, got float64; convert")
    yield ErrorSample(
        (q[0], k, cos, sin), r"query must be \[batch, num_qo_heads, len, head_dim\], got \[4, 5, 16\]; reshape"
    )
    yield ErrorSample(
        (q.mT, k, cos, sin), r"query must have a contiguous last dimension, got strides \[320, 80, 1, 16\]; call"
    )
    yield ErrorSample((q, k.half(), cos, sin), r"key must have query's dtype float32, got float16; convert")
    yield ErrorSample(
        (q, k[0], cos, sin), r"key must be \[batch, num_kv_heads, len, head_dim\], got \[2, 5, 16\]; reshape"
    )
    yield ErrorSample((q, k[:, :, :4], cos, sin), r"key must be .* = \[2, 2, 5, 16\], got \[2, 2, 4, 16\]; check")
    yield ErrorSample(
        (q, k.clone().requires_grad_(), cos, sin), r"has no backward, got an input that requires grad; call it under"
    )
    for rotary_dim in (18, 7, -2):
        text = rf"rotary_dim must be even and at most head_dim 16, got {rotary_dim}; pass 0"
        yield ErrorSample((q, k, cos, sin), text, {"rotary_dim": rotary_dim})
    want = r"must be \[1 or batch, len, R or 2R\] = \[1 or 2, 5, 8 or 16\], got"
    yield ErrorSample((q, k, cos[0], sin), rf"cos {want} \[5, 8\]; check rotary_dim")
    yield ErrorSample((q, k, cos, sin[:, :4]), rf"sin {want} \[1, 4, 8\]; check rotary_dim")
    yield ErrorSample((q, k, cos[..., :6], sin[..., :6]), rf"cos {want} \[1, 5, 6\]; check rotary_dim")
    yield ErrorSample((q, k, cos.half(), sin), r"cos must be float32, got float16; convert")
    yield ErrorSample((q.half(), k.half(), cos, sin.half()), r"sin must have cos's dtype float32, got float16; convert")
    yield ErrorSample(
        (q, k, cos, sin.expand(2, -1, -1)), r"sin must be cos's shape = \[1, 5, 8\], got \[2, 5, 8\]; check"
    )
    yield ErrorSample(
        (q, k, cos, sin.mT.contiguous().mT),
        r"sin must have a contiguous last dimension, got strides \[40, 1, 5\]; call",
    )
    yield ErrorSample(
        (q, k, cos[0], sin[0], where), r"cos must be \[1 or batch, max_len, R or 2R\], got \[5, 8\]; reshape"
    )
    yield ErrorSample((q, k, cos, sin, where.short()), r"positions must be int32 or int64, got int16; convert")
    yield ErrorSample(
        (q, k, cos, sin, where[:4]), r"positions must be \[len\] or \[batch, len\] = \[5\], got \[4\]; check"
    )
    yield ErrorSample(
        (q, k, cos, sin, where.expand(3, 5)), r"positions must be \[batch, len\] = \[2, 5\], got \[3, 5\]; check"
    )
    text = r"positions must be rows of cos, at least 0 and less than 5, got {}; make longer tables"
    yield ErrorSample((q, k, cos, sin, where + 1), text.format(5), needs_values=True)
    yield ErrorSample((q, k, cos, sin, where.int() - 1), text.format(-1), needs_values=True)


def _rope_in_place_errors(device):
    yield from _rope_errors(device)
    q, k = torch.randn(2, 4, 5, 16, device=device), torch.randn(2, 1, 5, 16, device=device)
    table = _table(device, torch.float32, 1, 5, 8)
    text = r"is written and must not be expanded, got strides \[80, 0, 16, 1\]; call \.contiguous"
    yield ErrorSample((q, k.expand(2, 4, 5, 16), *table), f"key {text}")
    yield ErrorSample((q[:, :1].contiguous().expand(2, 4, 5, 16), k, *table), f"query {text}")


_LLAMA31 = {
    "rope_scale": 8.0,
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}


def _cos_sin_samples(device, dtype):
    def positions(*shape, high: int = 4096):
        return torch.randint(high, shape, device=device, dtype=dtype)

    yield Sample((positions(7), 64), name="typical")
    yield Sample((positions(3, 5), 36), {"rope_theta": 5e5}, "two dimensions, odd number of pairs")
    yield Sample((positions(40, high=1_000_000), 128), name="positions to 10^6")
    yield Sample((positions(9, high=131072), 128), _LLAMA31, "Llama 3.1")
    yield Sample((positions(9), 32), {"rope_scale": 2.5}, "scaled")
    yield Sample((positions(4, 6)[:, ::2] - 2000, 2), name="strided, negative, one pair")
    yield Sample((torch.tensor(123, device=device, dtype=dtype), 16), name="a single position")
    yield Sample((positions(0), 16), name="no positions")


def _cos_sin_errors(device):
    p = torch.arange(4, device=device)
    yield ErrorSample((p.float(), 16), r"positions must be int32 or int64, got float32; convert")
    yield ErrorSample((p, 7), r"rotary_dim must be positive and even, got 7; pass")
    yield ErrorSample((p, 0), r"rotary_dim must be positive and even, got 0; pass")
    yield ErrorSample((p, 16), r"rope_scale must be positive and finite, got 0; pass 1", {"rope_scale": 0.0})
    yield ErrorSample((p, 16), r"rope_scale must be positive and finite, got nan; pass 1", {"rope_scale": math.nan})
    yield ErrorSample((p, 16), r"rope_theta must be positive and finite, got -1.5; pass", {"rope_theta": -1.5})
    yield ErrorSample((p, 16), r"rope_theta must be positive and finite, got inf; pass", {"rope_theta": math.inf})
    yield ErrorSample(
        (p, 16), r"old_context_len must be 0 \(plain frequencies\) or more, got -1; pass 0", {"old_context_len": -1}
    )
    yield ErrorSample(
        (p, 16), r"must be 0 <= low < high with old_context_len, got 0 and 0; Llama", {"old_context_len": 8}
    )
    text = r"positions must give angles of less than 2\^31 radians, got position {}; check"
    yield ErrorSample((p + 2**31, 16), text.format(2**31), needs_values=True)
    yield ErrorSample((p, 16), text.format(1), {"rope_scale": 1e-10}, needs_values=True)


def _rope_cost(query, key, cos, sin, positions=None, *, interleaved=False, rotary_dim=0):
    rotary_dim = rotary_dim or query.shape[-1]
    moved = 2 * (query.nbytes + key.nbytes)
    rows = query.shape[2] * cos.shape[0] if positions is None else positions.numel()
    tables = 2 * rows * cos.shape[-1] * cos.element_size()
    return Cost(bytes=moved + tables, flops=3 * (query.numel() + key.numel()) * rotary_dim // max(query.shape[-1], 1))


def _cos_sin_cost(positions, rotary_dim, **scaling):
    return Cost(bytes=positions.nbytes + positions.numel() * rotary_dim * 4, flops=20 * positions.numel() * rotary_dim)


# ---- references ----


def _rotate_both(query, key, cos, sin, positions, interleaved, rotary_dim):
    if positions is not None:
        where = positions.long().expand(query.shape[0], -1)
        tables = (t.expand(query.shape[0], -1, -1) for t in (cos, sin))
        cos, sin = (torch.stack([row[w] for row, w in zip(t, where, strict=True)]) for t in tables)
    return tuple(rotate(x, cos, sin, interleaved, rotary_dim) for x in (query, key))


@op(
    f"(Tensor query, Tensor key, {_ROPE}) -> (Tensor, Tensor)",
    fake=_rope_fake,
    samples=_rope_samples,
    errors=_rope_errors,
    cost=_rope_cost,
)
def rope(query, key, cos, sin, positions=None, *, interleaved=False, rotary_dim=0):
    """query and key rotated by tables of cos and sin (see the module's docstring); outputs in the inputs' order of strides."""
    rotated = _rotate_both(query, key, cos, sin, positions, interleaved, rotary_dim)
    return tuple(torch.empty_like(x).copy_(y) for x, y in zip((query, key), rotated, strict=True))


@op(
    f"(Tensor(a!) query, Tensor(b!) key, {_ROPE}) -> ()",
    fake=_rope_in_place_fake,
    samples=_rope_in_place_samples,
    errors=_rope_in_place_errors,
    cost=_rope_cost,
)
def rope_(query, key, cos, sin, positions=None, *, interleaved=False, rotary_dim=0):
    """`rope` in place."""
    for x, y in zip((query, key), _rotate_both(query, key, cos, sin, positions, interleaved, rotary_dim), strict=True):
        x.copy_(y)


@op(
    "(Tensor positions, int rotary_dim, *, float rope_scale=1.0, float rope_theta=10000.0, float low_freq_factor=0.0, "
    "float high_freq_factor=0.0, int old_context_len=0) -> (Tensor, Tensor)",
    fake=_cos_sin_fake,
    samples=_cos_sin_samples,
    errors=_cos_sin_errors,
    cost=_cos_sin_cost,
    dtypes=INDEX_TYPES,
)
def rope_cos_sin(
    positions,
    rotary_dim,
    *,
    rope_scale=1.0,
    rope_theta=10000.0,
    low_freq_factor=0.0,
    high_freq_factor=0.0,
    old_context_len=0,
):
    """cos and sin, float32 `[*positions.shape, rotary_dim / 2]`, of `position * theta^(-2i / rotary_dim) / rope_scale`.

    Right to float32 rounding for positions to 10^6 and beyond: angles in float64. `old_context_len > 0` scales frequencies as
    Llama 3.1 does: with `turns = old_context_len * f / 2 pi`, those that turn less than `low_freq_factor` times in the old
    context are divided by rope_scale, those that turn more than `high_freq_factor` times are kept, in between is a linear mix.
    """
    pairs = rotary_dim // 2
    f = rope_theta ** (-torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs)
    if old_context_len > 0:
        turns = old_context_len * f / (2 * math.pi)
        keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
        f = (1 - keep) * f / rope_scale + keep * f
    else:
        f = f / rope_scale
    angle = positions.double()[..., None] * f
    return angle.cos().float(), angle.sin().float()
