"""Every attention kernel of `csrc/cuda/kernels/sm90` on calls that are as small as lead to it.

Which kernel a call leads to depends on the number of multiprocessors. The emulator (`tests/emulation`) takes it from
FI_EMULATION_SMS, so that there all of them run (`test_emulation.py` makes sure); on a GPU most of these calls have more room than
work.
"""

from __future__ import annotations

import pytest
import torch
from test_batch_masks import _packed
from test_fp8_attention import check as check_fp8
from test_fp8_attention import tensors as fp8_tensors
from test_fp8_batch_attention import check_many_rows, paged_args, ragged_args

from fi_ops.library import SPECS, Sample
from fi_ops.testing import assert_op_matches_reference

pytestmark = pytest.mark.gpu

DIMS = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
DTYPES = [torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(autouse=True)
def _one_multiprocessor(monkeypatch):
    """Tiles of 192 rows then need fewer rounds than tiles of 128, for as many rows as one holds and the other doesn't."""
    monkeypatch.setenv("FI_EMULATION_SMS", "1")


def rand(*sizes, dtype):
    return torch.randn(*sizes, device="cuda").to(dtype)


def indptr(*ends):
    return torch.tensor([0, *ends], device="cuda", dtype=torch.int32)


def check(op, args, **options):
    assert_op_matches_reference(SPECS[op], Sample(args, options, "a small call"))


def mask_of(kind, qo_len, kv_len, dtype):
    """A mask that leaves each row some key: True and False, or numbers; None for "plain" and "soft cap"."""
    seen = torch.rand(1, 2, qo_len, kv_len, device="cuda") < 0.7
    seen[..., 3] = True
    return {
        "mask": seen,
        "bias": torch.where(seen, torch.randn_like(seen, dtype=torch.float32), -torch.inf).to(dtype),
    }.get(kind)


@pytest.mark.parametrize("qo_len", [100, 150], ids=["128 rows", "192 rows"])
@pytest.mark.parametrize("kind", ["plain", "soft cap", "mask", "mask and soft cap", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_prompt(dims, dtype, kind, qo_len):
    """Two heads over one, of two KV tiles or three; bottom-right causal."""
    torch.manual_seed(0)
    kv_len = qo_len if kind == "bias" else qo_len + 57
    q, k, v = (
        rand(1, h, n, d, dtype=dtype) for h, n, d in ((2, qo_len, dims[0]), (1, kv_len, dims[0]), (1, kv_len, dims[1]))
    )
    soft_cap = 20.0 if "soft cap" in kind else 0.0
    mask = mask_of(kind.removesuffix(" and soft cap"), qo_len, kv_len, dtype)
    check("attention_with_lse", (q, k, v, mask), causal=kind != "mask", logits_soft_cap=soft_cap)


@pytest.mark.parametrize("stride", [16, 1, 2], ids=["aligned", "words", "anywhere"])
def test_mask_in_memory(stride):
    """Masks whose rows begin anywhere, and whose keys lie apart."""
    torch.manual_seed(0)
    kv_len = 160 if stride == 16 else 157
    q, k, v = (rand(1, 1, n, 64, dtype=torch.bfloat16) for n in (70, kv_len, kv_len))
    mask = (torch.rand(1, 1, 70, kv_len * (2 if stride == 2 else 1), device="cuda") < 0.6)[
        ..., :: 2 if stride == 2 else 1
    ]
    check("attention_with_lse", (q, k, v, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions(dtype):
    """Rows whose keys the device finds by their positions, in any order."""
    torch.manual_seed(0)
    q, k, v = (rand(1, h, 90, 64, dtype=dtype) for h in (2, 1, 1))
    caches = [rand(1, 1, 200, 64, dtype=dtype) for _ in range(2)]
    positions = torch.randperm(200, device="cuda")[:90]
    check("append_attention", (q, k, v, *caches, positions), causal=True, window_left=60)


@pytest.mark.parametrize("page_size", [None, 1, 64], ids=["ragged", "rows", "boxes"])
@pytest.mark.parametrize(
    ("qo_lens", "masked"),
    [((70, 3, 130), False), ((70, 3, 130), True), ((1100,), False)],
    ids=["128 rows", "mask", "192 rows"],
)
@pytest.mark.parametrize("soft_cap", [0.0, 20.0], ids=["plain", "soft cap"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_batch(dims, dtype, soft_cap, qo_lens, masked, page_size):
    torch.manual_seed(0)
    kv_lens = (90, 3, 140) if len(qo_lens) > 1 else (70,)
    ends = [torch.tensor(lens).cumsum(0).tolist() for lens in (qo_lens, kv_lens)]
    q = rand(sum(qo_lens), 2 if len(qo_lens) > 1 else 1, dims[0], dtype=dtype)
    options = {"causal": len(qo_lens) > 1, "logits_soft_cap": soft_cap}
    if masked:
        masks = [torch.rand(rows, keys) < 0.5 for rows, keys in zip(qo_lens, kv_lens, strict=True)]
        options["custom_mask"], options["mask_indptr"] = _packed(masks, "cuda", torch.int32)
    if page_size is None:
        k, v = (rand(sum(kv_lens), 1, dim, dtype=dtype) for dim in dims)
        check("ragged_attention_with_lse", (q, k, v, indptr(*ends[0]), indptr(*ends[1])), **options)
        return
    counts = torch.tensor([-(-n // page_size) for n in kv_lens])
    caches = (rand(int(counts.sum()), page_size, 1, dim, dtype=dtype) for dim in dims)
    pages = torch.randperm(int(counts.sum())).to("cuda", torch.int32)
    last = torch.tensor([n - (int(c) - 1) * page_size for n, c in zip(kv_lens, counts, strict=True)])
    table = pages, indptr(*counts.cumsum(0).tolist()), last.to("cuda", torch.int32)
    check("paged_attention_with_lse", (q, *caches, indptr(*ends[0]), *table), **options)


@pytest.mark.parametrize("kv_dtype", [None, *FP8], ids=str)
@pytest.mark.parametrize(("heads", "page_size"), [(16, 64), (16, 1), (80, 16)], ids=["boxes", "rows", "shared boxes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latent(dtype, heads, page_size, kv_dtype, monkeypatch):
    monkeypatch.setenv("FI_EMULATION_SMS", "2")  # a cluster
    torch.manual_seed(0)
    kv_lens = (130, 70)
    counts = [-(-n // page_size) for n in kv_lens]
    queries = [rand(2, heads, width, dtype=dtype) / 2 for width in (512, 64)]
    caches = [rand(sum(counts), page_size, width, dtype=kv_dtype or dtype) for width in (512, 64)]
    pages = torch.randperm(sum(counts)).to("cuda", torch.int32)
    last = torch.tensor([n - (c - 1) * page_size for n, c in zip(kv_lens, counts, strict=True)], dtype=torch.int32)
    table = indptr(1, 2), pages, indptr(counts[0], sum(counts)), last.to("cuda")
    check("mla_paged_attention_with_lse", (*queries, *caches, *table, 192**-0.5))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_8_bits(dim, dtype, causal):
    torch.manual_seed(0)
    args = fp8_tensors("cuda", (1, 2, 1, 150, 170, dim), dtype)
    scales = {
        name: torch.tensor([factor], device="cuda")
        for name, factor in (("q_scale", -0.5), ("k_scale", 1.5), ("v_scale", 2.0))
    }
    check_fp8(args, causal=causal, **scales)


@pytest.mark.parametrize("make", [ragged_args, paged_args], ids=["ragged", "boxes"])
@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_batch_of_8_bits(dim, dtype, make):
    torch.manual_seed(0)
    args = make("cuda", ([70, 3, 130], [90, 3, 140]), dtype, heads=2, kv_heads=1, dims=(dim, dim))
    check_many_rows("ragged" if make is ragged_args else "paged", args, {"causal": True})
