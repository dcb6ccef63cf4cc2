# ruff: noqa: E402, E501 (graphs have long lines)
"""The graphs that rewrites leave, written out. `EXPECTTEST_ACCEPT=1 pytest tests/test_inductor_graphs.py` updates them."""

from __future__ import annotations

import pytest

expecttest = pytest.importorskip("expecttest")

import torch
import torch.nn.functional as F
from inductor_capture import capture, graph_text
from snippets import cache, eager, samplers, sdpa
from snippets.rope import gpt_fast_rotate


def gpt_fast_layer(q, k, v, k_cache, v_cache, freqs_cis, positions, mask):
    """Attention of one layer: q, k, v `[B, L, H, D]`, caches `[B, Hkv, Lmax, D]`."""
    freqs = freqs_cis[positions]
    q, k = gpt_fast_rotate(q, freqs), gpt_fast_rotate(k, freqs)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k_cache[:, :, positions] = k
    v_cache[:, :, positions] = v
    return F.scaled_dot_product_attention(
        q, k_cache.repeat_interleave(2, dim=1), v_cache.repeat_interleave(2, dim=1), attn_mask=mask
    )


def huggingface_rope(q, k, v, angles):
    """Rotate-half RoPE and causal attention without a cache; angles `[1, L, D / 2]`."""
    embedding = torch.cat((angles, angles), dim=-1)
    cos, sin = embedding.cos().unsqueeze(1), embedding.sin().unsqueeze(1)

    def rotate_half(x):
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)

    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class TestGraphs(expecttest.TestCase):
    def graph(self, fn, *inputs, **options) -> str:
        return graph_text(capture(fn, *inputs, **options).graphs[0], inputs_by_use=True) + "\n"

    def test_sdpa_bool_mask(self):
        self.assertExpectedInline(
            self.graph(sdpa.bool_mask, *sdpa.masked()),
            """\
%0 = input bool[6, 6]
%1 = input float32[2, 4, 6, 16]
%2 = input float32[2, 4, 6, 16]
%3 = input float32[2, 4, 6, 16]
%4 = aten.unsqueeze(%0, 0)
%5 = aten.unsqueeze(%4, 0)
%6 = fi.attention(%1, %2, %3, %5)
return [%6]
""",
        )

    def test_sdpa_causal_is_top_left(self):
        self.assertExpectedInline(
            self.graph(sdpa.causal_is_top_left, *sdpa.qkv(q_len=3)),
            """\
%0 = input float32[2, 4, 3, 16]
%1 = input float32[2, 4, 6, 16]
%2 = input float32[2, 4, 6, 16]
%3 = fi.attention(%0, %1, %2, None, causal=True, q_offset=0)
return [%3]
""",
        )

    def test_sdpa_dynamic(self):
        self.assertExpectedInline(
            self.graph(sdpa.enable_gqa, *sdpa.grouped(), dynamic=True),
            """\
%0 = input s85
%1 = input s34
%2 = input s0
%3 = input s77
%4 = input float32[s85, s34, s0, s77]
%5 = input float32[s85, s85, s0, s77]
%6 = input float32[s85, s85, s0, s77]
%7 = fi.attention(%4, %5, %6, None, causal=True, q_offset=0)
return [%7]
""",
        )

    def test_repeat_kv(self):
        self.assertExpectedInline(
            self.graph(sdpa.repeat_kv_expand_reshape, *sdpa.grouped()),
            """\
%0 = input float32[2, 4, 6, 16]
%1 = input float32[2, 2, 6, 16]
%2 = input float32[2, 2, 6, 16]
%3 = fi.attention(%0, %1, %2, None)
return [%3]
""",
        )

    def test_eager_attention(self):
        self.assertExpectedInline(
            self.graph(eager.huggingface, *eager.with_mask()),
            """\
%0 = input float32[2, 4, 6, 16]
%1 = input float32[2, 4, 6, 16]
%2 = input float32[2, 4, 6, 16]
%3 = input float32[2, 1, 6, 6]
%4 = fi.attention(%0, %1, %2, %3, scale=0.25)
%5 = aten.permute(%4, [0, 2, 1, 3])
return [%5]
""",
        )

    def test_eager_soft_cap_and_fill(self):
        self.assertExpectedInline(
            self.graph(eager.masked_fill, *sdpa.masked()),
            """\
%0 = input bool[6, 6]
%1 = input float32[2, 4, 6, 16]
%2 = input float32[2, 4, 6, 16]
%3 = input float32[2, 4, 6, 16]
%4 = aten.unsqueeze(%0, 0)
%5 = aten.unsqueeze(%4, 0)
%6 = fi.attention(%1, %2, %3, %5, scale=0.25)
return [%6]
""",
        )

    def test_append(self):
        self.assertExpectedInline(
            self.graph(cache.index_copy, *cache.decode()),
            """\
%0 = input bool[1, 1, 1, 12]
%1 = input float32[2, 4, 1, 16]
%2 = input float32[2, 2, 1, 16]
%3 = input float32[2, 2, 1, 16]
%4 = input int64[1]
%5 = input float32[2, 2, 12, 16]
%6 = input float32[2, 2, 12, 16]
%7 = auto_functionalized_v2(fi.append_attention, mask=%0, causal=False, window_left=-1, logits_soft_cap=0, query=%1, key=%2, value=%3, positions=%4, _k_cache_base_index=0, _v_cache_base_index=1, _all_bases=[%5, %6])
%8 = getitem(%7, 0)
%9 = getitem(%7, 1)
%10 = getitem(%7, 2)
%11 = aten.copy_(%5, %9)
%12 = aten.copy_(%6, %10)
return [%8]
""",
        )

    def test_append_at_a_count(self):
        """The position of one token is the count: nothing computes it. Nor a mask, which says that the token stands there."""
        self.assertExpectedInline(
            self.graph(cache.counting_cache, *cache.counted(1)),
            """\
%0 = input int64[]
%1 = input float32[2, 4, 1, 16]
%2 = input float32[2, 2, 1, 16]
%3 = input float32[2, 2, 1, 16]
%4 = input float32[2, 2, 12, 16]
%5 = input float32[2, 2, 12, 16]
%6 = aten.view(%0, [1])
%7 = auto_functionalized_v2(fi.append_attention, causal=True, window_left=-1, logits_soft_cap=0, query=%1, key=%2, value=%3, positions=%6, _k_cache_base_index=0, _v_cache_base_index=1, _all_bases=[%4, %5])
%8 = getitem(%7, 0)
%9 = getitem(%7, 1)
%10 = getitem(%7, 2)
%11 = aten.add.Tensor(%0, 1)
%12 = aten.copy_(%0, %11)
%13 = aten.copy_(%4, %9)
%14 = aten.copy_(%5, %10)
return [%8]
""",
        )

    def test_append_to_a_cache_laid_out_by_length(self):
        self.assertExpectedInline(
            self.graph(cache.cache_laid_out_by_length, *cache.by_length()),
            """\
%0 = input float32[2, 3, 4, 16]
%1 = input float32[2, 3, 2, 16]
%2 = input float32[2, 3, 2, 16]
%3 = input bool[1, 1, 3, 12]
%4 = input int64[3]
%5 = input float32[2, 12, 2, 16]
%6 = input float32[2, 12, 2, 16]
%7 = aten.permute(%0, [0, 2, 1, 3])
%8 = aten.permute(%1, [0, 2, 1, 3])
%9 = aten.permute(%2, [0, 2, 1, 3])
%10 = auto_functionalized_v2(fi.append_attention, mask=%3, causal=False, window_left=-1, logits_soft_cap=0, query=%7, key=%8, value=%9, positions=%4, _k_cache_base_index=0, _k_cache_size=[2, 2, 12, 16], _k_cache_stride=[384, 16, 32, 1], _k_cache_storage_offset=0, _v_cache_base_index=1, _v_cache_size=[2, 2, 12, 16], _v_cache_stride=[384, 16, 32, 1], _v_cache_storage_offset=0, _all_bases=[%5, %6])
%11 = getitem(%10, 0)
%12 = getitem(%10, 1)
%13 = getitem(%10, 2)
%14 = aten.copy_(%5, %12)
%15 = aten.copy_(%6, %13)
return [%11]
""",
        )

    def test_rope_append_interleaved(self):
        q, k, v, _, _, positions, mask = cache.by_length()
        caches = (
            torch.zeros(cache.B, cache.HKV, cache.LMAX, cache.D),
            torch.zeros(cache.B, cache.HKV, cache.LMAX, cache.D),
        )
        table = torch.randn(cache.LMAX, cache.D // 2, 2)
        self.assertExpectedInline(
            self.graph(gpt_fast_layer, q, k, v, *caches, table, positions, mask),
            """\
%0 = input float32[12, 8, 2]
%1 = input int64[3]
%2 = input float32[2, 3, 2, 16]
%3 = input float32[2, 3, 4, 16]
%4 = input float32[2, 3, 2, 16]
%5 = input bool[1, 1, 3, 12]
%6 = input float32[2, 2, 12, 16]
%7 = input float32[2, 2, 12, 16]
%8 = aten.index.Tensor(%0, [%1])
%9 = aten.view(%8, [1, 3, 1, 8, 2])
%10 = aten.select.int(%9, 4, 0)
%11 = aten.select.int(%9, 4, 1)
%12 = aten.permute(%2, [0, 2, 1, 3])
%13 = aten.permute(%3, [0, 2, 1, 3])
%14 = aten.select.int(%10, 2, 0)
%15 = aten.clone(%14, memory_format=contiguous_format)
%16 = aten.select.int(%11, 2, 0)
%17 = aten.clone(%16, memory_format=contiguous_format)
%18 = aten.permute(%4, [0, 2, 1, 3])
%19 = auto_functionalized_v2(fi.rope_append_attention, mask=%5, interleaved=True, rotary_dim=0, causal=False, window_left=-1, logits_soft_cap=0, query=%13, cos=%15, sin=%17, key=%18, value=%12, positions=%1, _k_cache_base_index=0, _v_cache_base_index=1, _all_bases=[%6, %7])
%20 = getitem(%19, 0)
%21 = getitem(%19, 1)
%22 = getitem(%19, 2)
%23 = aten.copy_(%6, %21)
%24 = aten.copy_(%7, %22)
return [%20]
""",
        )

    def test_rope_rotate_half(self):
        q, k, v = sdpa.qkv()
        self.assertExpectedInline(
            self.graph(huggingface_rope, q, k, v, torch.randn(1, sdpa.L, sdpa.D // 2)),
            """\
%0 = input float32[1, 6, 8]
%1 = input float32[2, 4, 6, 16]
%2 = input float32[2, 4, 6, 16]
%3 = input float32[2, 4, 6, 16]
%4 = aten.unsqueeze(%0, 2)
%5 = aten.expand(%4, [1, 6, 2, 8])
%6 = aten.clone(%5, memory_format=contiguous_format)
%7 = aten.view(%6, [1, 6, 16])
%8 = aten.cos(%7)
%9 = aten.sin(%7)
%10 = aten.slice.Tensor(%8, 2, 0, 8)
%11 = aten.clone(%10, memory_format=contiguous_format)
%12 = aten.slice.Tensor(%9, 2, 0, 8)
%13 = aten.clone(%12, memory_format=contiguous_format)
%14 = fi.rope_attention(%1, %2, %3, %11, %13, None, causal=True, q_offset=0)
return [%14]
""",
        )

    def test_sampler_exponential_trick(self):
        self.assertExpectedInline(
            self.graph(samplers.gpt_fast, *samplers.logits()),
            """\
%0 = input float32[3, 50]
%1 = prims.inductor_seeds(1, cpu)
%2 = prims.inductor_lookup_seed(%1, 0)
%3 = prims.inductor_random([3], %2, rand)
%4 = fi.top_k_top_p_sampling_from_logits(%0, %3, top_k=5, temperature=0.8, top_k_ties=threshold)
%5 = getitem(%4, 0)
%6 = prims.convert_element_type(%5, int64)
%7 = aten.unsqueeze(%6, 1)
%8 = prims.convert_element_type(%7, int32)
return [%8]
""",
        )

    def test_sampler_top_k_top_p(self):
        self.assertExpectedInline(
            self.graph(samplers.huggingface, *samplers.logits()),
            """\
%0 = input float32[3, 50]
%1 = prims.inductor_seeds(1, cpu)
%2 = prims.inductor_lookup_seed(%1, 0)
%3 = prims.inductor_random([3], %2, rand)
%4 = fi.top_k_top_p_sampling_from_logits(%0, %3, top_k=5, top_p=0.9, temperature=0.7, top_k_ties=threshold)
%5 = getitem(%4, 0)
%6 = prims.convert_element_type(%5, int64)
%7 = aten.unsqueeze(%6, 1)
%8 = aten.squeeze.dim(%7, 1)
return [%8]
""",
        )


if __name__ == "__main__":
    expecttest.main()
