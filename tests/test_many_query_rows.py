"""Attention of many query rows: the random calls of `test_few_query_rows.py` with rows enough for the prefill kernels.

The sizes cross what those are cut by: blocks of 64 and 128 rows, tiles of 32 and 64 keys, the padded head dims, keys that several
blocks share.
"""

from __future__ import annotations

import random

import pytest
import torch
from head_dims import COMPILED_DIMS, OTHER_DIMS
from test_few_query_rows import DEVICES, random_call, random_mask

from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(60))
def test_random_call(seed, device):
    op, args, kwargs = random_call(seed, device, [17, 31, 40, 64, 70, 130], [1, 1, 2, 3, 4])
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"seed {seed}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dims", [(192, 192), (64, 128), (104, 72), (40, 300)])
def test_head_dims_between_the_padded_ones(dims, dtype, device):
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, n, dims[0], device=device).to(dtype) for heads, n in ((4, 90), (2, 150)))
    v = torch.randn(1, 2, 150, dims[1], device=device).to(dtype)
    mask = torch.rand(1, 1, 90, 150, device=device) > 0.5
    mask[..., 64:128] = False  # a tile that no row sees
    for sample in (Sample((q, k, v), {"causal": True}, "causal"), Sample((q, k, v, mask), name="mask")):
        assert_op_matches_reference(SPECS["attention_with_lse"], sample)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "window_left": 1300}])
def test_long_keys_with_values_that_only_count_alone(options, device):
    """`finfo.min` in most places: those keys weigh nothing, except for a row that has no others."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    q, k, v = (torch.randn(2, heads, n, 64, device=device).to(dtype) for heads, n in ((4, 40), (2, 1400), (2, 1400)))
    low = torch.finfo(dtype).min
    keys = torch.arange(1400, device=device)
    mask = torch.zeros(2, 1, 40, 1400, device=device, dtype=dtype).masked_fill((keys >= 300) & (keys < 1350), low)
    mask[1, :, 5] = low
    assert_op_matches_reference(SPECS["attention_with_lse"], Sample((q, k, v, mask), options, "finfo.min"))


def prompt_call(
    seed, device, batches=(1, 2, 3), heads=(2, 4, 6), lengths=(64, 100, 129, 192, 300), head_dims=COMPILED_DIMS
):
    """A prompt over a static cache as models call it, (op, arguments, keyword arguments): what Hopper's kernel takes.

    Positions that ascend or don't, shared or each entry's; masks that padding, causality and chance make; windows; soft caps;
    sinks.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.bfloat16, torch.float16])
    (dim, dim_vo), kv_heads, batch = draw.choice(head_dims), draw.choice([1, 2]), draw.choice(batches)
    num_heads, qo_len = draw.choice(heads), draw.choice(lengths)
    max_len = qo_len + draw.choice([0, 1, 28, 200, 700])

    def rand(num, length, dim=dim):
        return torch.randn(batch, num, length, dim, device=device).to(dtype)

    options: dict = {}
    if draw.random() < 0.6:
        options["causal"] = True
    if draw.random() < 0.3:
        options["window_left"] = draw.choice([0, 50, 150])
    starts = [draw.randrange(max_len - qo_len + 1) for _ in range(draw.choice([1, batch]))]
    at = torch.stack([torch.arange(start, start + qo_len) for start in starts])
    if draw.random() < 0.3:
        at = torch.stack([torch.randperm(max_len)[:qo_len] for _ in starts])
    mask = None
    if draw.random() < 0.6:
        mask = random_mask(draw, device, batch, num_heads, qo_len, max_len, dtype)
    elif "causal" not in options:
        mask = (torch.arange(max_len) <= at[:, None, :, None]).to(device)
    positions = (at if len(at) > 1 else at[0]).to(device, draw.choice([torch.int32, torch.int64]))
    q, k_cache, v_cache = rand(num_heads, qo_len), rand(kv_heads, max_len), rand(kv_heads, max_len, dim_vo)
    if draw.random() < 0.3:
        options["logits_soft_cap"] = draw.choice([2.0, 50.0])
    if draw.random() < 0.3:
        options["sinks"] = torch.randn(num_heads, device=device) * draw.choice([1.0, 10.0])
    kind = draw.choice(["attention_with_lse", "append_attention", "rope_append_attention"])
    if kind == "attention_with_lse":
        options["q_offset"] = starts[0]
        return kind, (q, k_cache, v_cache, mask), options
    cache = (k_cache, v_cache, positions, mask)
    if draw.random() < 0.3:  # rows that don't stand at their slots, some of them outside the cache
        where = torch.randint(-5, max_len + 20, (draw.choice([1, batch]), qo_len), device=device)
        options["query_positions"] = where if len(where) > 1 else where[0]
    if kind == "append_attention":
        return kind, (q, rand(kv_heads, qo_len), rand(kv_heads, qo_len, dim_vo), *cache), options
    angles = torch.rand(1, qo_len, dim // 2, device=device) * 6.3
    tables = angles.cos(), angles.sin()
    return kind, (q, rand(kv_heads, qo_len), rand(kv_heads, qo_len, dim_vo), *tables, *cache), options


PROMPTS = [("cpu", seed) for seed in range(6)] + [
    pytest.param("cuda", seed, marks=pytest.mark.gpu) for seed in range(40)
]


@pytest.mark.parametrize(("device", "seed"), PROMPTS)
def test_prompt(device, seed):
    op, args, kwargs = prompt_call(seed, device)
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"prompt {seed}"))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100, 130))
def test_prompt_of_many_heads(seed):
    """More tiles of 128 rows than a GPU has multiprocessors: tiles of 192 rows, and several of them a block."""
    op, args, kwargs = prompt_call(seed, "cuda", (3, 4), (16, 48), (384, 500))
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"prompt of many heads {seed}"))


@pytest.mark.parametrize(
    ("device", "seed"),
    [("cpu", seed) for seed in range(200, 204)]
    + [pytest.param("cuda", s, marks=pytest.mark.gpu) for s in range(200, 260)],
)
def test_prompt_of_other_head_dims(device, seed):
    op, args, kwargs = prompt_call(seed, device, head_dims=OTHER_DIMS)
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"prompt {seed}"))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(300, 330))
def test_prompt_of_many_heads_and_other_head_dims(seed):
    op, args, kwargs = prompt_call(seed, "cuda", (3, 4), (16, 48), (384, 500), OTHER_DIMS[:5])
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"prompt of many heads {seed}"))


def biased_call(seed, device, head_dims=COMPILED_DIMS):
    """A prompt without a cache under a mask of numbers: biases of every broadcast, keys and whole rows that are excluded, by
    -inf or by finfo.min; (arguments, keyword arguments)."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.bfloat16, torch.float16])
    (dim, dim_vo), kv_heads, batch = draw.choice(head_dims), draw.choice([1, 2]), draw.choice([1, 2])
    heads, length = kv_heads * draw.choice([1, 3, 16]), draw.choice([64, 100, 126, 192, 258, 301, 400])
    q, k, v = (
        torch.randn(batch, h, length, d, device=device).to(dtype)
        for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, dim_vo))
    )
    sizes = [size if draw.random() < 0.6 else 1 for size in (batch, heads, length)]
    mask = torch.randn(*sizes, length, device=device).to(draw.choice([dtype, torch.float32]))
    low = draw.choice([-float("inf"), torch.finfo(mask.dtype).min])
    if draw.random() < 0.6:
        mask = mask.masked_fill(torch.rand_like(mask, dtype=torch.float32) < draw.choice([0.1, 0.9]), low)
    if draw.random() < 0.4:
        mask[..., draw.randrange(sizes[2]), :] = low
    if draw.random() < 0.3:
        mask = torch.nn.functional.pad(mask, (draw.choice([1, 2]), 3))[..., draw.choice([1, 2]) :][..., :length]
    options: dict = {"causal": draw.random() < 0.5}
    if draw.random() < 0.3:
        options["window_left"] = draw.choice([0, 30, 150])
    if draw.random() < 0.3:
        options["sinks"] = torch.randn(heads, device=device)
    return (q, k, v, mask), options


@pytest.mark.parametrize(
    ("device", "seed"),
    [("cpu", seed) for seed in range(6)] + [pytest.param("cuda", seed, marks=pytest.mark.gpu) for seed in range(60)],
)
def test_biased_prompt(device, seed):
    args, options = biased_call(seed, device)
    assert_op_matches_reference(SPECS["attention_with_lse"], Sample(args, options, f"biased prompt {seed}"))


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(200, 230))
def test_biased_prompt_of_other_head_dims(seed):
    args, options = biased_call(seed, "cuda", OTHER_DIMS)
    assert_op_matches_reference(SPECS["attention_with_lse"], Sample(args, options, f"biased prompt {seed}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("level", [-float("inf"), -300.0, 300.0])
def test_sinks_far_from_the_logits(level, device):
    """One that takes all of the weight, and two that take none; rows that see nothing but it."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 128, 64, device=device).bfloat16() for heads in (4, 2, 2))
    sinks = torch.tensor([level, 0.0, level, 1.0], device=device)
    mask = torch.rand(1, 1, 128, 128, device=device) > 0.5
    mask[..., 5, :] = False
    for sample in (Sample((q, k, v), {"causal": True, "sinks": sinks}), Sample((q, k, v, mask), {"sinks": sinks})):
        assert_op_matches_reference(SPECS["attention_with_lse"], sample)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("qo_len", "head_dim", "dim_vo"),
    [(100, 64, 64), (100, 256, 256), (256, 128, 128), (100, 96, 96), (256, 192, 128), (100, 80, 80)],
)
def test_slots_after_the_last_position_do_not_count(qo_len, head_dim, dim_vo, device):
    """A cache whose unused slots are NaN: a weight of 0 never meets them."""
    torch.manual_seed(0)
    q, new_k, new_v = (
        torch.randn(2, heads, qo_len, dim, device=device).bfloat16()
        for heads, dim in ((4, head_dim), (2, head_dim), (2, dim_vo))
    )
    k, v = (torch.full((2, 2, 700, dim), float("nan"), device=device).bfloat16() for dim in (head_dim, dim_vo))
    positions = torch.arange(qo_len, device=device)
    got = torch.ops.fi.append_attention(q, new_k, new_v, k, v, positions, causal=True)
    expected = torch.ops.fi.attention(q, new_k, new_v, causal=True)
    torch.testing.assert_close(got, expected)
    offset = torch.ops.fi.attention(q, k, v, causal=True, q_offset=0)  # the same, as the host knows it
    torch.testing.assert_close(offset, expected)
