"""Keys and values that a layer expands from compressed ones (DeepSeek-V2 and V3): absorbed where rows are few, left where not."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from inductor_capture import DEVICES, capture, to_device

B, H, S, N, R, V, C = 2, 4, 24, 16, 8, 12, 32


def step(length=1, dtype=torch.float32):
    """(query, new compressed keys, their rotated part, both caches, the expanding weight, positions, mask)"""
    generator = torch.Generator().manual_seed(length)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    positions = torch.arange(5, 5 + length)
    mask = (torch.arange(S) <= positions[:, None])[None, None]
    new, caches = (rand(B, 1, length, C), rand(B, 1, length, R)), (rand(B, 1, S, C), rand(B, 1, S, R))
    return rand(B, H, length, N + R), *new, *caches, rand(H * (N + V), C) / C**0.5, positions, mask


def expanded(ckv, weight, bias=None):
    y = F.linear(ckv, weight, bias).view(B, S, H, N + V).transpose(1, 2)
    return torch.split(y, [N, V], dim=-1)


def written(ckv, kpe, ckv_cache, kpe_cache, positions):
    ckv_cache.index_copy_(2, positions, ckv)
    kpe_cache.index_copy_(2, positions, kpe)


def by_cat(q, ckv, kpe, ckv_cache, kpe_cache, weight, positions, mask):
    written(ckv, kpe, ckv_cache, kpe_cache, positions)
    k_nope, v = expanded(ckv_cache, weight)
    k = torch.cat((k_nope, kpe_cache.expand(-1, H, -1, -1)), -1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def pe_first(q, ckv, kpe, ckv_cache, kpe_cache, weight, positions, mask):
    written(ckv, kpe, ckv_cache, kpe_cache, positions)
    k_nope, v = expanded(ckv_cache, weight)
    return F.scaled_dot_product_attention(
        q, torch.cat((kpe_cache.expand(-1, H, -1, -1), k_nope), -1), v, mask, scale=0.3
    )


def by_copies(q, ckv, kpe, ckv_cache, kpe_cache, weight, positions, mask):
    """transformers from 5.17 on; products and a softmax, with a mask that sets scores to the lowest number."""
    written(ckv, kpe, ckv_cache, kpe_cache, positions)
    k_nope, v = expanded(ckv_cache, weight)
    k = k_nope.new_empty(B, H, S, N + R)
    k[..., :N].copy_(k_nope)
    k[..., N:].copy_(kpe_cache.expand(-1, H, -1, -1))
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.2
    lowest = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(F.softmax(scores + lowest, dim=-1, dtype=wide).to(q.dtype), v)


def proven(q, ckv, kpe, ckv_cache, kpe_cache, weight, positions, mask):
    """With a mask of the lowest number that the graph makes from positions, as transformers does: `start` and up."""
    rows = positions[0] + torch.arange(q.shape[2], device=q.device)
    mask = (torch.arange(S, device=q.device) <= rows[:, None])[None, None]
    return by_copies(q, ckv, kpe, ckv_cache, kpe_cache, weight, rows, mask)


def padded(q, ckv, kpe, ckv_cache, kpe_cache, weight, positions, mask):
    """The first sequence begins with padding: read from a mask that is data."""
    keep = torch.ones(B, 1, 1, S, dtype=torch.bool, device=q.device)
    keep[0, ..., :2] = False
    return by_cat(q, ckv, kpe, ckv_cache, kpe_cache, weight, positions, mask & keep)


def read_twice(q, ckv, kpe, ckv_cache, kpe_cache, weight, positions, mask):
    written(ckv, kpe, ckv_cache, kpe_cache, positions)
    k_nope, v = expanded(ckv_cache, weight)
    k = torch.cat((k_nope, kpe_cache.expand(-1, H, -1, -1)), -1)
    return F.scaled_dot_product_attention(q, k, v, mask), v.sum()


def with_bias(q, ckv, kpe, ckv_cache, kpe_cache, weight, positions, mask):
    written(ckv, kpe, ckv_cache, kpe_cache, positions)
    k_nope, v = expanded(ckv_cache, weight, weight[:, 0])
    k = torch.cat((k_nope, kpe_cache.expand(-1, H, -1, -1)), -1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def one_pe_a_head(q, ckv, kpe, ckv_cache, kpe_cache, weight, positions, mask):
    written(ckv, kpe, ckv_cache, kpe_cache, positions)
    k_nope, v = expanded(ckv_cache, weight)
    k = torch.cat((k_nope, kpe_cache.repeat(1, H, 1, 1) * torch.arange(H, device=q.device).view(H, 1, 1)), -1)
    return F.scaled_dot_product_attention(q, k, v, mask)


def tensors(output):
    return output if isinstance(output, tuple) else (output,)


def check(fn, inputs, device):
    """Compile and compare with float64, and the caches too; returns what was captured."""
    inputs = to_device(inputs, device)
    plain = copy.deepcopy(inputs)
    exact = tuple(t.double() if t.is_floating_point() else t.clone() for t in inputs)
    with torch.no_grad():
        expected, wanted = tensors(fn(*plain)), tensors(fn(*exact))
    got = capture(fn, *inputs)
    for ours, eager, precise in zip(tensors(got.output), expected, wanted, strict=True):
        eps = torch.finfo(ours.dtype).eps
        allowed = 2 * ((eager.double() - precise).abs().max() + eps * precise.abs().max())
        assert (ours.double() - precise).abs().max() <= allowed
    assert torch.equal(inputs[3], plain[3]) and torch.equal(inputs[4], plain[4])
    assert not any("internal error" in reason for reason in got.reasons()), got.reasons()
    return got


def is_absorbed(got) -> bool:
    (site,) = (site for site in got.sites if site.kind == "attention")
    assert site.grade, site
    return "absorbed weights" in site.pieces


def expands(got) -> bool:
    """Some product has a row for each slot of the cache."""
    products = [node for graph in got.graphs for node in graph.nodes if "aten.mm" in str(node.target)]
    return any(node.meta["val"].shape[0] == B * S for node in products)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("fn", [by_cat, pe_first, by_copies, proven, padded])
def test_absorbed(fn, length, dtype, device):
    got = check(fn, step(length, dtype), device)
    assert is_absorbed(got) and not expands(got)
    assert got.sites[0].grade == ("latent attention" if fn is proven else "attention")


@pytest.mark.parametrize("length", [1, 3])
def test_rows_in_front_of_all_keys_are_refused(length):
    """Such a row would see the mean of all values, the op has none for it. In eager mode index_copy_ refuses these positions."""
    *inputs, positions, mask = step(length)
    with pytest.raises(IndexError):
        proven(*inputs, positions - 6, mask)
    with pytest.raises(RuntimeError, match="kv_last_page_len"):
        capture(proven, *inputs, positions - 6, mask)


@pytest.mark.parametrize("fn", [read_twice, with_bias, one_pe_a_head])
def test_near_misses_stay_expanded(fn):
    got = check(fn, step(), "cpu")
    assert not is_absorbed(got) and expands(got)


def test_many_rows_stay_expanded():
    """A row and a key have 2 C + R products in common when absorbed, and N + R + V when not."""
    got = check(by_cat, step(18), "cpu")
    assert not is_absorbed(got) and "18 rows over 24 keys" in got.reasons()[0]
