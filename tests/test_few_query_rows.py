"""Attention of few query rows drawn at random: ragged lengths, masks with holes, groups, positions, all together.

The sizes cross what the CUDA kernels are cut by: tiles of 64 keys, slices of 16, 16 query rows, work shared by several blocks.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_mask(draw, device, batch, heads, qo_len, kv_len, dtype):
    """A mask over a static cache: padding on either side, holes, whole tiles gone, now and then a row with nothing."""
    keys = torch.arange(kv_len, device=device)
    start = torch.tensor([draw.choice([0, 0, draw.randrange(kv_len)]) for _ in range(batch)], device=device)
    stop = torch.tensor([draw.choice([kv_len, draw.randrange(kv_len + 1)]) for _ in range(batch)], device=device)
    keep = (keys >= start[:, None]) & (keys < stop[:, None])
    hole = draw.randrange(kv_len)
    keep &= (keys < hole) | (keys >= hole + draw.choice([0, 1, 20, 200]))
    shape = draw.choice([(1, 1, 1), (batch, 1, 1), (batch, 1, qo_len), (batch, heads, 1), (batch, heads, qo_len)])
    mask = keep[: shape[0], None, None].expand(*shape, kv_len)
    if shape[1] > 1 or shape[2] > 1:
        mask = mask & (torch.rand(*shape, kv_len, device=device) > draw.choice([0.0, 0.3, 0.99]))
    kind = draw.choice(["bool", "bool", "bool, strided", "-inf", "finfo.min", "bias"])
    if kind == "bool":
        return mask
    if kind == "bool, strided":
        return mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "bias":
        return torch.randn(*shape, kv_len, device=device)
    low = -math.inf if kind == "-inf" else torch.finfo(dtype).min
    return torch.zeros(mask.shape, device=device).masked_fill(~mask, low).to(dtype)


FEW_ROWS = ([1, 1, 1, *range(2, 9)], [1, 2, 3, 4, 5, 8, 16])  # qo_len, query heads of a KV head


HEAD_DIMS = [(64, 64), (128, 128), (128, 128), (256, 256), (80, 80), (96, 64), (192, 128), (17, 9)]


def random_call(seed: int, device: str, qo_lens=FEW_ROWS[0], groups=FEW_ROWS[1], head_dims=HEAD_DIMS):
    """(op, arguments, keyword arguments) of case `seed`."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = draw.choice([torch.bfloat16, torch.float16, torch.bfloat16, torch.float16, torch.float32])
    batch, kv_heads = draw.choice([1, 1, 2, 3, 5]), draw.choice([1, 2, 3])
    group = draw.choice(groups)
    qo_len = draw.choice(qo_lens)
    kv_len = draw.choice([1, 15, 63, 64, 65, 130, 257, 500, 1000])
    dim, dim_vo = draw.choice(head_dims)
    heads = kv_heads * group

    def rand(*shape):
        if draw.random() < 0.5:
            return torch.randn(*shape, device=device).to(dtype)
        b, h, n, d = shape
        return torch.randn(b, n, h, d, device=device).to(dtype).transpose(1, 2)

    options: dict = {}
    if draw.random() < 0.5:
        options["causal"] = True
    if draw.random() < 0.25:
        options["window_left"] = draw.choice([0, 10, 100])
    if draw.random() < 0.2:
        options["logits_soft_cap"] = 5.0
    if draw.random() < 0.2:
        options["scale"] = draw.choice([0.3, -0.3])
    if draw.random() < 0.3:
        options["sinks"] = torch.randn(heads, device=device)
    kind = draw.choice(["attention_with_lse", "attention_with_lse", "append", "rope", "rope_append"])
    if kind == "attention_with_lse" and draw.random() < 0.2:
        options["alibi_slopes"] = torch.rand(heads, device=device)
    mask = random_mask(draw, device, batch, heads, qo_len, kv_len, dtype) if draw.random() < 0.5 else None
    q, k, v = rand(batch, heads, qo_len, dim), rand(batch, kv_heads, kv_len, dim), rand(batch, kv_heads, kv_len, dim_vo)

    def tables(length):
        rotary_dim = draw.choice([dim // 2 * 2, 16])
        options.update(rotary_dim=rotary_dim, interleaved=draw.random() < 0.5)
        width = rotary_dim // 2 * draw.choice([1, 2])
        angles = torch.rand(draw.choice([1, batch]), length, width, device=device) * 6.3
        return angles.cos(), angles.sin()

    if kind == "attention_with_lse":
        if draw.random() < 0.3:
            options["q_offset"] = draw.randrange(kv_len)
        return "attention_with_lse", (q, k, v, mask), options
    if kind == "rope":
        options["q_offset"] = draw.randrange(max(kv_len - qo_len, 0) + 1)
        if qo_len > kv_len:
            q, options["q_offset"] = q[:, :, :1], 0
            mask = None
        return "rope_attention_with_lse", (q, k, v, *tables(kv_len), mask), options
    new_k, new_v = rand(batch, kv_heads, qo_len, dim), rand(batch, kv_heads, qo_len, dim_vo)
    at = [[(draw.randrange(kv_len) + i) % kv_len for i in range(qo_len)] for _ in range(batch)]
    if qo_len > kv_len:
        q, new_k, new_v, mask, at = q[:, :, :1], new_k[:, :, :1], new_v[:, :, :1], None, [row[:1] for row in at]
    at = [row if len(set(row)) == len(row) else list(range(len(row))) for row in at]  # a slot is written once
    positions = torch.tensor(at, device=device, dtype=draw.choice([torch.int32, torch.int64]))
    args = (q, new_k, new_v, *(tables(q.shape[2]) if kind == "rope_append" else ()), k, v, positions, mask)
    if draw.random() < 0.5:  # rows that don't stand at their slots, some of them outside the cache
        shape = (*draw.choice([(), (batch,)]), q.shape[2])
        where = [draw.randrange(-5, kv_len + 20) for _ in range(math.prod(shape))]
        index = draw.choice([torch.int32, torch.int64])
        options["query_positions"] = torch.tensor(where, device=device, dtype=index).view(shape)
    return ("append_attention" if kind == "append" else "rope_append_attention"), args, options


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(60))
def test_random_call(seed, device):
    op, args, kwargs = random_call(seed, device)
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"seed {seed}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(1000, 1030))
def test_keys_wider_than_values(seed, device):
    """As DeepSeek's are, and what is padded to them."""
    op, args, kwargs = random_call(seed, device, head_dims=[(192, 128), (192, 128), (136, 104), (192, 40), (160, 120)])
    assert_op_matches_reference(SPECS[op], Sample(args, kwargs, f"seed {seed}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kv_len", [3400, 3408])  # rows of the mask are aligned to 16 bytes, or not
def test_ragged_batch(kv_len, dtype, device):
    """Entries of very different lengths in one call, some of them empty."""
    lengths = torch.tensor([0, 1, 3300, 64, 0, 333, 65, 0], device=device)
    q = torch.randn(len(lengths), 4, 1, 128, device=device).to(dtype)
    k, v = (torch.randn(len(lengths), 2, kv_len, 128, device=device).to(dtype) for _ in range(2))
    mask = torch.arange(kv_len, device=device) < lengths.view(-1, 1, 1, 1)
    assert_op_matches_reference(SPECS["attention_with_lse"], Sample((q, k, v, mask), name="ragged"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", [None, "bool", "finfo.min", "all dead"])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_shared_keys(kv_heads, mask, device):
    """Keys that all heads and entries share, many for each of few (entry, KV head)."""
    q = torch.randn(2, 8, 1, 128, device=device).bfloat16()
    k, v = (torch.randn(2, kv_heads, 3000, 128, device=device).bfloat16() for _ in range(2))
    keys = torch.arange(3000, device=device).view(1, 1, 1, -1)
    keep = ((keys >= 70) & (keys < 2000) | (keys == 2999)) & (mask != "all dead")
    values = None if mask is None else keep
    if mask == "finfo.min":
        values = torch.zeros(keep.shape, device=device).masked_fill(~keep, torch.finfo(torch.float32).min)
    assert_op_matches_reference(SPECS["attention_with_lse"], Sample((q, k, v, values), name=f"shared keys, {mask}"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", [None, "shared", "each entry's"])
@pytest.mark.parametrize(("qo_len", "head_dim", "interleaved"), [(1, 128, False), (3, 64, True), (2, 256, None)])
def test_decode_step(qo_len, head_dim, interleaved, mask, device):
    """What a model's step calls, with nothing but a boolean mask: new rows into a static cache, then attention to it."""
    batch, heads, kv_heads, slots = 3, 8, 2, 1500
    at = torch.tensor([[1487], [64], [1300]])[: batch if mask == "each entry's" else 1] + torch.arange(qo_len)
    seen = torch.arange(slots) <= at.amax(1)[:, None, None, None]
    q = torch.randn(batch, heads, qo_len, head_dim, device=device).bfloat16()
    k, v = (torch.randn(batch, kv_heads, qo_len, head_dim, device=device).bfloat16() for _ in range(2))
    k_cache, v_cache = (torch.randn(batch, kv_heads, slots, head_dim, device=device).bfloat16() for _ in range(2))
    cache = (k_cache, v_cache, (at if len(at) > 1 else at[0]).to(device), None if mask is None else seen.to(device))
    if interleaved is None:
        assert_op_matches_reference(SPECS["append_attention"], Sample((q, k, v, *cache), name="decode step"))
        return
    angles = torch.rand(1, qo_len, head_dim // 2, device=device) * 6.3
    tables = angles.cos().bfloat16(), angles.sin().bfloat16()
    sample = Sample((q, k, v, *tables, *cache), {"interleaved": interleaved}, "decode step")
    assert_op_matches_reference(SPECS["rope_append_attention"], sample)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [-1, 400])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("where", ["ahead", "behind", "each entry's", "at the slots"])
@pytest.mark.parametrize(
    ("batch", "qo_len", "head_dim"), [(1, 1, 128), (3, 1, 128), (8, 1, 64), (3, 2, 64), (1, 1, 256)]
)
def test_decode_step_by_query_positions(batch, qo_len, head_dim, where, masked, window, device):
    """Causal says what is seen, by positions that need not be the slots: what is written may not be seen, and still is written."""
    heads, kv_heads, slots = 8, 2, 1500
    at = torch.arange(qo_len, device=device) + 700
    places = {
        "ahead": at + 750,  # in another tile than what is written
        "behind": at - 600,
        "each entry's": torch.arange(batch, device=device)[:, None] * 490 - 3 + torch.arange(qo_len, device=device),
        "at the slots": at,
    }
    q = torch.randn(batch, heads, qo_len, head_dim, device=device).bfloat16()
    k, v = (torch.randn(batch, kv_heads, qo_len, head_dim, device=device).bfloat16() for _ in range(2))
    k_cache, v_cache = (torch.randn(batch, kv_heads, slots, head_dim, device=device).bfloat16() for _ in range(2))
    seen = None
    if masked:
        keys = torch.arange(slots, device=device)
        seen = ((keys < 90) | (keys > 650)).view(1, 1, 1, -1)
    angles = torch.rand(1, qo_len, head_dim // 2, device=device) * 6.3
    tables = angles.cos().bfloat16(), angles.sin().bfloat16()
    options = {"causal": True, "window_left": window, "query_positions": places[where]}
    sample = Sample((q, k, v, *tables, k_cache, v_cache, at, seen), options, f"decode step, {where}")
    assert_op_matches_reference(SPECS["rope_append_attention"], sample)
