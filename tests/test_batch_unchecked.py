"""Attention over a batch by index tensors and plans that nothing checks: no kernel reads or writes outside of a tensor.

On a GPU, or with `--emulate-cuda` under FI_EMULATION_CHECK=0 (`test_emulation.py` does so) in the emulator: there inputs lie
between pages that nobody may touch.
"""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from batch_cases import indptr
from test_cuda_unchecked import DEVICE, EMULATED, ON_GPU, _wait
from test_few_rows_of_a_batch import paged_call

pytestmark = [] if EMULATED else ON_GPU
_PAGE = mmap.PAGESIZE
_regions: list = []  # as long as this module


def between_guards(t: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A contiguous copy of `t` that ends (or begins) where memory that can't be touched does."""
    if not EMULATED or t.numel() == 0:
        return t.to(DEVICE).contiguous()
    size = -(-t.nbytes // _PAGE) * _PAGE
    region = mmap.mmap(-1, size + 2 * _PAGE)
    _regions.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    offset = _PAGE + (size - t.nbytes if at_end else 0)
    copy = torch.frombuffer(region, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
    copy.copy_(t)
    libc = ctypes.CDLL(None, use_errno=True)
    for guard in (start, start + _PAGE + size):
        assert libc.mprotect(ctypes.c_void_p(guard), _PAGE, 0) == 0
    return copy


def hostile(good: torch.Tensor):
    """Far-off numbers in some places in turn, in all places, and garbage."""
    wide = [2**63 - 1, -(2**63), 2**32] if good.dtype == torch.int64 else []
    for bad in [-1, 2**31 - 1, 3, 1 << 20, *wide]:
        for at in {0, 1, 2, len(good) // 2, len(good) - 1}:
            values = good.clone()
            values[at] = bad
            yield values
        yield torch.full_like(good, bad)
    for _ in range(3):
        yield torch.randint(-(2**31), 2**31 - 1, good.shape).to(good.dtype)
        yield torch.randint(0, 40, good.shape).to(good.dtype)


CASES = {
    "tensor cores": {},
    "fixed split": {"fixed_split_size": 64},
    "fp8": {"kv_dtype": torch.float8_e4m3fn},
    "8-bit queries": {"dtype": torch.float8_e4m3fn},
    "8-bit queries, pages for the copy engine": {"dtype": torch.float8_e4m3fn, "page_size": 16},
    "CUDA cores": {"dtype": torch.float32},
    "mask and window": {"mask": True, "window_left": 20},
    "RoPE": {"rope": True},
    "int64": {"index": torch.int64},
}


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_hostile_batches(case, at_end):
    """Decode, append and many rows; each index tensor in turn, with the op's own plan and with a given one."""
    options = dict(CASES[case])
    sizes = {name: options.pop(name) for name in ("kv_dtype", "dtype", "index", "page_size") if name in options}
    page_size = sizes.setdefault("page_size", 4)
    qo_lens, kv_lens = [1, 3, 40, 0], [30, 9, 50, 4]
    args = [between_guards(t, at_end) for t in paged_call(qo_lens, kv_lens, "cpu", **sizes)]
    rest = {"causal": True, **options}
    if rest.pop("mask", False):
        counts = [-(-q * kv // 8) for q, kv in zip(qo_lens, kv_lens, strict=True)]
        rest["custom_mask"] = between_guards(torch.randint(0, 256, (sum(counts),), dtype=torch.uint8), at_end)
        rest["mask_indptr"] = indptr(counts, device=DEVICE)
    if rest.pop("rope", False):
        rest["cos_sin_cache"] = between_guards(torch.rand(60, 64), at_end)
    window, split = rest.get("window_left", -1), rest.get("fixed_split_size", 0)

    def plan(call):
        return torch.ops.fi.batch_attention_plan(
            call[3], call[5], call[6], len(call[0]), 2, page_size, True, window, split
        )

    expected = torch.ops.fi.paged_attention(*args, **rest)
    for which in (3, 4, 5, 6):
        for values in hostile(args[which].cpu()):
            call = [*args[:which], between_guards(values, at_end), *args[which + 1 :]]
            torch.ops.fi.paged_attention(*call, **rest)
            torch.ops.fi.paged_attention(*call, **rest, plan=plan(call))
    if "mask_indptr" in rest:
        for values in hostile(rest["mask_indptr"].cpu()):
            torch.ops.fi.paged_attention(*args, **{**rest, "mask_indptr": between_guards(values, at_end)})
    for values in hostile(plan(args).cpu()):
        torch.ops.fi.paged_attention(*args, **rest, plan=between_guards(values, at_end))
    _wait()
    assert torch.equal(torch.ops.fi.paged_attention(*args, **rest), expected)


def test_pages_that_are_nowhere_do_not_take_part():
    """As if the request had no such keys; what lies in pages 0 and -1 plays no part."""
    args = paged_call([1, 2], [37, 20], DEVICE, page_size=4, dim=128)
    wrong = [t.clone() for t in args]
    wrong[4][:3] = torch.tensor([-1, len(args[1]), 2**31 - 1])
    wrong[4][4] = -(2**31)
    got = torch.ops.fi.paged_attention(*wrong)
    # The pages that are there, as a table of their own: without causality or positions the order is all the same.
    kept = args[4][[3, *range(5, len(args[4]))]]
    expected = torch.ops.fi.paged_attention(*args[:4], kept, args[5] - torch.tensor([0, 4, 4], device=DEVICE), args[6])
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("qo_lens", [[3, 5], [150, 70]])
def test_a_mask_that_ends_early_hides_the_rest(qo_lens, at_end):
    """As if zeros followed: no kernel looks behind its end, wherever in a word that is."""
    kv_lens = [200, 333]
    args = [between_guards(t, at_end) for t in paged_call(qo_lens, kv_lens, "cpu", page_size=16)]
    counts = [-(-q * kv // 8) for q, kv in zip(qo_lens, kv_lens, strict=True)]
    bits, mask_indptr = torch.randint(0, 256, (sum(counts),), dtype=torch.uint8), indptr(counts, device=DEVICE)
    for size in [*range(counts[0] // 2, counts[0] // 2 + 5), 1, sum(counts) - 3]:
        zeros = torch.zeros(sum(counts) - size, dtype=torch.uint8)
        short, padded = between_guards(bits[:size], at_end), torch.cat((bits[:size], zeros)).to(DEVICE)
        got = torch.ops.fi.paged_attention(*args, custom_mask=short, mask_indptr=mask_indptr)
        assert torch.equal(got, torch.ops.fi.paged_attention(*args, custom_mask=padded, mask_indptr=mask_indptr)), size
