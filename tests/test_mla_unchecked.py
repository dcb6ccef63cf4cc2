"""Latent attention by index tensors that nothing checks: no kernel reads or writes outside of a tensor.

Where it runs, and how: see `test_batch_unchecked.py`.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from test_batch_unchecked import between_guards, hostile
from test_cuda_unchecked import DEVICE, EMULATED, HOPPER, ON_GPU, _wait

pytestmark = [] if EMULATED else ON_GPU


def call(qo_lens, kv_lens, page_size=4, heads=3, dtype=torch.bfloat16, kv_dtype=None, index=torch.int32):
    def rand(*shape):
        return torch.randn(*shape).to(dtype)

    counts = [-(-n // page_size) for n in kv_lens]
    num_pages, nnz = sum(counts) + 3, sum(qo_lens)
    last = [n - (count - 1) * page_size if n else 0 for n, count in zip(kv_lens, counts, strict=True)]
    indptr, qo_indptr = ([0, *itertools.accumulate(n)] for n in (counts, qo_lens))
    indices = torch.randperm(num_pages)[: sum(counts)]
    caches = (rand(num_pages, page_size, d).to(kv_dtype or dtype) for d in (512, 64))
    tables = (torch.as_tensor(t).to(index) for t in (qo_indptr, indices, indptr, last))
    return rand(nnz, heads, 512), rand(nnz, heads, 64), *caches, *tables


CASES = {"16 heads": {"heads": 16}, "fp8": {"kv_dtype": torch.float8_e5m2}, "int64": {"index": torch.int64}}


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_hostile_batches(case, at_end):
    """Each index tensor in turn; a later call with the right ones is as before."""
    args = [between_guards(t, at_end) for t in call([1, 3, 9, 0], [30, 9, 50, 4], **CASES[case])]

    def attend(args):
        return torch.ops.fi.mla_paged_attention(*args, 192**-0.5, causal=True)

    expected = attend(args)
    for which in (4, 5, 6, 7):
        for values in hostile(args[which].cpu()):
            attend([*args[:which], between_guards(values, at_end), *args[which + 1 :]])
    _wait()
    assert torch.equal(attend(args), expected)


def test_pages_that_are_nowhere_do_not_take_part():
    """As if the request had no such keys, or on Hopper keys of zeros; what lies in pages 0 and -1 plays no part."""
    args = [t.to(DEVICE) for t in call([1, 2], [37, 20])]
    wrong = [t.clone() for t in args]
    wrong[5][:3] = torch.tensor([-1, len(args[2]), 2**31 - 1])
    wrong[5][4] = -(2**31)
    got = torch.ops.fi.mla_paged_attention(*wrong, 0.1)
    if HOPPER:
        zeros = [torch.cat((cache, torch.zeros_like(cache[:1]))) for cache in args[2:4]]
        wrong[5][[0, 1, 2, 4]] = len(args[2])
        expected = torch.ops.fi.mla_paged_attention(*args[:2], *zeros, args[4], wrong[5], *args[6:], 0.1)
        assert torch.equal(got, expected)
        return
    # The pages that are there, as a table of their own: without causality the order of keys is all the same.
    kept = args[5][[3, *range(5, len(args[5]))]]
    indptr = args[6] - torch.tensor([0, 4, 4], device=DEVICE)
    expected = torch.ops.fi.mla_paged_attention(*args[:5], kept, indptr, args[7], 0.1)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.002)
