"""RoPE beyond the sweep: accuracy at large positions, identities, Llama 3.1's formula, FlashInfer's conventions."""

from __future__ import annotations

import inspect

import pytest
import torch

from fi_ops import rope as api
from fi_ops.library._reference import rotate

FORMS = [name.removesuffix("_inplace") for name in api.__all__ if name.endswith("_inplace")]


def table(positions, rotary_dim, **scaling):
    return torch.ops.fi.rope_cos_sin(positions, rotary_dim, **scaling)


def mpmath_cos_sin(position: int, i: int, rotary_dim: int, theta: float):
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        angle = position * mpmath.mpf(theta) ** (-mpmath.mpf(2 * i) / rotary_dim)
        return float(mpmath.cos(angle)), float(mpmath.sin(angle))


@pytest.mark.parametrize("theta", [10000.0, 5e5])
def test_cos_sin_at_large_positions(theta):
    """Within one rounding to float32 (2^-25 relative to 1, and a hair for the double arithmetic) of the exact values."""
    positions = torch.cat(
        [torch.randint(900_000, 1_000_001, (20,)), torch.tensor([0, 1, 2, 999_999, 1_000_000, 2**24 + 1])]
    )
    cos, sin = table(positions, 128, rope_theta=theta)
    for row, position in enumerate(positions.tolist()):
        for i in (0, 1, 7, 31, 63):
            exact = mpmath_cos_sin(position, i, 128, theta)
            got = cos[row, i].item(), sin[row, i].item()
            for a, b in zip(got, exact, strict=True):
                assert abs(a - b) <= abs(b) * 2**-24 + 3e-9, f"position {position}, pair {i}: {a} instead of {b}"


def test_cos_sin_dense_against_double():
    positions = torch.arange(0, 1_000_001, 97)
    cos, sin = table(positions, 64)
    angle = positions.double()[:, None] * 10000.0 ** (-torch.arange(32, dtype=torch.float64) / 32)
    for got, exact in ((cos, angle.cos()), (sin, angle.sin())):
        assert ((got.double() - exact).abs() <= exact.abs() * 2**-24 + 3e-9).all()


def test_llama31_frequencies_are_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=scaling
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    assert factor == 1.0
    positions = torch.arange(0, 64)
    cos, sin = table(
        positions, 128, rope_scale=8.0, rope_theta=5e5, low_freq_factor=1.0, high_freq_factor=4.0, old_context_len=8192
    )
    angle = positions.double()[:, None] * inv_freq.double()  # inv_freq has float32 rounding: 64 * 2^-23
    torch.testing.assert_close(cos.double(), angle.cos(), atol=2e-5, rtol=0)
    torch.testing.assert_close(sin.double(), angle.sin(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_inverse_rotation_is_identity(interleaved):
    q, k = torch.randn(2, 4, 9, 64), torch.randn(2, 2, 9, 64)
    cos, sin = (t[None] for t in table(torch.arange(9), 48))
    there = torch.ops.fi.rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=48)
    back = torch.ops.fi.rope(*there, cos, -sin, interleaved=interleaved, rotary_dim=48)
    for x, y in zip((q, k), back, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
        assert torch.equal(x[..., 48:], y[..., 48:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_alone(interleaved):
    q, k = torch.randn(1, 1, 1, 128), torch.randn(1, 1, 1, 128)

    def score(i, j):
        turned = [
            torch.ops.fi.rope(x, x, *(t[None] for t in table(torch.tensor([p]), 128)), interleaved=interleaved)[0]
            for x, p in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert abs(score(5, 2) - score(900_005, 900_002)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_in_place_equals_out_of_place(dtype, interleaved):
    packed = torch.randn(3, 11, 6, 96).to(dtype).transpose(1, 2)
    q, k = packed[:, :4], packed[:, 4:]
    cos, sin = (t[None].to(dtype) for t in table(torch.arange(40), 64))
    where = torch.randint(40, (3, 11))
    expected = torch.ops.fi.rope(q, k, cos, sin, where, interleaved=interleaved, rotary_dim=64)
    torch.ops.fi.rope_(q, k, cos, sin, where, interleaved=interleaved, rotary_dim=64)
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


def test_many_tokens_heads_first_and_last_agree():
    """The two ways to walk memory (heads or tokens innermost) give the same bits."""
    q, k = torch.randn(2, 5, 150, 64), torch.randn(2, 3, 150, 64)
    cos, sin = (t[None] for t in table(torch.arange(150), 64))
    first = torch.ops.fi.rope(q, k, cos, sin)
    last = torch.ops.fi.rope(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)), cos, sin)
    assert torch.equal(first[0], last[0]) and torch.equal(first[1], last[1])


# ---- FlashInfer's functions ----


def ragged(nnz=17, dtype=torch.float32):
    return torch.randn(nnz, 4, 64).to(dtype), torch.randn(nnz, 2, 64).to(dtype)


def expected_at(q, k, positions, rotary_dim, interleave, **scaling):
    cos, sin = (t[None].double() for t in table(positions, rotary_dim, **scaling))
    return [
        rotate(x.double().transpose(0, 1)[None], cos, sin, interleave, rotary_dim)[0].transpose(0, 1) for x in (q, k)
    ]


LENGTHS, OFFSETS = [3, 0, 9, 5], [10, 4, 0, 70000]
INDPTR = [0, 3, 3, 12, 17]
POSITIONS = torch.tensor([o + i for n, o in zip(LENGTHS, OFFSETS, strict=True) for i in range(n)])
LLAMA31 = {
    "rope_scale": 8.0,
    "rope_theta": 5e5,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
}


def arguments_of(form: str, q, k, index):
    """(positional arguments, expected positions and frequencies) of a call with FlashInfer's defaults."""
    if form == "apply_rope_with_cos_sin_cache":
        cache = torch.cat(table(torch.arange(71000), 64), -1)
        return (POSITIONS.to(index), q.flatten(1), k.flatten(1), 64, cache), {}
    where = (
        (POSITIONS.to(index),)
        if form.endswith("pos_ids")
        else (torch.tensor(INDPTR, dtype=index), torch.tensor(OFFSETS, dtype=index))
    )
    return (q, k, *where), LLAMA31 if "llama31" in form else {}


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("form", FORMS)
def test_flashinfer_functions(form, index):
    q, k = ragged()
    args, scaling = arguments_of(form, q, k, index)
    got = getattr(api, form)(*args)
    for x, y in zip(got, expected_at(q, k, POSITIONS, 64, False, **scaling), strict=True):
        torch.testing.assert_close(x.double().view_as(y), y, atol=2e-6, rtol=0)
    assert getattr(api, form + "_inplace")(*args) is None
    changed = args[1:3] if form == "apply_rope_with_cos_sin_cache" else args[:2]
    assert all(torch.equal(x.reshape(y.shape), y) for x, y in zip(changed, got, strict=True))


@pytest.mark.parametrize("form", [f for f in FORMS if "cache" not in f])
def test_flashinfer_options(form):
    """Partial rotary dim, interleaved pairs, and scaling by keyword, on packed 16-bit tensors."""
    packed = torch.randn(17, 6, 64).to(torch.bfloat16)
    q, k = packed[:, :4], packed[:, 4:]
    args, scaling = arguments_of(form, q, k, torch.int32)
    scaling = {**scaling, "rope_scale": 2.0, "rope_theta": 3e4}
    got = getattr(api, form)(*args, 32, True, **{k: v for k, v in scaling.items() if k.startswith("rope")})
    for x, y in zip(got, expected_at(q, k, POSITIONS, 32, True, **scaling), strict=True):
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        torch.testing.assert_close(x.double(), y, atol=0, rtol=2**-8)


def test_flashinfer_cache_interleaved_partial():
    q, k = ragged(dtype=torch.float16)
    cache = torch.cat(table(torch.arange(100), 48), -1)
    where = torch.randint(100, (17,))
    got = api.apply_rope_with_cos_sin_cache(where, q.flatten(1), k.flatten(1), 64, cache, is_neox=False)
    for x, y in zip(got, expected_at(q, k, where, 48, True), strict=True):
        torch.testing.assert_close(x.double().view_as(y), y, atol=1e-6, rtol=2**-11)


@pytest.mark.parametrize("name", api.__all__)
def test_flashinfer_functions_compile(name):
    q, k = ragged()
    args, _ = arguments_of(name.removesuffix("_inplace"), q, k, torch.int32)

    def call(*args):
        args = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
        result = getattr(api, name)(*args)
        return result if result is not None else tuple(args)

    expected = call(*args)
    torch._dynamo.reset()  # `call` is one code object in every case
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*args)
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True) if isinstance(a, torch.Tensor))


def test_flashinfer_signatures():
    """Argument order and defaults, as FlashInfer documents them."""
    ragged_args = ["q", "k", "indptr", "offsets"]
    options = {"rotary_dim": None, "interleave": False, "rope_scale": 1, "rope_theta": 1e4}
    llama31 = {
        **options,
        "rope_scale": 8,
        "rope_theta": 5e5,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "old_context_len": 8192,
    }
    for name in api.__all__:
        parameters = inspect.signature(getattr(api, name)).parameters
        if "cache" in name:
            assert list(parameters) == ["positions", "query", "key", "head_size", "cos_sin_cache", "is_neox"]
            assert parameters["is_neox"].default is True
            continue
        wanted = llama31 if "llama31" in name else options
        assert list(parameters) == (["q", "k", "pos_ids"] if "pos_ids" in name else ragged_args) + list(wanted)
        assert {p: parameters[p].default for p in wanted} == wanted


def test_flashinfer_refusals():
    q, k = ragged()
    indptr, offsets = torch.tensor(INDPTR), torch.tensor(OFFSETS)
    cache = torch.cat(table(torch.arange(20), 64), -1)
    before = q.clone()
    for call, text in (
        (
            lambda: api.apply_rope_inplace(q, k, indptr, offsets[:2]),
            r"indptr must be \[batch \+ 1\] and offsets \[batch\]",
        ),
        (
            lambda: api.apply_rope_inplace(q, k, indptr - 1, offsets),
            r"indptr must go from 0 to q's 17 tokens, got -1 to 16",
        ),
        (lambda: api.apply_rope_inplace(q, k, indptr[[0, 2, 3, 1, 4]], offsets), r"indptr must not decrease"),
        (lambda: api.apply_rope_inplace(q, k, indptr.float(), offsets), r"indptr must be int32 or int64"),
        (lambda: api.apply_rope_inplace(q[0], k, indptr, offsets), r"q must be \[nnz, num_qo_heads, head_dim\]"),
        (lambda: api.apply_rope_pos_ids_inplace(q, k[:3], POSITIONS), r"fi::rope_: key must be"),
        (lambda: api.apply_rope_pos_ids_inplace(q, k, POSITIONS, 7), r"rotary_dim must be positive and even"),
        (lambda: api.apply_rope_pos_ids_inplace(q, k, POSITIONS[:4]), r"fi::rope_: cos must be"),
        (
            lambda: api.apply_rope_with_cos_sin_cache_inplace(POSITIONS, q.flatten(1), k.flatten(1), 64, cache),
            r"positions must be rows of cos",
        ),
        (
            lambda: api.apply_rope_with_cos_sin_cache_inplace(POSITIONS, q.flatten(1), k.flatten(1), 60, cache),
            r"check head_size",
        ),
        (
            lambda: api.apply_rope_with_cos_sin_cache_inplace(POSITIONS, q.flatten(1), k.flatten(1), 64, cache.half()),
            r"must be float32",
        ),
    ):
        with pytest.raises(RuntimeError, match=text):
            call()
        assert torch.equal(q, before)
