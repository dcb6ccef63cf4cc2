"""Shapes, strides and options drawn at random (hypothesis): any call is either right or refused, never wrong."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference

RELAXED = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def strided(draw, shape, dtype):
    """A tensor of `shape` whose last dimension is contiguous and whose other strides are permuted, padded or stepped."""
    lead = len(shape) - 1
    order = draw(st.permutations(range(lead)))
    pad = draw(st.lists(st.integers(0, 2), min_size=lead + 1, max_size=lead + 1))
    step = draw(st.lists(st.sampled_from([1, 1, 2]), min_size=lead, max_size=lead))
    full = [shape[d] * step[d] + pad[d] for d in order] + [shape[-1] + pad[-1]]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    base = torch.randn(full, generator=generator).to(dtype)
    view = base[tuple(slice(0, shape[d] * step[d], step[d]) for d in order)][..., : shape[-1]]
    inverse = [order.index(d) for d in range(lead)] + [lead]
    return view.permute(inverse)


@st.composite
def attention_calls(draw):
    dtype = draw(DTYPES)
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4, 7, 8]))
    qo_len, kv_len = draw(st.sampled_from([1, 2, 5, 17, 40])), draw(st.sampled_from([1, 3, 31, 64, 65, 200]))
    dim, dim_vo = draw(st.sampled_from([8, 16, 40, 64, 80, 96, 128, 256])), draw(st.sampled_from([8, 64, 72, 128]))
    heads = kv_heads * group
    q = draw(strided((batch, heads, qo_len, dim), dtype))
    k = draw(strided((batch, kv_heads, kv_len, dim), dtype))
    v = draw(strided((batch, kv_heads, kv_len, dim_vo), dtype))
    options = {
        "causal": draw(st.booleans()),
        "window_left": draw(st.sampled_from([-1, -1, 0, 3, 50])),
        "q_offset": draw(st.sampled_from([None, None, 0, 2, -1, kv_len])),
        "logits_soft_cap": draw(st.sampled_from([0.0, 0.0, 7.0])),
    }
    if draw(st.booleans()):
        options["alibi_slopes"] = torch.rand(heads)
    if draw(st.booleans()):
        options["sinks"] = torch.randn(heads)
    mask = None
    kind = draw(st.sampled_from(["none", "bool", "additive", "minimum"]))
    if kind != "none":
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, qo_len, kv_len)]
        keep = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) > 0.5
        low = float("-inf") if kind == "additive" else torch.finfo(dtype).min
        mask = keep if kind == "bool" else torch.zeros(shape).masked_fill(~keep, low).to(dtype)
        if draw(st.booleans()):
            mask = mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    return Sample((q, k, v, mask), options)


@RELAXED
@given(attention_calls())
def test_attention(sample):
    assert_op_matches_reference(SPECS["attention_with_lse"], sample)


@st.composite
def append_calls(draw):
    dtype, interleaved = draw(DTYPES), draw(st.booleans())
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 4]))
    qo_len, max_len = draw(st.sampled_from([1, 2, 19])), draw(st.sampled_from([20, 70]))
    dim = draw(st.sampled_from([16, 64, 80]))
    rotary_dim = draw(st.sampled_from([0, 8, dim]))
    pairs, width = (rotary_dim or dim) // 2, draw(st.sampled_from([1, 2]))
    q = draw(strided((batch, kv_heads * group, qo_len, dim), dtype))
    k, v = (draw(strided((batch, kv_heads, qo_len, dim), dtype)) for _ in range(2))
    k_cache, v_cache = (draw(strided((batch, kv_heads, max_len, dim), dtype)) for _ in range(2))
    angles = torch.rand(draw(st.sampled_from([1, batch])), qo_len, width * pairs) * 6.3
    per_request = draw(st.booleans())
    starts = torch.tensor(draw(st.lists(st.integers(0, max_len - qo_len), min_size=batch, max_size=batch)))
    positions = starts[:, None] + torch.arange(qo_len) if per_request else starts[0] + torch.arange(qo_len)
    if draw(st.booleans()):
        positions = positions.int()
    options = {
        "interleaved": interleaved,
        "rotary_dim": rotary_dim,
        "causal": True,
        "window_left": draw(st.sampled_from([-1, 4])),
    }
    return Sample((q, k, v, angles.cos().to(dtype), angles.sin().to(dtype), k_cache, v_cache, positions), options)


@RELAXED
@given(append_calls())
def test_rope_append_attention(sample):
    assert_op_matches_reference(SPECS["rope_append_attention"], sample)


@st.composite
def row_calls(draw):
    """(spec, sample) for the ops over rows, with 1 to 4 leading dimensions of any strides."""
    dtype = draw(DTYPES)
    shape = (*draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)), draw(st.sampled_from([2, 8, 34, 96, 130])))
    x = draw(strided(shape, dtype))
    spec = SPECS[
        draw(
            st.sampled_from(
                ["rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm", "layernorm", "silu_and_mul", "gelu_and_mul"]
            )
        )
    ]
    names = [a.name for a in spec.parsed.arguments]
    extra = {
        "residual": draw(strided(shape, dtype)),
        "weight": torch.randn(shape[-1]).to(dtype),
        "bias": torch.randn(shape[-1]).to(dtype),
    }
    return spec, Sample((x, *(extra[n] for n in names[1:] if n in extra)))


@RELAXED
@given(row_calls())
def test_rows(call):
    spec, sample = call
    assert_op_matches_reference(spec, sample)


@st.composite
def rope_calls(draw):
    dtype, interleaved = draw(DTYPES), draw(st.booleans())
    batch, heads, kv_heads, length = (draw(st.integers(1, 4)) for _ in range(4))
    dim = draw(st.sampled_from([2, 16, 34, 64, 80]))
    q, k = draw(strided((batch, heads, length, dim), dtype)), draw(strided((batch, kv_heads, length, dim), dtype))
    angles = torch.rand(draw(st.sampled_from([1, batch])), 11, dim // 2) * 6.3
    positions = torch.randint(0, 11, draw(st.sampled_from([(length,), (batch, length)])))
    return Sample((q, k, angles.cos(), angles.sin(), positions), {"interleaved": interleaved})


@RELAXED
@given(rope_calls(), st.sampled_from(["rope", "rope_"]))
def test_rope(sample, name):
    assert_op_matches_reference(SPECS[name], sample)
