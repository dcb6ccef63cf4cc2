"""Sites that were measured to be faster with stock torch are left to it, and explain says so with the numbers."""

from __future__ import annotations

import pathlib
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from inductor_capture import capture, graph_text
from snippets import cache as cache_snippets

import fi_ops
from fi_ops.inductor import sites
from fi_ops.inductor.fuse import decline
from fi_ops.inductor.fuse.decline import Facts, Measured, Range

MEASUREMENT = dict(stock="flash", ratio=1.25, gpu="test machine", source="bench/results/none.csv")


def rows(monkeypatch, *conditions):
    table = tuple(Measured(**MEASUREMENT, **c) for c in conditions)
    monkeypatch.setattr(decline, "MEASURED", table)


def on_cpu(**conditions):
    return dict(device="cpu", **conditions)


def qkv(length=6, heads=2, kv_heads=2, dtype=torch.float32):
    return tuple(torch.randn(1, h, length, 16, dtype=dtype) for h in (heads, kv_heads, kv_heads))


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=k[:, :1, None, :, 0] < 9)


def causal_by_its_mask(q, k, v):
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def grouped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def repeated(q, k, v):
    return F.scaled_dot_product_attention(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))


def eager(q, k, v):
    return torch.softmax(q @ k.transpose(2, 3) * 0.25, dim=-1) @ v


def declined(fn, inputs, **options) -> bool:
    result = capture(fn, *inputs, **options)
    (site,) = (s for s in result.sites if s.kind == "attention")
    assert bool(site.grade) != site.stock_is_faster, site
    return site.stock_is_faster


def test_rows_carry_their_evidence():
    root = pathlib.Path(__file__).parents[1]
    for row in decline.MEASURED:
        assert row.ratio > 1 and (root / row.source).is_file(), row
        assert row.device == "cuda" and row.masks and row.grades and row.spellings


@pytest.mark.parametrize(
    ("conditions", "fn", "expected"),
    [
        (dict(), causal, True),
        (dict(device="cuda"), causal, False),
        (dict(capability=(9, 0)), causal, False),
        (dict(dtypes=(torch.bfloat16,)), causal, False),
        (dict(dtypes=(torch.bfloat16, torch.float32)), causal, True),
        (dict(head_dims=(16, 64)), causal, True),
        (dict(head_dims=(128,)), causal, False),
        (dict(head_dims_vo=(128,)), causal, False),
        (dict(batch=Range(1, 1)), causal, True),
        (dict(qo_len=Range(6)), causal, True),
        (dict(qo_len=Range(7)), causal, False),
        (dict(kv_len=Range(high=5)), causal, False),
        (dict(same_lengths=True), causal, True),
        (dict(causal=True), causal, True),
        (dict(causal=False), causal, False),
        (dict(), masked, False),
        (dict(masks=("bool",)), masked, True),
        (dict(masks=("none", "bool")), causal_by_its_mask, False),  # stock has a mask to make and to read there
        (dict(heads=("equal",)), causal, True),
        (dict(), eager, False),
        (dict(spellings=("eager",)), eager, True),
        (dict(grades=("rope + attention",)), causal, False),
    ],
)
def test_conditions(monkeypatch, conditions, fn, expected):
    rows(monkeypatch, on_cpu() | conditions)
    assert declined(fn, qkv()) is expected


@pytest.mark.parametrize("heads", ["equal", "grouped", "repeated"])
@pytest.mark.parametrize(("fn", "given"), [(grouped, "grouped"), (repeated, "repeated")])
def test_how_heads_come(monkeypatch, heads, fn, given):
    rows(monkeypatch, on_cpu(heads=(heads,)))
    assert declined(fn, qkv(heads=4)) is (heads == given)


def test_any_row_is_enough(monkeypatch):
    rows(monkeypatch, on_cpu(head_dims=(128,)), on_cpu(head_dims=(16,)))
    assert declined(causal, qkv())


def test_symbolic_sizes_are_taken_unless_proven(monkeypatch):
    """With every size symbolic a length is not known to be in a range: ours. What is static still matches."""
    for conditions, expected in (
        (dict(qo_len=Range(4)), False),
        (dict(qo_len=Range(2)), True),  # torch's own assumption of every symbolic size
        (dict(qo_len=Range(high=4096)), False),
        (dict(head_dims=(16,)), False),
        (dict(dtypes=(torch.float32,), causal=True), True),
    ):
        rows(monkeypatch, on_cpu(**conditions))
        assert declined(causal, qkv(), dynamic=True) is expected, conditions
    q, k, v = qkv()
    for tensor in (q, k, v):
        torch._dynamo.mark_static(tensor, 3)
    rows(monkeypatch, on_cpu(head_dims=(16,)))
    assert declined(causal, (q, k, v), dynamic=True)


def test_a_declined_site_is_what_stock_compiles(monkeypatch):
    rows(monkeypatch, on_cpu(masks=("none", "bool"), grades=("attention", "rope + append + attention")))
    step = cache_snippets.step()
    for fn, inputs in ((causal, qkv()), (masked, qkv()), (cache_snippets.huggingface, step)):
        stock, ours = (capture(fn, *inputs, rewritten=r) for r in (False, True))
        assert [s.grade for s in ours.sites if s.kind == "attention"] == [""]
        assert graph_text(ours.graphs[0]) == graph_text(stock.graphs[0])


def test_explain_gives_the_numbers(monkeypatch, capsys):
    rows(monkeypatch, on_cpu(dtypes=(torch.float32,), head_dims=(16,), qo_len=Range(4), causal=True))
    found = fi_ops.explain(lambda q, k, v: masked(causal(q, k, v), k, v), *qkv())
    assert found.count("attention", fused=True) == 1
    text = capsys.readouterr().out
    assert re.search(
        r"stock flash measured 1\.25x faster at float32, head_dim 16, qo_len >= 4, no mask, causal "
        r"\(test machine, bench/results/none\.csv\)",
        text,
    ), text
    assert "attention: 1 of 2 rewritten, 1 left to stock, which is faster there" in text


def test_no_warning_about_what_was_measured(monkeypatch):
    rows(monkeypatch, on_cpu())
    (report,) = capture(causal, *qkv()).reports
    monkeypatch.setattr(sites, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sites.publish(report)


def test_ranges():
    assert Range(3).holds(3) and not Range(3).holds(2) and Range(high=3).holds(3) and not Range(high=3).holds(4)
    assert [str(r) for r in (Range(3), Range(high=3), Range(1, 2), Range(1, 1))] == [">= 3", "<= 3", "1 to 2", "= 1"]


def test_facts_are_asked_for_only_with_rows(monkeypatch):
    monkeypatch.setattr(decline, "MEASURED", ())

    def facts() -> Facts:
        raise AssertionError("an empty table asks for nothing")

    decline.check_worth("node", facts)
