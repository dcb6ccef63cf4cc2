"""FlexAttention, where a snippet can't say it: block masks that are more than their mask mod, sharing, size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inductor_capture import call_target, capture
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fi_ops.inductor.fuse import flex as fuse_flex
from fi_ops.testing import assert_within_budget

B, H, L, D, BLOCK = 2, 4, 64, 16, 16


def random_blocks(batch: int) -> tuple[BlockMask, torch.Tensor]:
    """A block mask of which some blocks are computed in full, some by a causal mask mod, some not; and as a dense mask."""
    kind = torch.randint(0, 3, (batch, 1, L // BLOCK, L // BLOCK))
    lists = []
    for wanted in (kind == 1, kind == 2):
        order = torch.argsort(wanted.int(), dim=-1, descending=True, stable=True).int()
        lists += [wanted.sum(-1).int(), order]
    blocks = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, i, j: i >= j)
    wide = kind.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)
    causal = torch.ones(L, L, dtype=torch.bool).tril()
    return blocks, ((wide == 1) & causal) | (wide == 2)


@pytest.mark.parametrize("batch", [1, B])
def test_only_the_listed_blocks_are_looked_at(batch):
    """And the mask mod is not asked in full blocks."""
    blocks, dense = random_blocks(batch)
    q, k, v = (torch.randn(B, H, L, D) for _ in range(3))
    got = capture(lambda q, k, v: flex_attention(q, k, v, block_mask=blocks), q, k, v)
    assert got.grades() == ["attention"], got.reasons()
    plain, exact = (
        F.scaled_dot_product_attention(*(t.to(d) for t in (q, k, v)), dense) for d in (q.dtype, torch.double)
    )
    assert_within_budget(got.output, exact, plain)


def two_layers(q, k, v):
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device=q.device)
    return flex_attention(flex_attention(q, k, v, block_mask=mask), k, v, block_mask=mask)


def test_layers_share_a_mask():
    got = capture(two_layers, *(torch.randn(B, H, L, D) for _ in range(3)))
    calls = [n for n in got.graphs[0].nodes if call_target(n) == torch.ops.fi.attention.default]
    assert len(calls) == 2 and calls[0].args[3] is calls[1].args[3] is not None


def test_a_mask_that_is_too_large_is_not_made(monkeypatch):
    monkeypatch.setattr(fuse_flex, "LARGEST", B * L * L - 1)
    got = capture(two_layers, *(torch.randn(B, H, L, D) for _ in range(3)))
    assert got.grades() == ["", ""] and "elements" in got.reasons()[0]
