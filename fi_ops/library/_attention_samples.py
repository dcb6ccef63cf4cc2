"""Samples and error samples of the attention ops: every feature alone, the mixes that models use, the edges."""

from __future__ import annotations

import math

import torch

from ._spec import FP8, ErrorSample, Sample


def _make(device, dtype):
    def rand(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    return rand


def _qkv(device, dtype, batch=2, heads=4, kv_heads=2, qo_len=5, kv_len=70, head_dim=64, head_dim_vo=None):
    rand = _make(device, dtype)
    q = rand(batch, heads, qo_len, head_dim)
    k = rand(batch, kv_heads, kv_len, head_dim)
    return q, k, rand(batch, kv_heads, kv_len, head_dim_vo or head_dim)


def _masks(device, dtype, batch, heads, qo_len, kv_len):
    """(name, mask): bool and additive, broadcast and full, with rows that see nothing."""
    keep = torch.rand(batch, 1, qo_len, kv_len, device=device) > 0.4
    keep[:, :, 0] = False
    yield "bool mask, one row empty", keep
    yield "key padding mask", (torch.arange(kv_len, device=device) < kv_len // 3).view(1, 1, 1, kv_len)
    yield (
        "bool mask per head, strided",
        (torch.rand(batch, kv_len, qo_len, heads, device=device) > 0.5).permute(0, 3, 2, 1),
    )
    additive = torch.zeros(batch, 1, qo_len, kv_len, device=device).masked_fill(~keep, -math.inf).to(dtype)
    yield "additive mask, -inf", additive
    low = torch.finfo(dtype).min
    yield (
        "additive mask, finfo.min",
        torch.zeros(1, 1, qo_len, kv_len, device=device).masked_fill(~keep[:1], low).to(dtype),
    )
    yield "additive float32 bias", torch.randn(1, heads, qo_len, kv_len, device=device)


def attention_samples(device, dtype):
    q, k, v = _qkv(device, dtype)
    heads, qo_len, kv_len = q.shape[1], q.shape[2], k.shape[2]
    slopes, sinks = torch.rand(heads, device=device) * 0.2, torch.randn(heads, device=device)
    yield Sample((q, k, v), name="full")
    yield Sample((q, k, v), {"causal": True}, "causal, bottom-right")
    yield Sample((q, k, v), {"causal": True, "q_offset": 0}, "causal, top-left")
    yield Sample((q, k, v), {"causal": True, "window_left": 16}, "causal window")
    yield Sample((q, k, v), {"scale": 0.3, "logits_soft_cap": 8.0}, "scale and soft cap")
    yield Sample((q, k, v), {"causal": True, "alibi_slopes": slopes}, "ALiBi")
    yield Sample((q, k, v), {"causal": True, "sinks": sinks}, "sinks")
    for name, mask in _masks(device, dtype, 2, heads, qo_len, kv_len):
        yield Sample((q, k, v, mask), name=name)
    mask = torch.rand(2, 1, qo_len, kv_len, device=device) > 0.3
    everything = {
        "causal": True,
        "window_left": 40,
        "scale": 0.2,
        "logits_soft_cap": 20.0,
        "alibi_slopes": slopes,
        "sinks": sinks,
    }
    yield Sample((q, k, v, mask), everything, "all features at once")
    yield Sample(_qkv(device, dtype, 1, 8, 8, 1, 33, 80), name="decode, no groups, head_dim 80")
    yield Sample(_qkv(device, dtype, 1, 16, 1, 1, 700, 128), name="decode, one KV head, long")
    yield Sample(_qkv(device, dtype, 2, 6, 2, 130, 130, 96), {"causal": True}, "prefill, causal, odd sizes")
    yield Sample(_qkv(device, dtype, 1, 2, 1, 70, 200, 192, 128), {"causal": True}, "append, head_dim_vo 128")
    yield Sample(_qkv(device, dtype, 1, 2, 2, 3, 9, 17), name="head_dim 17")
    bshd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    yield Sample(tuple(bshd), {"causal": True}, "[batch, len, heads, head_dim] strides")
    yield Sample((q, k[:, :, ::2], v[:, :, ::2]), name="strided cache")
    yield Sample((q, k, v), {"scale": 0.0, "causal": True}, "scale 0")
    yield Sample((q, k, v), {"scale": -0.3}, "negative scale")
    yield from _long_mask_samples(device, dtype)
    for fp8 in FP8:
        yield Sample((q, k.to(fp8), v.to(fp8)), {"causal": True}, f"{fp8} keys and values")
        yield Sample((q[:, :, :1], k.to(fp8), v.to(fp8)), {"sinks": sinks}, f"{fp8}, decode")
        by_token = q.transpose(1, 2).contiguous().transpose(1, 2)
        yield Sample(
            (by_token, k.to(fp8), v.to(fp8)), {"causal": True, "alibi_slopes": slopes}, f"{fp8}, [batch, len] query"
        )
    strided = (
        t.transpose(1, 2).contiguous().transpose(1, 2).to(FP8[0]) for t in _qkv(device, dtype, 2, 4, 2, 90, 90, 80)[1:]
    )
    yield Sample(
        (_qkv(device, dtype, 2, 4, 2, 90, 90, 80)[0], *strided), {"causal": True, "window_left": 30}, "fp8, prefill"
    )
    odd = (t.to(FP8[1])[..., :9] for t in (k, v))
    yield Sample((q[..., :9], *odd, mask), name="fp8, head_dim 9, unaligned, mask")
    yield from _fp8_query_samples(device, dtype)
    yield Sample((q[:, :, :0], k, v), name="no query rows")
    yield Sample((q, k[:, :, :0], v[:, :, :0]), name="no keys")
    yield Sample((q, k[:, :, :3], v[:, :, :3]), {"causal": True}, "more queries than keys")


def _fp8_query_samples(device, dtype):
    """Scales of 8-bit tensors, queries among them. `dtype` is the output's."""

    def scale(count):
        return torch.rand(count, device=device) + 0.5

    q, k, v = _qkv(device, dtype)
    scales = {"k_scale": scale(2), "v_scale": scale(1)}
    yield Sample((q, k.to(FP8[0]), v.to(FP8[0])), scales | {"causal": True}, "fp8 keys, scales")
    mask = torch.rand(2, 1, 5, 70, device=device) > 0.3
    yield Sample((q, k.to(FP8[1]), v.to(FP8[1]), mask), scales | {"out_dtype": dtype}, "fp8 keys, scales, mask")
    heads = {"q_scale": scale(4), "k_scale": scale(2), "v_scale": scale(2)}
    for fp8 in FP8:
        eight = [t.to(fp8) for t in (q, k, v)]
        as_dtype = {"out_dtype": dtype}
        yield Sample(tuple(eight), as_dtype, f"{fp8}")
        yield Sample(tuple(eight), {"causal": True}, f"{fp8}, bfloat16 by default")
        yield Sample((eight[0][:, :, :1], *eight[1:]), heads | as_dtype, f"{fp8}, decode, scales a head")
        yield Sample(
            (*eight, mask), heads | as_dtype | {"logits_soft_cap": 9.0}, f"{fp8}, mask, scales a head, soft cap"
        )
    additive = torch.zeros(2, 1, 5, 70, device=device).masked_fill(~mask, -math.inf).to(dtype)
    one = {"q_scale": scale(1), "k_scale": scale(1), "v_scale": scale(1), "out_dtype": dtype}
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2).to(FP8[0]) for t in (q, k, v)]
    yield Sample((*by_token, additive), one, "fp8 queries, one scale each, additive mask")
    for sizes in ((1, 4, 2, 80, 80, 80), (1, 2, 1, 70, 200, 192, 128)):
        many = (t.to(FP8[0]) for t in _qkv(device, dtype, *sizes))
        yield Sample(tuple(many), one | {"causal": True}, f"fp8 queries, head_dim {sizes[5]}")
    none = (t.to(FP8[0]) for t in (q[:, :, :0], k, v))
    yield Sample(tuple(none), as_dtype, "no fp8 query rows")
    yield Sample((eight[0], eight[1][:, :, :0], eight[2][:, :, :0]), as_dtype, "fp8 queries, no keys")


def _long_mask_samples(device, dtype):
    """Keys enough for several tiles, masks that leave some of them out whole."""
    at = torch.arange(900, device=device)
    keep = ((at > 130) & (at < 140)) | (at > 700)
    few, many = _qkv(device, dtype, 2, 4, 2, 2, 900), _qkv(device, dtype, 1, 66, 2, 3, 900)
    yield Sample((*few, keep.view(1, 1, 1, -1)), name="few rows, mask with holes")
    yield Sample((*many, keep.view(1, 1, 1, -1)), {"causal": True}, "33 heads a group, mask with holes, causal")
    low = torch.zeros(900, device=device).masked_fill(~keep, torch.finfo(dtype).min).to(dtype)
    yield Sample((*few, low.view(1, 1, 1, -1)), name="few rows, finfo.min with holes")
    yield Sample(
        (*many, low.view(1, 1, 1, -1).expand(1, 66, 3, -1)), {"window_left": 500}, "finfo.min, window, broadcast"
    )
    starts = torch.tensor([250, 0], device=device).view(2, 1, 1, 1)
    yield Sample((*_qkv(device, dtype, 2, 2, 2, 40, 300), at[:300] >= starts), {"causal": True}, "left padding")


def _tables(device, dtype, length, pairs, batch=1, full=True):
    """cos and sin of random angles, one a pair or (full) one for each of its members."""
    angles = torch.rand(batch, length, 2 * pairs if full else pairs, device=device) * 6.3
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_attention_samples(device, dtype):
    q, k, v = _qkv(device, dtype)
    kv_len, pairs = k.shape[2], q.shape[3] // 2
    yield Sample((q, k, v, *_tables(device, dtype, kv_len, pairs)), {"causal": True}, "rotate-half, full-width tables")
    yield Sample((q, k, v, *_tables(device, torch.float32, kv_len, pairs, 2, False)), name="float32 tables per request")
    for full, width in ((True, "full"), (False, "half")):
        tables = _tables(device, dtype, kv_len, pairs, full=full)
        yield Sample((q, k, v, *tables), {"causal": True, "interleaved": True}, f"interleaved, {width} width")
    tables = _tables(device, dtype, kv_len, 16, full=False)
    yield Sample((q, k, v, *tables), {"rotary_dim": 32, "causal": True}, "partial rotary dim")
    prefill = _qkv(device, dtype, 1, 4, 2, 70, 70)
    yield Sample((*prefill, *_tables(device, dtype, 70, pairs)), {"causal": True, "q_offset": 0}, "prefill")
    mask = torch.rand(2, 1, q.shape[2], kv_len, device=device) > 0.3
    yield Sample((q, k, v, *_tables(device, dtype, kv_len, pairs), mask), {"scale": 0.1}, "mask")
    fp8 = k.to(FP8[0]), v.to(FP8[0])
    yield Sample((q, *fp8, *_tables(device, dtype, kv_len, pairs)), {"causal": True}, "fp8 keys and values")


def _cache(device, dtype, batch, kv_heads, max_len, head_dim):
    rand = _make(device, dtype)
    return rand(batch, kv_heads, max_len, head_dim), rand(batch, kv_heads, max_len, head_dim)


def _append_parts(device, dtype, batch, heads, kv_heads, qo_len, max_len, head_dim):
    q, k, v = _qkv(device, dtype, batch, heads, kv_heads, qo_len, qo_len, head_dim)
    return q, k, v, *_cache(device, dtype, batch, kv_heads, max_len, head_dim)


def _seen(positions, max_len):
    """The mask a model builds: slots up to each token's position, `[batch or 1, 1, qo_len, max_len]`."""
    slots = torch.arange(max_len, device=positions.device)
    mask = slots <= positions[..., None]
    return mask[None, None] if positions.dim() == 1 else mask[:, None]


def _query_positions(device):
    """Rows that don't stand at their slots.

    (name, (batch, heads, KV heads, qo_len, max_len, head_dim), slots, query positions, options)
    """

    def at(*values, dtype=torch.int64):
        return torch.tensor(values, device=device, dtype=dtype)

    causal = {"causal": True}
    step = (2, 4, 2, 1, 50, 64)
    yield "behind the slot: the new key is not seen", step, at(40), at(11), causal
    yield "ahead of the slot, int32", step, at(7), at(30, dtype=torch.int32), causal
    each = at([30], [7], dtype=torch.int32)
    yield "per request, slots shared", step, at(20), each, causal
    yield "shared, slots per request", step, each, at(20), causal
    far = at([-2], [49], [torch.iinfo(torch.int64).max])
    yield "outside the cache: nothing or everything", (3, 4, 2, 1, 50, 64), at(3), far, causal
    yield "neither causal nor window", step, at(9), at([-5], [5]), {}
    few, window = torch.arange(3, device=device) + 9, {"causal": True, "window_left": 6}
    yield "few rows, not ascending, window", (2, 4, 2, 3, 50, 64), few, at([30, 2, 11], [0, 60, 48]), window
    yield "long cache, behind", (1, 4, 1, 1, 1500, 64), at(1400), at(700), causal
    yield "long cache, window, per request", (2, 4, 1, 1, 1500, 64), at(1000), at([1300], [90]), {"window_left": 200}
    many = torch.arange(20, device=device)
    yield "prefill, behind", (1, 6, 2, 20, 50, 64), many + 25, many, causal
    yield "prefill, per request", (2, 6, 2, 20, 90, 64), many + 25, torch.stack((many + 60, many - 4)), window


def append_kv_samples(device, dtype):
    _, k, v, k_cache, v_cache = _append_parts(device, dtype, 2, 4, 2, 3, 20, 64)
    yield Sample((k_cache, v_cache, k, v, torch.tensor([4, 7, 5], device=device)), name="int64 positions, out of order")
    per_request = torch.tensor([[0, 1, 2], [17, 18, 19]], device=device, dtype=torch.int32)
    yield Sample((k_cache, v_cache, k, v, per_request), name="int32 positions per request")
    bshd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k_cache, v_cache, k, v)]
    yield Sample((*bshd, per_request), name="[batch, len, heads, head_dim] strides")
    yield Sample((k_cache, v_cache, k[:, :, :0], v[:, :, :0], per_request[:, :0]), name="nothing to append")


def append_attention_samples(device, dtype):
    max_len = 50
    decode = _append_parts(device, dtype, 2, 4, 2, 1, max_len, 64)
    at = torch.tensor([11], device=device)
    yield Sample((*decode, at, _seen(at, max_len)), name="decode, bool mask")
    each = torch.tensor([[30], [7]], device=device, dtype=torch.int32)
    yield Sample((*decode, each), {"causal": True}, "decode, positions per request, causal")
    prefill = _append_parts(device, dtype, 1, 4, 2, 20, max_len, 64)
    start = torch.arange(5, 25, device=device)
    yield Sample((*prefill, start), {"causal": True, "window_left": 6}, "prefill chunk, window")
    slopes = torch.rand(4, device=device)
    yield Sample((*prefill, start), {"causal": True, "alibi_slopes": slopes, "logits_soft_cap": 5.0}, "ALiBi, soft cap")
    for name, sizes, slots, query_positions, options in _query_positions(device):
        parts = _append_parts(device, dtype, *sizes)
        yield Sample((*parts, slots), options | {"query_positions": query_positions}, f"query positions {name}")
        if "per request" in name:
            mask = torch.rand(1, 1, sizes[3], sizes[4], device=device) > 0.3
            yield Sample((*parts, slots, mask), options | {"query_positions": query_positions}, f"{name}, mask")
    options = {"alibi_slopes": slopes, "query_positions": torch.tensor([[45], [-3]], device=device)}
    yield Sample((*decode, at), options, "ALiBi from query positions")


def rope_append_attention_samples(device, dtype):
    max_len, pairs = 50, 32
    decode = _append_parts(device, dtype, 2, 4, 2, 1, max_len, 64)
    at = torch.tensor([11], device=device)

    def with_tables(parts, tables):
        return (*parts[:3], *tables, *parts[3:])

    tables = _tables(device, dtype, 1, pairs)
    yield Sample((*with_tables(decode, tables), at, _seen(at, max_len)), name="decode, bool mask")
    each = torch.tensor([[30], [7]], device=device, dtype=torch.int32)
    tables = _tables(device, torch.float32, 1, pairs, 2, False)
    yield Sample((*with_tables(decode, tables), each), {"causal": True}, "decode, everything per request")
    tables = _tables(device, dtype, 1, pairs)
    yield Sample((*with_tables(decode, tables), at), {"interleaved": True}, "decode, interleaved, full width")
    prefill = _append_parts(device, dtype, 1, 6, 2, 20, max_len, 64)
    tables = _tables(device, dtype, 20, pairs, full=False)
    start = torch.arange(0, 20, device=device)
    yield Sample((*with_tables(prefill, tables), start), {"causal": True, "interleaved": True}, "prefill, interleaved")
    tables = _tables(device, dtype, 20, 16)
    sinks = torch.randn(6, device=device)
    options = {"causal": True, "rotary_dim": 32, "sinks": sinks, "window_left": 9}
    yield Sample((*with_tables(prefill, tables), start), options, "partial rotary dim, sinks, window")
    bshd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in prefill]
    tables = _tables(device, dtype, 20, pairs)
    yield Sample((*with_tables(bshd, tables), start), {"causal": True}, "[batch, len, heads, head_dim] strides")
    for name, sizes, slots, query_positions, options in _query_positions(device):
        parts = with_tables(_append_parts(device, dtype, *sizes), _tables(device, dtype, sizes[3], pairs))
        yield Sample((*parts, slots), options | {"query_positions": query_positions}, f"query positions {name}")


# ---- what must be refused ----


def attention_errors(device):
    q, k, v = _qkv(device, torch.float32)
    yield ErrorSample(
        (q.double(), k, v),
        r"query must be float32, bfloat16, float16, float8_e4m3fn or float8_e5m2, got float64; convert",
    )
    yield ErrorSample(
        (q[0], k, v), r"query must be \[batch, num_qo_heads, qo_len, head_dim\], got \[4, 5, 64\]; reshape"
    )
    yield ErrorSample((q, k.half(), v), r"key must have query's dtype float32, got float16; convert")
    yield ErrorSample((q, k.to(FP8[0]), v), r"value must have key's dtype float8_e4m3fn, got float32; convert")
    yield ErrorSample(
        (q, k[:1], v), r"key must be \[batch, num_kv_heads, kv_len, head_dim\] = \[2, 2, 70, 64\], got \[1, 2, 70, 64\]"
    )
    yield ErrorSample((q, k[..., :32], v), r"key must be .* = \[2, 2, 70, 64\], got \[2, 2, 70, 32\]")
    yield ErrorSample((q, k, v[:, :, :9]), r"value must be .* = \[2, 2, 70, 64\], got \[2, 2, 9, 64\]")
    yield ErrorSample((q[:, :3], k, v), r"query must have a multiple of key's 2 heads, got 3; repeat")
    yield ErrorSample(
        (q.transpose(2, 3).contiguous().transpose(2, 3), k, v), r"query must have a contiguous last dimension"
    )
    mask = torch.ones(2, 1, 5, 71, dtype=torch.bool, device=device)
    yield ErrorSample(
        (q, k, v, mask),
        r"mask must broadcast to \[batch, num_qo_heads, qo_len, kv_len\] = \[2, 4, 5, 70\], got \[2, 1, 5, 71\]",
    )
    yield ErrorSample((q, k, v, mask[0, 0]), r"mask must broadcast to .*, got \[5, 71\]")
    yield ErrorSample((q, k, v, mask[..., :70].half()), r"mask must be bool or float32, got float16; convert")
    yield ErrorSample(
        (q, k, v),
        r"alibi_slopes must be \[num_qo_heads\] = \[4\], got \[3\]",
        {"alibi_slopes": torch.ones(3, device=device)},
    )
    yield ErrorSample((q, k, v), r"sinks must be float32, got float16", {"sinks": torch.ones(4, device=device).half()})
    yield ErrorSample((q, k, v), r"window_left must be -1 \(no window\) or more, got -2; pass", {"window_left": -2})
    yield ErrorSample((q, k, v), r"scale must be a number, got nan; leave", {"scale": math.nan})
    yield ErrorSample((q, k, v), r"logits_soft_cap must be 0 \(none\) or more, got -1; pass", {"logits_soft_cap": -1.0})
    yield ErrorSample(
        (q, k, v), r"logits_soft_cap must be 0 \(none\) or more, got nan; pass", {"logits_soft_cap": math.nan}
    )
    yield ErrorSample(
        (q.clone().requires_grad_(), k, v), r"has no backward, got an input that requires grad; call it under"
    )
    yield from _fp8_errors(q, k, v)


def _fp8_errors(q, k, v):
    """Of 8-bit operands, their scales, the dtype of what they give."""
    eight = [t.to(FP8[0]) for t in (q, k, v)]
    yield ErrorSample((eight[0], k, v), r"key must have query's dtype float8_e4m3fn, got float32; convert")
    yield ErrorSample(
        (eight[0], k.to(FP8[1]), v), r"key must have query's dtype float8_e4m3fn, got float8_e5m2; convert"
    )
    one = torch.ones(1, device=q.device)
    wrong = r"must be left out where {} is not of 8 bits, got {} in float32; fold them into scale and the output"
    yield ErrorSample((q, *eight[1:]), "q_scale " + wrong.format("query", "query"), {"q_scale": one})
    for name in ("k_scale", "v_scale"):
        yield ErrorSample((q, k, v), "k_scale and v_scale " + wrong.format("key", "key"), {name: one})
    three = torch.ones(3, device=q.device)
    heads = r"q_scale must be \[1 or num_qo_heads 4\], got \[3\]; pass one scale, or one a head"
    yield ErrorSample(tuple(eight), heads, {"q_scale": three})
    heads = r"k_scale must be \[1 or num_kv_heads 2\], got \[3\]; pass one scale, or one a KV head"
    yield ErrorSample(tuple(eight), heads, {"k_scale": three})
    yield ErrorSample(tuple(eight), r"v_scale must be float32, got float16", {"v_scale": one.half()})
    yield ErrorSample(
        (q, k, v), r"out_dtype must be query's dtype float32, got bfloat16", {"out_dtype": torch.bfloat16}
    )
    floats = r"out_dtype must be float32, bfloat16 or float16, got {}; leave it out for bfloat16"
    yield ErrorSample(tuple(eight), floats.format("float64"), {"out_dtype": torch.float64})
    yield ErrorSample(tuple(eight), floats.format("float8_e4m3fn"), {"out_dtype": FP8[0]})
    mask = torch.ones(2, 1, 5, 70, device=q.device).half()
    yield ErrorSample((*eight, mask), r"mask must be bool, float32 or bfloat16, got float16; convert")


def rope_attention_errors(device):
    q, k, v = _qkv(device, torch.float32)
    cos, sin = _tables(device, torch.float32, 70, 32)
    yield ErrorSample(
        (q.to(FP8[0]), k, v, cos, sin), r"query must be float32, bfloat16 or float16, got float8_e4m3fn; convert"
    )
    want = r"\[1 or batch, kv_len, R or 2R\] = \[1 or 2, 70, 32 or 64\]"
    yield ErrorSample((q, k, v, cos[:, :9], sin[:, :9]), rf"cos must be {want}, got \[1, 9, 64\]; check rotary_dim")
    yield ErrorSample((q, k, v, cos, sin[..., :40]), rf"sin must be {want}, got \[1, 70, 40\]; check rotary_dim")
    yield ErrorSample((q, k, v, cos, sin[..., :32]), r"sin must be cos's shape = \[1, 70, 64\], got \[1, 70, 32\]")
    yield ErrorSample((q, k, v, cos.half(), sin), r"cos must be float32, got float16; convert")
    yield ErrorSample(
        (q, k, v, cos, sin), r"rotary_dim must be even and at most head_dim 64, got 66; pass 0", {"rotary_dim": 66}
    )
    yield ErrorSample(
        (q, k, v, cos, sin), r"rotary_dim must be even and at most head_dim 64, got 7; pass 0", {"rotary_dim": 7}
    )
    yield ErrorSample((q, k[:1], v, cos, sin), r"key must be .* = \[2, 2, 70, 64\], got \[1, 2, 70, 64\]")
    outside = r"q_offset must place the 5 query rows among the 70 rows of cos and sin, got {}; pass"
    yield ErrorSample((q, k, v, cos, sin), outside.format(66), {"q_offset": 66})
    yield ErrorSample((q, k, v, cos, sin), outside.format(-1), {"q_offset": -1})


def append_kv_errors(device):
    _, k, v, k_cache, v_cache = _append_parts(device, torch.float32, 2, 4, 2, 3, 20, 64)
    at = torch.tensor([4, 7, 5], device=device)
    want = r"positions must be \[qo_len\] or \[batch, qo_len\] = \[3\] or \[2, 3\]"
    yield ErrorSample((k_cache, v_cache, k, v, at[:2]), rf"{want}, got \[2\]; pass the cache slot")
    yield ErrorSample((k_cache, v_cache, k, v, at.float()), r"positions must be int32 or int64, got float32; convert")
    yield ErrorSample(
        (k_cache, v_cache, k.half(), v, at), r"key must have k_cache's dtype float32, got float16; convert"
    )
    yield ErrorSample((k_cache, v_cache, k, v[:, :1], at), r"value must be .* = \[2, 2, 3, 64\], got \[2, 1, 3, 64\]")
    yield ErrorSample(
        (k_cache, v_cache[:, :, :9], k, v, at), r"v_cache must be .* = \[2, 2, 20, 64\], got \[2, 2, 9, 64\]"
    )
    outside = r"positions must be in \[0, 20\), the cache's slots, got {}; grow the cache or fix the positions"
    yield ErrorSample((k_cache, v_cache, k, v, at + 13), outside.format(20), needs_values=True)
    yield ErrorSample((k_cache, v_cache, k, v, at - 5), outside.format(-1), needs_values=True)


def append_attention_errors(device):
    parts = _append_parts(device, torch.float32, 2, 4, 2, 1, 50, 64)
    q, k, v, k_cache, v_cache = parts
    at = torch.tensor([11], device=device)
    yield ErrorSample(
        (q, k, v, k_cache[..., :32], v_cache, at), r"k_cache must be .* = \[2, 2, 50, 64\], got \[2, 2, 50, 32\]"
    )
    yield ErrorSample((q, k[:, :1], v, k_cache, v_cache, at), r"key must be .* = \[2, 2, 1, 64\], got \[2, 1, 1, 64\]")
    yield ErrorSample(
        (*parts, at[:0]), r"positions must be \[qo_len\] or \[batch, qo_len\] = \[1\] or \[2, 1\], got \[0\]"
    )
    mask = torch.ones(1, 1, 1, 49, dtype=torch.bool, device=device)
    yield ErrorSample((*parts, at, mask), r"mask must broadcast to .* = \[2, 4, 1, 50\], got \[1, 1, 1, 49\]")
    yield ErrorSample(
        (*parts, at + 39), r"positions must be in \[0, 50\), the cache's slots, got 50; grow", needs_values=True
    )
    for query_positions, message in _wrong_query_positions(at):
        yield ErrorSample((*parts, at), message, {"query_positions": query_positions})


def _wrong_query_positions(at):
    """For 2 requests of one row each."""
    want = r"query_positions must be \[qo_len\] or \[batch, qo_len\] = \[1\] or \[2, 1\]"
    advice = "pass the position of each query row"
    yield at.expand(2), rf"{want}, got \[2\]; {advice}"
    yield at.expand(3, 1), rf"{want}, got \[3, 1\]; {advice}"
    yield at[0], rf"{want}, got \[\]; {advice}"
    yield at.float(), "query_positions must be int32 or int64, got float32; convert"


def rope_append_attention_errors(device):
    q, k, v, k_cache, v_cache = _append_parts(device, torch.float32, 2, 4, 2, 1, 50, 64)
    at = torch.tensor([11], device=device)
    cos, sin = _tables(device, torch.float32, 1, 32)
    yield ErrorSample(
        (q, k, v, cos[..., :20], sin[..., :20], k_cache, v_cache, at),
        r"cos must be \[1 or batch, qo_len, R or 2R\] = \[1 or 2, 1, 32 or 64\], got \[1, 1, 20\]; check rotary_dim",
    )
    yield ErrorSample(
        (q, k, v, cos, sin, k_cache, v_cache, at - 12), r"positions must be in \[0, 50\), .* got -1", needs_values=True
    )
    for query_positions, message in _wrong_query_positions(at):
        yield ErrorSample((q, k, v, cos, sin, k_cache, v_cache, at), message, {"query_positions": query_positions})
