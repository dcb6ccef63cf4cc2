"""Masks that are proven from their own arithmetic: the op is told `causal` and a window, and no mask of queries by keys is made.

Near misses stay data. Either way the answer is that of eager, by the error budget.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from inductor_capture import Capture, call_target, capture, compiled_for_capture
from torch.nn.attention.flex_attention import flex_attention

from fi_ops.testing import assert_within_budget

transformers = pytest.importorskip("transformers")

from test_inductor_models import LAYERS, build, new_cache  # noqa: E402

B, H, L, S, D = 2, 4, 5, 9, 16
"""Sizes that no other dimension has."""
NEVER, LOWEST = float("-inf"), torch.finfo(torch.float32).min
OPS = ("fi.attention.default", "fi.rope_attention.default", "fi.append_attention.default",
       "fi.rope_append_attention.default")  # fmt: skip


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def calls(got: Capture) -> list[dict]:
    """The arguments of each attention op in the graphs, those given or not the default."""
    found = []
    for graph in got.graphs:
        for node in graph.nodes:
            op = call_target(node)
            if node.op == "call_function" and str(op) in OPS:
                names = [a.name for a in op._schema.arguments]
                given = {} if op is not node.target else dict(zip(names, node.args, strict=False))
                found.append({**given, **node.kwargs})
    return found


def facts(call: dict) -> dict:
    """What the op was told about its rows; `mask` is the shape of the mask."""
    told = {name: call.get(name) for name in ("causal", "q_offset", "query_positions") if call.get(name)}
    if call.get("q_offset") == 0:
        told["q_offset"] = 0
    if call.get("window_left", -1) >= 0:
        told["window_left"] = call["window_left"]
    if call.get("mask") is not None:
        told["mask"] = tuple(call["mask"].meta["val"].shape)
    return told


def made(got: Capture, rows: int, keys: int) -> list[str]:
    """Nodes of the graphs that are tensors of rows by keys."""
    names = []
    for graph in got.graphs:
        for node in graph.nodes:
            value = node.meta.get("val")
            if (
                node.op == "call_function"
                and isinstance(value, torch.Tensor)
                and tuple(value.shape[-2:]) == (rows, keys)
            ):
                names.append(str(node.target))
    return names


def qkv(rows=L, keys=S):
    torch.manual_seed(0)
    return [0.6 * torch.randn(B, H, length, D) for length in (rows, keys, keys)]


def check(fn, *inputs, dynamic=False, **options) -> Capture:
    """The capture of `fn`, whose answer is right."""
    with torch.no_grad():
        plain = fn(*copy.deepcopy(inputs))
        exact = fn(*(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs))
    for tensor in inputs[:3]:
        torch._dynamo.mark_static(tensor, 3)
    got = capture(fn, *copy.deepcopy(inputs), dynamic=dynamic, **options)
    assert not any("internal error" in reason for reason in got.reasons()), got.reasons()
    assert_within_budget(got.output, exact, plain)
    return got


def sdpa(mask_of):
    def attend(q, k, v, *rest):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_of(q, k, *rest))

    return attend


def eager(mask_of, fill=LOWEST):
    """Adds a mask of numbers."""

    def attend(q, k, v, *rest):
        keep = mask_of(q, k, *rest)
        return ((q @ k.mT) * 0.25 + torch.where(keep, 0.0, fill)).softmax(-1) @ v

    return attend


def rows(q, dtype=torch.int64):
    return torch.arange(q.shape[2], dtype=dtype)[:, None]


def keys(k, dtype=torch.int64):
    return torch.arange(k.shape[2], dtype=dtype)[None]


# ---- spellings: what the op is told, with 5 queries and 9 keys ----

SPELLINGS = {
    "compare": (lambda q, k: keys(k) <= rows(q), dict(causal=True, q_offset=0)),
    "compare, other way": (lambda q, k: rows(q) >= keys(k), dict(causal=True, q_offset=0)),
    "less than": (lambda q, k: keys(k) < rows(q) + 1, dict(causal=True, q_offset=0)),
    "difference": (lambda q, k: rows(q) - keys(k) > -1, dict(causal=True, q_offset=0)),
    "offset": (lambda q, k: keys(k) <= rows(q) + 2, dict(causal=True, q_offset=2)),
    "bottom right": (lambda q, k: keys(k) - (k.shape[2] - q.shape[2]) <= rows(q), dict(causal=True, q_offset=S - L)),
    "int32": (lambda q, k: keys(k, torch.int32) <= rows(q, torch.int32) + 2, dict(causal=True, q_offset=2)),
    "int32 and int64": (lambda q, k: keys(k, torch.int32) <= rows(q), dict(causal=True, q_offset=0)),
    "not": (lambda q, k: ~(keys(k) > rows(q)), dict(causal=True, q_offset=0)),
    "not of or": (
        lambda q, k: ~((keys(k) > rows(q)) | (keys(k) + 3 <= rows(q))),
        dict(causal=True, q_offset=0, window_left=2),
    ),
    "logical_not, expanded": (
        lambda q, k: torch.logical_not(keys(k) > rows(q)).expand(B, 1, -1, -1),
        dict(causal=True, q_offset=0),
    ),
    "tril": (lambda q, k: torch.ones(L, S, dtype=torch.bool).tril(), dict(causal=True, q_offset=0)),
    "tril, diagonal": (lambda q, k: torch.ones(L, S, dtype=torch.bool).tril(S - L), dict(causal=True, q_offset=S - L)),
    "tril of floats": (lambda q, k: torch.tril(torch.ones(L, S)) != 0, dict(causal=True, q_offset=0)),
    "tril of numbers to bool": (lambda q, k: torch.ones(L, S).tril().to(torch.bool), dict(causal=True, q_offset=0)),
    "triu is masked": (lambda q, k: torch.ones(L, S).triu(1) == 0, dict(causal=True, q_offset=0)),
    "rows of a larger tril": (
        lambda q, k: torch.ones(S, S, dtype=torch.bool).tril()[S - L :],
        dict(causal=True, q_offset=S - L),
    ),
    "tril between true": (
        lambda q, k: torch.ones(L, S, dtype=torch.bool) & torch.ones(1, 1, L, S, dtype=torch.bool).tril(),
        dict(causal=True, q_offset=0),
    ),
    "gathered": (
        lambda q, k: torch.arange(S)[keys(k)] <= torch.arange(3, 3 + S)[rows(q)],
        dict(causal=True, q_offset=3),
    ),
    "transposed": (
        lambda q, k: (torch.arange(S)[:, None] <= torch.arange(L)[None] + 1).t(),
        dict(causal=True, q_offset=1),
    ),
    "window": (
        lambda q, k: (keys(k) <= rows(q) + 4) & (keys(k) > rows(q) + 4 - 3),
        dict(causal=True, q_offset=4, window_left=2),
    ),
    "distance on both sides": (
        lambda q, k: (rows(q) + 2 - keys(k)).abs() <= 3,
        dict(causal=True, q_offset=5, window_left=6),
    ),
    "distance, negated": (
        lambda q, k: ~((rows(q) - keys(k)).abs() > 1),
        dict(causal=True, q_offset=1, window_left=2),
    ),
    "window without an end": (lambda q, k: keys(k) >= rows(q) + 1, dict(q_offset=1, window_left=0)),
    "within a longer length": (
        lambda q, k: (keys(k) <= rows(q)) & (keys(k) < k.shape[2]) & (rows(q) >= 0),
        dict(causal=True, q_offset=0),
    ),
    "everything": (lambda q, k: keys(k) <= rows(q) + 8, dict()),
    "true": (lambda q, k: torch.ones(L, S, dtype=torch.bool), dict()),
    "where of bools": (lambda q, k: torch.where(keys(k) <= rows(q), True, False), dict(causal=True, q_offset=0)),
    "hstack": (
        lambda q, k: torch.cat([torch.ones(L, S - L, dtype=torch.bool), torch.ones(L, L, dtype=torch.bool).tril()], 1),
        dict(causal=True, q_offset=S - L),
    ),
    "key 0 is seen by none of the first": (lambda q, k: keys(k) <= rows(q) - 2, dict(causal=True, q_offset=-2)),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling(name, dynamic):
    mask_of, told = SPELLINGS[name]
    got = check(sdpa(mask_of), *qkv(), dynamic=dynamic)
    (call,) = calls(got)
    if not dynamic:  # else the sizes of tensors made in the graph are not those of the keys
        assert facts(call) == told
        assert made(got, L, S) == []
        words = ["causal by its mask"] * ("causal" in told)
        words += [f"window of {told['window_left'] + 1} by its mask"] if "window_left" in told else []
        assert list(got.sites[0].pieces) == ["sdpa", *words]
    elif told and "mask" not in facts(call):
        assert {**told, **facts(call)} == told


@pytest.mark.parametrize("fill", [NEVER, LOWEST])
@pytest.mark.parametrize("name", [name for name in SPELLINGS if not name.startswith("key 0")])
def test_spelling_as_numbers(name, fill):
    """What is added to scores. All rows of these see a key, so that it does not matter what the others are set to."""
    mask_of, told = SPELLINGS[name]
    got = check(eager(mask_of, fill), *qkv())
    (call,) = calls(got)
    assert facts(call) == told and made(got, L, S) == []


def one_minus(q, k, v):
    mask = (1.0 - (keys(k) <= rows(q)).float()) * LOWEST
    return ((q @ k.mT) * 0.25 + mask[None, None]).softmax(-1) @ v


def full_triu(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.full((L, S), NEVER).triu(1))


def masked_fill_of_zeros(q, k, v):
    mask = torch.zeros(L, S).masked_fill(keys(k) > rows(q), LOWEST)
    return (q @ k.mT + mask).softmax(-1) @ v


def two_masks(q, k, v):
    scores = (q @ k.mT).masked_fill(keys(k) > rows(q), NEVER)
    return scores.masked_fill(torch.ones(L, S).tril(-3) != 0, NEVER).softmax(-1) @ v


def sum_of_masks(q, k, v):
    mask = torch.full((L, S), LOWEST).triu(1) + torch.where(keys(k) > rows(q) - 3, 0.0, LOWEST)
    return (q @ k.mT + mask).softmax(-1) @ v


def overwritten(q, k, v):
    mask = torch.full((L, S), LOWEST).triu(1).masked_fill(keys(k) <= rows(q) - 3, LOWEST)
    return (q @ k.mT + mask).softmax(-1) @ v


def product_of_masks(q, k, v):
    keep = (keys(k) <= rows(q)).float() * (keys(k) > rows(q) - 3).float()
    return (q @ k.mT).masked_fill(keep == 0, NEVER).softmax(-1) @ v


CAUSAL, WINDOW = dict(causal=True, q_offset=0), dict(causal=True, q_offset=0, window_left=2)


@pytest.mark.parametrize(
    ("fn", "told"),
    [
        (one_minus, CAUSAL),
        (full_triu, CAUSAL),
        (masked_fill_of_zeros, CAUSAL),
        (two_masks, WINDOW),
        (sum_of_masks, WINDOW),
        (overwritten, WINDOW),
        (product_of_masks, WINDOW),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_arithmetic_of_masks(fn, told):
    got = check(fn, *qkv())
    assert [facts(call) for call in calls(got)] == [told] and made(got, L, S) == []


# ---- what is not proven stays data ----

NEAR_MISSES = {
    "or a prefix": lambda q, k: (keys(k) <= rows(q)) | (keys(k) < 3),
    "or same block": lambda q, k: (keys(k) <= rows(q)) | (keys(k) // 3 == rows(q) // 3),
    "twice the key": lambda q, k: 2 * keys(k) <= rows(q) + 3,
    "other way round": lambda q, k: rows(q) <= 2 * keys(k),
    "rows modulo": lambda q, k: keys(k) <= rows(q) % 3,
    "every other key": lambda q, k: (keys(k) + rows(q)) % 2 == 0,
    "key alone": lambda q, k: (keys(k) == rows(q)) | (keys(k) == 0),
    "not equal": lambda q, k: keys(k) != rows(q),
    "flipped": lambda q, k: (keys(k) <= rows(q)).flip(-1),
    "cumulative": lambda q, k: (keys(k) < 4).long().cumsum(-1) <= rows(q) + 1,
    "twice the row": lambda q, k: keys(k) <= 2 * rows(q),
    "far": lambda q, k: (rows(q) - keys(k)).abs() >= 2,
    "every other row of tril": lambda q, k: torch.ones(2 * L, S, dtype=torch.bool).tril()[::2],
    "xor": lambda q, k: (keys(k) <= rows(q)) ^ (keys(k) == 8),
    "small integers wrap around": lambda q, k: keys(k, torch.int8) + 125 >= rows(q, torch.int8),
    "gathered from the end": lambda q, k: torch.arange(S)[keys(k)] <= torch.arange(S)[rows(q) - 2],
    "a short length": lambda q, k: (keys(k) < 4).expand(L, S),
}  # fmt: skip


@pytest.mark.parametrize("kind", [sdpa, eager])
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name, kind):
    got = check(kind(NEAR_MISSES[name]), *qkv())
    (call,) = calls(got)
    assert "mask" in facts(call) and "causal" not in facts(call) and "window_left" not in facts(call)


def test_rows_without_a_key():
    """finfo.min in a whole row means the mean of all values: such a mask is not causal."""
    got = check(eager(lambda q, k: keys(k) < rows(q)), *qkv())
    assert facts(calls(got)[0]) == dict(mask=(1, 1, L, S))
    behind = check(eager(lambda q, k: keys(k) >= rows(q) + 5), *qkv())
    assert facts(calls(behind)[0]) == dict(mask=(1, 1, L, S))


@pytest.mark.parametrize("fill", [NEVER, LOWEST])
def test_two_masks_that_exclude_each_other_in_a_row(fill):
    """A mask of finfo.min leaves key 0 to the first row, and the other mask does not."""

    def attend(q, k, v, padding):
        scores = (q @ k.mT).masked_fill(keys(k) > rows(q), LOWEST)
        return scores.masked_fill(padding, fill).softmax(-1) @ v

    padding = torch.zeros(S, dtype=torch.bool)
    padding[0] = True
    got = check(attend, *qkv(), padding)
    assert "causal" not in facts(calls(got)[0])


def test_not_so_low_numbers():
    got = check(eager(lambda q, k: keys(k) <= rows(q), fill=-50.0), *qkv())
    assert facts(calls(got)[0]) == dict(mask=(1, 1, L, S))


def test_scaled_mask():
    def attend(q, k, v):
        return ((q @ k.mT + torch.where(keys(k) <= rows(q), 0.0, NEVER)) * 0.25).softmax(-1) @ v

    got = check(attend, *qkv())
    assert facts(calls(got)[0]) == CAUSAL


# ---- what is left of a mask is smaller ----


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("negated", [False, True])
def test_padding_stays(dynamic, negated):
    """[B, 1, 1, S] is read instead of [B, 1, L, S]."""

    def keep(q, k, padding):
        causal = keys(k) <= torch.arange(q.shape[2])[:, None]
        return ~(~causal[None, None] | padding[:, None, None, :]) if negated else causal & padding[:, None, None].bool()

    padding = torch.rand(B, S) > 0.4
    padding[:, 0] = not negated
    got = check(sdpa(keep), *qkv(), padding, dynamic=dynamic)
    (call,) = calls(got)
    if not dynamic:
        assert facts(call) == dict(causal=True, q_offset=0, mask=(B, 1, 1, S)) and made(got, L, S) == []
        assert got.sites[0].pieces == ("sdpa", "bool mask", "causal by its mask")


def test_numbers_of_padding_that_are_not_infinite_stay_whole():
    """A row may see nothing but padding, and is then the mean of all values."""
    padding = torch.rand(B, S) > 0.4
    padding[0, :3] = False
    got = check(eager(lambda q, k, keep: (keys(k) <= rows(q)) & keep[:, None, None]), *qkv(), padding)
    assert facts(calls(got)[0]) == dict(mask=(B, 1, L, S))


def test_padding_in_a_mask_of_its_own():
    def attend(q, k, v, bias, padding):
        scores = (q @ k.mT + bias).masked_fill(keys(k) > rows(q), NEVER)
        return scores.masked_fill(padding[:, None, None], NEVER).softmax(-1) @ v

    padding = torch.rand(B, S) > 0.6
    padding[:, 0] = False
    got = check(attend, *qkv(), torch.randn(1, H, 1, S), padding)
    assert facts(calls(got)[0]) == dict(causal=True, q_offset=0, mask=(B, H, 1, S)) and made(got, L, S) == []


def test_the_same_padding_for_two_layers_is_made_once():
    def attend(q, k, v, padding):
        keep = (keys(k) <= rows(q)) & padding[:, None, None, :]
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return F.scaled_dot_product_attention(first, k, v, attn_mask=keep)

    padding = torch.rand(B, S) > 0.4
    padding[:, 0] = True
    got = check(attend, *qkv(), padding)
    first, second = calls(got)
    assert first["mask"] is second["mask"] and made(got, L, S) == []


# ---- over a cache ----


def step(q, k, v, kc, vc, positions, mask_of):
    kc.index_copy_(2, positions, k)
    vc.index_copy_(2, positions, v)
    return F.scaled_dot_product_attention(q, kc, vc, attn_mask=mask_of(q, kc))


def caches():
    return [0.6 * torch.randn(B, H, S, D) for _ in range(2)]


def over_a_cache(mask_of, *rest, **options) -> tuple[dict, Capture]:
    def fn(q, k, v, kc, vc, positions, *rest):
        return step(q, k, v, kc, vc, positions, lambda q, kc: mask_of(kc, positions, *rest))

    got = check(fn, *qkv(3, 3), *caches(), torch.tensor([2, 3, 4]), *rest, **options)
    assert got.grades() == ["append + attention"], got.sites
    (call,) = calls(got)
    return call, got


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_rows_stand_where_they_are_written(dynamic):
    call, got = over_a_cache(lambda kc, positions: keys(kc) <= positions[:, None], dynamic=dynamic)
    assert facts(call) == dict(causal=True)
    assert made(got, 3, S) == []


def test_window_from_where_rows_are_written():
    call, _ = over_a_cache(lambda kc, positions: (keys(kc) <= positions[:, None]) & (keys(kc) > positions[:, None] - 2))
    assert facts(call) == dict(causal=True, window_left=1)


def test_rows_stand_at_another_tensor():
    others = torch.tensor([1, 6, 30])
    call, got = over_a_cache(lambda kc, positions, others: keys(kc) <= others[:, None], others)
    assert call["causal"] and call["query_positions"].op == "placeholder" and made(got, 3, S) == []


def test_rows_stand_at_a_sum():
    start = torch.tensor(3)
    call, got = over_a_cache(lambda kc, positions, start: keys(kc) <= 2 * start + torch.arange(3)[:, None] - 4, start)
    assert call["causal"] and call["query_positions"].meta["val"].shape == (3,) and made(got, 3, S) == []


def test_rows_of_sequences_stand_in_different_places():
    lengths = torch.tensor([3, 5])
    call, got = over_a_cache(
        lambda kc, positions, lengths: keys(kc) < (lengths[:, None] + torch.arange(3))[:, None, :, None], lengths
    )
    assert call["causal"] and call["query_positions"].meta["val"].shape == (B, 3) and made(got, 3, S) == []


def test_a_length_is_a_place():
    lengths = torch.tensor([4, 7], dtype=torch.int32)
    call, _ = over_a_cache(lambda kc, positions, lengths: (keys(kc) < lengths[:, None])[:, None, None], lengths)
    assert call["causal"] and call["query_positions"].meta["val"].shape == (B, 3) and call["mask"] is None


def test_length_and_position():
    """The position is worth more; the length of each sequence stays a mask [B, 1, 1, S]."""
    lengths = torch.tensor([4, 7])
    call, _ = over_a_cache(
        lambda kc, positions, lengths: (keys(kc) < lengths[:, None])[:, None, None] & (keys(kc) <= positions[:, None]),
        lengths,
    )
    assert facts(call) == dict(causal=True, mask=(B, 1, 1, S))


def test_positions_of_heads_stay_data():
    per_head = torch.tensor([3, 4, 5, 6])
    call, _ = over_a_cache(lambda kc, positions, per_head: keys(kc) <= per_head[:, None, None], per_head)
    assert "causal" not in facts(call)


@pytest.mark.parametrize("start", [0, 4])
def test_is_causal_counts_from_the_start_of_the_cache(start):
    """Row i sees slots up to i, wherever the new keys go."""

    def fn(q, k, v, kc, vc):
        kc[:, :, start : start + 3] = k
        vc[:, :, start : start + 3] = v
        return F.scaled_dot_product_attention(q, kc, vc, is_causal=True)

    got = check(fn, *qkv(3, 3), *caches())
    assert got.grades() == ["append + attention"]
    (call,) = calls(got)
    assert call["causal"] and (call.get("query_positions") is None) is (start == 0)


def test_read_only_cache_with_tensor_positions_stays_data():
    got = check(sdpa(lambda q, k, p: keys(k) <= p[:, None]), *qkv(), torch.arange(L) + 2)
    assert facts(calls(got)[0]) == dict(mask=(1, 1, L, S))


# ---- FlexAttention ----


def test_flex_score_mod():
    def attend(q, k, v):
        def causal(score, b, h, i, j):
            return torch.where(j <= i + 4, score, -torch.inf)

        return flex_attention(q, k, v, score_mod=causal)

    got = capture(attend, *qkv())
    (call,) = calls(got)
    assert facts(call) == dict(causal=True, q_offset=4) and made(got, L, S) == []
    assert got.sites[0].pieces == ("flex", "causal by its mask")
    torch.testing.assert_close(got.output, attend(*qkv()))


# ---- Hugging Face ----


def models(family, implementation):
    """(model, the same in float64)"""
    return build(family, implementation), build(family, "sdpa").double()


def logits(model, forward, cache_kind, padded, phase):
    """Of a prompt of 5 tokens, or of the token after it."""
    ids = torch.randint(1, 64, (B, 6), generator=torch.Generator().manual_seed(1))
    keep = torch.ones(B, 6, dtype=torch.long)
    keep[0, :2] = 0

    def extra(length):
        return dict(attention_mask=keep[:, :length]) if padded else {}

    with torch.no_grad():
        if cache_kind == "none":
            return forward(ids[:, :5], use_cache=False, **extra(5)).logits
        cache = new_cache(model, cache_kind)
        if phase == "prefill":
            if cache_kind == "static":
                model(ids[:, :5], past_key_values=cache)
                cache.reset()
            return forward(ids[:, :5], past_key_values=cache, **extra(5)).logits
        model(ids[:, :5], past_key_values=cache, **extra(5))
        return forward(ids[:, 5:], past_key_values=cache, **extra(6)).logits


@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(
    ("cache_kind", "phase"), [("none", "prefill"), ("static", "prefill"), ("static", "decode"), ("dynamic", "decode")]
)
@pytest.mark.parametrize(("family", "implementation"), [("Llama", "sdpa"), ("Llama", "eager"), ("Mistral", "sdpa")])
def test_huggingface(family, implementation, cache_kind, phase, padded, dynamic):
    model, precise = models(family, implementation)
    case = (cache_kind, padded, phase)
    got = Capture()
    ours = logits(model, compiled_for_capture(model.forward, got, dynamic=dynamic), *case)
    visible = (
        slice(2, None) if padded and phase == "prefill" else slice(None)
    )  # what comes out of padding means nothing
    plain, exact = (logits(m, m.forward, *case) for m in (model, precise))
    assert_within_budget(ours[:, visible], exact[:, visible], plain[:, visible])
    told = [facts(call) for call in calls(got)]
    assert len(told) == LAYERS
    if padded and implementation == "eager":  # finfo.min over rows that may see nothing
        assert all("mask" in one and "causal" not in one for one in told)
        return
    if family == "Mistral" and dynamic and (cache_kind, phase) == ("static", "decode"):
        return  # slots are no positions once the cache rolls, which a symbolic length does not exclude
    keys = {"none": 5, "static": 24 if family == "Llama" else 12, "dynamic": 6}[cache_kind]
    assert made(got, 5, keys) == [], "a mask of queries by keys is made"
    sees_all = (cache_kind, phase) == ("dynamic", "decode")
    # A symbolic length may be longer than the window: one row that sees all keys is then still bounded.
    assert (sees_all and dynamic) or all(("causal" in one) is not sees_all for one in told), told
    masks = [one.get("mask") for one in told]
    assert all((mask is not None) is padded for mask in masks), masks
    if padded:
        assert all(mask[1] == mask[2] == 1 for mask in masks), masks


def test_window_of_a_model():
    """A prompt longer than Mistral's window of 12."""
    model, precise = models("Mistral", "sdpa")
    ids = torch.randint(1, 64, (B, 17), generator=torch.Generator().manual_seed(2))
    got = Capture()
    with torch.no_grad():
        ours = compiled_for_capture(model.forward, got)(ids, use_cache=False).logits
        plain, exact = (m(ids, use_cache=False).logits for m in (model, precise))
    assert_within_budget(ours, exact, plain)
    assert [facts(call) for call in calls(got)] == LAYERS * [dict(causal=True, q_offset=0, window_left=11)]
    assert made(got, 17, 17) == []
