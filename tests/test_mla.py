"""Latent attention: random batches against its definition over dense rows, and what samples can't say of its caches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fi_ops
from fi_ops.testing import assert_within_budget

RELAXED = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LENGTHS = st.tuples(st.sampled_from([0, 1, 1, 2, 4, 9, 40]), st.sampled_from([0, 1, 5, 16, 33, 64, 65, 130, 300]))
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
SCALE = 192**-0.5


def attend(q_nope, q_pe, ckv, kpe, causal, scale, kv_scale):
    """One request from the definition: queries `[n, heads, width]`, rows `[kv_len, width]` -> (output, LSE), in q_nope's dtype."""
    wide = torch.float64 if q_nope.dtype == torch.float64 else torch.float32
    rows = [t.to(q_nope.dtype).to(wide) for t in (ckv, kpe)]
    logits = sum(q.to(wide) @ t.T for q, t in zip((q_nope, q_pe), rows, strict=True)) * (scale * kv_scale)
    n, kv_len = len(q_nope), len(ckv)
    if causal:
        hidden = torch.arange(kv_len) > torch.arange(n)[:, None] + kv_len - n
        logits = logits.masked_fill(hidden[:, None], -torch.inf)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0, lse)[..., None])
    return (weights @ rows[0] * kv_scale).to(q_nope.dtype), lse / torch.tensor(2.0, dtype=wide).log()


@st.composite
def batches(draw):
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=5))
    page_size, heads = draw(st.sampled_from([1, 3, 16, 64])), draw(st.sampled_from([1, 5, 16, 20, 128]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    kv_dtype = draw(st.sampled_from([dtype, dtype, *FP8]))
    widths = draw(st.sampled_from([(512, 64), (512, 64), (40, 9), (128, 0)]))
    index, padding = draw(st.sampled_from([torch.int32, torch.int64])), draw(st.sampled_from([0, 2]))
    counts = [-(-kv // page_size) for _, kv in lengths]
    num_pages, nnz = sum(counts) + 2, sum(q for q, _ in lengths) + padding
    cache = torch.randn(num_pages, page_size, sum(widths)).to(dtype).to(kv_dtype)
    caches = cache.split(widths, -1)  # views of one tensor, or tensors of their own
    if draw(st.booleans()):
        caches = [t.contiguous() for t in caches]
    queries = [torch.randn(nnz, heads, d).to(dtype) / 2 for d in widths]
    last = [kv - (count - 1) * page_size if kv else 0 for (_, kv), count in zip(lengths, counts, strict=True)]
    tables = [
        torch.as_tensor(t).to(index)
        for t in (
            [0, *itertools.accumulate(q for q, _ in lengths)], torch.randperm(num_pages)[: sum(counts)],
            [0, *itertools.accumulate(counts)], last,
        )
    ]  # fmt: skip
    return lengths, queries, caches, tables


@RELAXED
@given(batches(), st.booleans(), st.sampled_from([None, 0.75]), st.sampled_from([SCALE, -0.1, 0.0]))
def test_random_batches(batch, causal, kv_scale, scale):
    lengths, queries, caches, tables = batch
    factor = None if kv_scale is None else torch.tensor([kv_scale])
    got = torch.ops.fi.mla_paged_attention_with_lse(*queries, *caches, *tables, scale, factor, causal=causal)

    def expect(convert):
        queries_of, results = [convert(q) for q in queries], []
        for b, (_, kv) in enumerate(lengths):
            rows = slice(*tables[0][b : b + 2].tolist())
            pages = tables[1][slice(*tables[2][b : b + 2].tolist())]
            keys = (t.view(torch.uint8) if t.element_size() == 1 else t for t in caches)
            keys = [k[pages].flatten(0, 1)[:kv].view(t.dtype) for k, t in zip(keys, caches, strict=True)]
            results.append(attend(*(q[rows] for q in queries_of), *keys, causal, scale, kv_scale or 1.0))
        padding = queries_of[0][tables[0][-1] :]
        results.append((torch.zeros_like(padding), torch.full(padding.shape[:2], -torch.inf)))
        return [torch.cat(parts) for parts in zip(*results, strict=True)]

    exact, same = expect(torch.Tensor.double), expect(lambda t: t)
    for name, g, e, s in zip(("output", "LSE"), got, exact, same, strict=True):
        assert_within_budget(g, e, s, name)


def test_heads_and_requests_do_not_depend_on_each_other():
    """A head alone, or a request alone, up to how its keys are cut: the error budget's size."""
    torch.manual_seed(1)
    q_nope, q_pe = (torch.randn(2, 16, d) for d in (512, 64))
    caches = [torch.randn(9, 16, d) for d in (512, 64)]
    table = torch.tensor([8, 1, 3, 0, 5]), torch.tensor([0, 3, 5]), torch.tensor([7, 16])
    whole = torch.ops.fi.mla_paged_attention(q_nope, q_pe, *caches, torch.arange(3), *table, SCALE)
    head = torch.ops.fi.mla_paged_attention(q_nope[:, 5:6], q_pe[:, 5:6], *caches, torch.arange(3), *table, SCALE)
    torch.testing.assert_close(head, whole[:, 5:6])
    second = table[0][3:], torch.tensor([0, 2]), table[2][1:]
    request = torch.ops.fi.mla_paged_attention(q_nope[1:], q_pe[1:], *caches, torch.arange(2), *second, SCALE)
    torch.testing.assert_close(request, whole[1:])


def _appended(dtype, kv_dtype, fused: bool):
    """Caches written by RoPE and append of eight tokens of two requests and one of padding, and the rotated q_pe."""
    torch.manual_seed(2)
    q_pe, ckv, kpe = (torch.randn(9, *shape).to(dtype) for shape in ((16, 64), (512,), (64,)))
    batch_indices, positions = torch.tensor([0] * 5 + [1] * 3 + [-1]), torch.tensor([0, 1, 2, 3, 4, 7, 8, 9, -1])
    table = torch.tensor([3, 1, 5, 0, 2]), torch.tensor([0, 2, 5]), torch.tensor([1, 2])
    caches = [torch.zeros(6, 4, d).to(kv_dtype) for d in (512, 64)]
    angles = torch.rand(10, 32) * 6.3
    cos_sin_cache = torch.cat((angles.cos(), angles.sin()), -1)
    if fused:
        q_pe = fi_ops.rope_append_paged_mla_kv_cache(
            q_pe, ckv, kpe, cos_sin_cache, batch_indices, positions, *caches, *table, is_neox=False
        )
    else:
        rotated = [t.flatten(1)[:8].clone() for t in (q_pe, kpe)]
        fi_ops.apply_rope_with_cos_sin_cache_inplace(positions[:8], *rotated, 64, cos_sin_cache, False)
        q_pe[:8], kpe[:8] = rotated[0].view(8, 16, 64), rotated[1]
        fi_ops.append_paged_mla_kv_cache(ckv, kpe, batch_indices, positions, *caches, *table)
    return q_pe, *(c.view(torch.uint8) if c.element_size() == 1 else c for c in caches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rope_and_append_is_one_after_the_other(dtype):
    assert all(
        torch.equal(a, b) for a, b in zip(_appended(dtype, dtype, True), _appended(dtype, dtype, False), strict=True)
    )


@pytest.mark.parametrize("fp8", FP8, ids=str)
def test_rope_and_append_into_fp8(fp8):
    """From float32, where both round once."""
    fused, parts = (_appended(torch.float32, fp8, f) for f in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(fused, parts, strict=True))
    assert int(fused[1].count_nonzero()) > 0


def test_append_refusals():
    args = [torch.zeros(1, 2, 64), torch.zeros(1, 512), torch.zeros(1, 64), torch.zeros(4, 64)]
    where, caches = [torch.zeros(1, dtype=torch.int32)] * 2, [torch.zeros(2, 4, d) for d in (512, 64)]
    table = torch.tensor([1]), torch.tensor([0, 1]), torch.tensor([1])
    fi_ops.rope_append_paged_mla_kv_cache(*args, *where, *caches, *table)
    for name, at in (("append_ckv", 1), ("append_kpe", 2)):
        wrong = [t[None] if i == at else t for i, t in enumerate(args)]
        with pytest.raises(
            RuntimeError, match=rf"rope_append_paged_mla_kv_cache.*{name} must have 2 dimensions, got \[1, 1, "
        ):
            fi_ops.rope_append_paged_mla_kv_cache(*wrong, *where, *caches, *table)
    with pytest.raises(RuntimeError, match=r"ckv_cache must have 3 dimensions, got \[2, 1, 4, 512\]"):
        fi_ops.rope_append_paged_mla_kv_cache(*args, *where, caches[0][:, None], caches[1], *table)
