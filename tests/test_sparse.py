"""Block-sparse attention, BSR and of variable blocks, against attention under the dense mask that the blocks spell."""

from __future__ import annotations

import itertools

import pytest
import torch
from batch_cases import DEVICES, attend_dense, check, empty, indptr

import fi_ops


def tensors(device, rows, columns, heads, kv_heads, dtype, head_dim=64):
    return tuple(
        torch.randn(*shape, head_dim, device=device).to(dtype)
        for shape in ((rows, heads), (columns, kv_heads), (columns, kv_heads))
    )


def random_blocks(num_rows, num_columns, share=0.5):
    """Block columns of each row of blocks, in an order that isn't sorted; one row has none."""
    there = torch.rand(num_rows, num_columns) < share
    there[num_rows // 2] = False
    return [row.nonzero().flatten()[torch.randperm(int(row.sum()))] for row in there]


def dense_mask(blocks, M, N, R, C, masks=None):
    """bool `[M, N]`; masks: of each block in order."""
    out = torch.zeros(len(blocks) * R, N, dtype=torch.bool)
    nth = 0
    for i, row in enumerate(blocks):
        for j in row.tolist():
            out[i * R : (i + 1) * R, j * C : (j + 1) * C] = True if masks is None else masks[nth]
            nth += 1
    return out[:M]


def expect(q, k, v, mask, **options):
    mask = mask.to(q.device)
    return lambda convert: attend_dense(convert(q), convert(k), convert(v), mask=mask, **options)


def plan(wrapper, blocks, M, N, R, C, heads, kv_heads, dtype, index=torch.int32, device="cpu", **options):
    counts = [len(row) for row in blocks]
    wrapper.plan(
        indptr(counts, index, device), torch.cat(blocks).to(device, index), M, N, R, C, heads, kv_heads, 64, q_data_type=dtype,
        o_data_type=dtype, **options,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("R", [1, 16, 50])
@pytest.mark.parametrize("C", [1, 8, 33])
@pytest.mark.parametrize("M", [100, 93])
def test_blocks_of_any_size(device, R, C, M):
    """Rows of blocks of any length, none too; a last row that is shorter; tables on the host and on the device."""
    N = 5 * C if C > 1 else 40
    blocks = random_blocks(-(-M // R), N // C)
    q, k, v = tensors(device, M, N, 4, 2, torch.float32)
    expected = expect(q, k, v, dense_mask(blocks, M, N, R, C))
    wrapper = fi_ops.BlockSparseAttentionWrapper(empty(device))
    for index, where in ((torch.int32, "cpu"), (torch.int64, device)):
        plan(wrapper, blocks, M, N, R, C, 4, 2, q.dtype, index, where)
        check(wrapper.run(q, k, v, return_lse=True), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("M", "R", "C"), [(60, 5, 7), (58, 5, 7), (64, 16, 16), (33, 1, 3)])
def test_masks_in_the_blocks(device, M, R, C):
    N = 6 * C
    blocks = random_blocks(-(-M // R), 6)
    masks = torch.rand(sum(len(row) for row in blocks), R, C) < 0.6
    q, k, v = tensors(device, M, N, 4, 4, torch.bfloat16)
    expected = expect(q, k, v, dense_mask(blocks, M, N, R, C, masks))
    wrapper = fi_ops.BlockSparseAttentionWrapper(empty(device))
    plan(wrapper, blocks, M, N, R, C, 4, 4, q.dtype, mask=masks.to(device), causal=True)  # a mask replaces causal
    check(wrapper.run(q, k, v, return_lse=True), expected)
    ends = indptr([len(row) for row in blocks])
    flat = fi_ops.convert_bsr_mask_layout(masks, ends)
    bits = [R * C * len(row) for row in blocks]
    if M % R:  # the last row of blocks is shorter
        bits[-1] = M % R * C * len(blocks[-1])
    packed, _ = fi_ops.segment_packbits(flat, indptr(bits), bitorder="little")
    plan(wrapper, blocks, M, N, R, C, 4, 4, q.dtype, packed_mask=packed)
    check(wrapper.run(q, k, v, return_lse=True), expected)


def test_mask_layout_is_flashinfer_s():
    """Row by row over all blocks of a row, from a loop."""
    blocks = random_blocks(5, 4)
    ends = indptr([len(row) for row in blocks])
    mask = torch.randint(0, 99, (int(ends[-1]), 3, 2))
    want = torch.cat([mask[a:b].transpose(0, 1).reshape(-1) for a, b in itertools.pairwise(ends)])
    assert torch.equal(fi_ops.convert_bsr_mask_layout(mask, ends), want)


@pytest.mark.parametrize("device", DEVICES)
def test_options(device):
    blocks = random_blocks(6, 5)
    q, k, v = tensors(device, 96, 80, 4, 2, torch.float16)
    mask = dense_mask(blocks, 96, 80, 16, 16)
    wrapper = fi_ops.BlockSparseAttentionWrapper(empty(device))
    plan(wrapper, blocks, 96, 80, 16, 16, 4, 2, q.dtype, sm_scale=0.2, logits_soft_cap=3.0)
    out, lse = torch.empty_like(q), torch.empty(96, 4, device=device)
    got = wrapper.run(q, k, v, None, 0.5, torch.tensor([2.0, 3.0], device=device), out=out, lse=lse, return_lse=True)
    assert got[0] is out and got[1] is lse
    scales = {"logits_scale": 0.5, "v_scale": torch.tensor([2.0, 3.0], device=device)}
    check(got, expect(q, k, v, mask, sm_scale=0.2, logits_soft_cap=3.0, **scales))
    check([wrapper.forward(q, k, v)], expect(q, k, v, mask))
    wrapper.plan(indptr([1]), torch.tensor([0]), 4, 16, 4, 16, 4, 2, 64, q_data_type="float16")
    assert wrapper.run(q[:4], k[:16], v[:16]).dtype == torch.float16  # o_data_type's default


@pytest.mark.parametrize("device", DEVICES)
def test_causal_blocks(device):
    """A lower triangle of blocks whose last is the diagonal's: causal within it."""
    blocks = [torch.arange(i + 1) for i in range(6)]
    q, k, v = tensors(device, 48, 48, 4, 2, torch.float32)
    wrapper = fi_ops.BlockSparseAttentionWrapper(empty(device))
    plan(wrapper, blocks, 48, 48, 8, 8, 4, 2, q.dtype, causal=True)
    check(wrapper.run(q, k, v, return_lse=True), expect(q, k, v, torch.ones(48, 48, dtype=torch.bool).tril()))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device):
    wrapper = fi_ops.BlockSparseAttentionWrapper(empty(device))
    compiled = torch.compile(lambda *t: wrapper.run(*t, return_lse=True), fullgraph=True)
    q, k, v = tensors(device, 64, 80, 4, 2, torch.float32)
    for _ in range(3):  # other numbers of blocks: a size that becomes a symbol
        blocks = random_blocks(8, 10)
        plan(wrapper, blocks, 64, 80, 8, 8, 4, 2, q.dtype)
        check(compiled(q, k, v), expect(q, k, v, dense_mask(blocks, 64, 80, 8, 8)))


# ---- variable blocks ----


def variable_case(device, heads, kv_heads, dtype, qo_len=70, kv_len=90, MB=6, NB=5):
    def sizes(total, parts):
        cuts = torch.stack([torch.randint(0, total + 1, (parts - 1,)).sort().values for _ in range(kv_heads)])
        ends = torch.cat((cuts, torch.full((kv_heads, 1), total)), 1)  # some blocks are empty
        return torch.cat((ends[:, :1], ends.diff(dim=1)), 1).int()

    rows, columns = sizes(qo_len, MB), sizes(kv_len, NB)
    there = torch.rand(kv_heads, MB, NB) < 0.5
    there[:, 1] = False
    masks = [
        m.repeat_interleave(r, 0).repeat_interleave(c, 1) for m, r, c in zip(there, rows.long(), columns.long(), strict=True)
    ]  # fmt: skip
    q = torch.randn(heads, qo_len, 64, device=device).to(dtype)
    k, v = (torch.randn(kv_heads, kv_len, 64, device=device).to(dtype) for _ in range(2))
    return (there, rows, columns), (q, k, v), masks


def expect_by_head(q, k, v, masks, **options):
    def run(convert):
        group = q.shape[0] // k.shape[0]
        results = []
        for h, mask in enumerate(masks):
            part = (q[h * group : (h + 1) * group], k[h : h + 1], v[h : h + 1])
            results.append(attend_dense(*(convert(t.transpose(0, 1)) for t in part), mask=mask.to(q.device), **options))
        return torch.cat([r[0].transpose(0, 1) for r in results]), torch.cat([r[1].T for r in results])

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)])
@pytest.mark.parametrize("where", ["host", "device", "bounded"])
def test_variable_blocks(device, heads, kv_heads, where):
    pattern, qkv, masks = variable_case(device, heads, kv_heads, torch.float32)
    wrapper = fi_ops.VariableBlockSparseAttentionWrapper(empty(device))
    extra = {"max_nnz": kv_heads * 6 * 90} if where == "bounded" else {}
    pattern = pattern if where == "host" else tuple(t.to(device) for t in pattern)
    wrapper.plan(*pattern, heads, kv_heads, 64, q_data_type=torch.float32, sm_scale=0.2, logits_soft_cap=5.0, **extra)
    got = wrapper.run(*qkv, return_lse=True)
    check(got, expect_by_head(*qkv, masks, sm_scale=0.2, logits_soft_cap=5.0))
    out, lse = (torch.empty_like(t) for t in got)
    assert wrapper.run(*qkv, out=out, lse=lse) is out
    assert torch.equal(out, got[0]) and torch.equal(lse, got[1])
    check([wrapper.forward(*qkv)], expect_by_head(*qkv, masks))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [16, 150])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_whose_columns_are_pages(device, rows, causal):
    """Sizes that the host knows and that have a common divisor; long rows of blocks: each query head is a request of its own."""
    row_sizes = torch.tensor([[rows, rows + 10, 2 * rows], [2 * rows, 0, 2 * rows + 10]])
    column_sizes = torch.tensor([[48, 16, 0, 96, 32], [16, 16, 128, 16, 16]])
    there = torch.rand(2, 3, 5) < 0.6
    there[0, 1] = False
    q = torch.randn(6, 4 * rows + 10, 64, device=device).bfloat16()
    k, v = (torch.randn(2, 192, 64, device=device).bfloat16() for _ in range(2))
    wrapper = fi_ops.VariableBlockSparseAttentionWrapper(empty(device))
    wrapper.plan(there, row_sizes, column_sizes, 6, 2, 64, causal=causal, q_data_type=torch.bfloat16)
    masks = []
    for mask, r, c in zip(there, row_sizes, column_sizes, strict=True):
        seen = [torch.nonzero(line.repeat_interleave(c)).flatten() for line in mask]
        lines = torch.zeros(int(r.sum()), 192, dtype=torch.bool)
        for first, size, keys in zip(r.cumsum(0) - r, r.tolist(), seen, strict=True):
            for i in range(size):
                lines[first + i, keys[: max(len(keys) - size + i + 1, 0)] if causal else keys] = True
        masks.append(lines)
    check(wrapper.run(q, k, v, return_lse=True), expect_by_head(q, k, v, masks))


@pytest.mark.parametrize("device", DEVICES)
def test_variable_blocks_compile(device):
    wrapper = fi_ops.VariableBlockSparseAttentionWrapper(empty(device))
    compiled = torch.compile(lambda *t: wrapper.run(*t), fullgraph=True)
    for _ in range(3):
        pattern, qkv, masks = variable_case(device, 4, 2, torch.bfloat16)
        wrapper.plan(*pattern, 4, 2, 64, q_data_type="bfloat16")
        check([compiled(*qkv)], expect_by_head(*qkv, masks))


def test_nothing_needs_a_value_of_the_device():
    """On tensors of a device that have no values: what asked for one (`item`, a size that depends on data) would raise."""
    workspace = torch.empty(0, device="meta")
    q, k = (torch.empty(n, h, 64, device="meta", dtype=torch.float16) for n, h in ((93, 4), (80, 2)))
    table = torch.empty(7, dtype=torch.int32, device="meta"), torch.empty(13, dtype=torch.int32, device="meta")
    wrapper = fi_ops.BlockSparseAttentionWrapper(workspace)
    for options in ({}, {"mask": torch.empty(13, 16, 16, dtype=torch.bool, device="meta")}, {"causal": True}):
        wrapper.plan(*table, 93, 80, 16, 16, 4, 2, 64, **options)
        assert wrapper.run(q, k, k).shape == q.shape
    pattern = [torch.empty(2, *s, dtype=torch.int32, device="meta") for s in ((6, 5), (6,), (5,))]
    variable = fi_ops.VariableBlockSparseAttentionWrapper(workspace)
    variable.plan(*pattern, 4, 2, 64, max_nnz=999)
    assert variable.run(*(t.transpose(0, 1) for t in (q, k, k))).shape == (4, 93, 64)


@pytest.mark.gpu
def test_plan_and_run_do_not_sync():
    blocks = random_blocks(6, 5)
    q, k, v = tensors("cuda", 96, 80, 4, 2, torch.float16)
    masks = (torch.rand(sum(len(row) for row in blocks), 16, 16) < 0.6).cuda()
    wrapper = fi_ops.BlockSparseAttentionWrapper(empty("cuda"))
    table = indptr([len(row) for row in blocks], device="cuda"), torch.cat(blocks).cuda()
    pattern, qkv, _ = variable_case("cuda", 4, 2, torch.float16)
    pattern = tuple(t.cuda() for t in pattern)
    variable = fi_ops.VariableBlockSparseAttentionWrapper(empty("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, {"mask": masks}):
            wrapper.plan(*table, 96, 80, 16, 16, 4, 2, 64, **options)
            wrapper.run(q, k, v)
        variable.plan(*pattern, 4, 2, 64, max_nnz=2 * 6 * 90)
        variable.run(*qkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_refusals():
    wrapper = fi_ops.BlockSparseAttentionWrapper(empty("cpu"))
    q, k, v = tensors("cpu", 8, 8, 4, 2, torch.float32)

    def refused(match, call):
        with pytest.raises(RuntimeError, match=match):
            call()

    table = indptr([1, 1]), torch.tensor([0, 1])
    refused(r"BlockSparseAttentionWrapper.run: nothing is planned", lambda: wrapper.run(q, k, v))
    refused(r"N must be a multiple of C, got 9 and 4; pad k and v", lambda: wrapper.plan(*table, 8, 9, 4, 4, 4, 2, 64))
    refused(
        r"indptr must have ceil\(M / R\) \+ 1 = 4 elements, got 3", lambda: wrapper.plan(*table, 9, 8, 4, 4, 4, 2, 64)
    )
    refused(r"R and C must be 1 or more, got 0 and 4", lambda: wrapper.plan(*table, 8, 8, 0, 4, 4, 2, 64))
    refused(
        r"mask must be \[nnz, R, C\] = \[2, 4, 4\], got \[3, 4, 4\]",
        lambda: wrapper.plan(*table, 8, 8, 4, 4, 4, 2, 64, mask=torch.ones(3, 4, 4, dtype=torch.bool)),
    )
    wrapper.plan(*table, 8, 8, 4, 4, 4, 2, 64, q_data_type="float32")
    refused(r"k must be \[8, heads, head_dim\], as planned, got \[4, 2, 64\]", lambda: wrapper.run(q, k[:4], v))
    wrapper.plan(table[0], table[1] + 1, 8, 8, 4, 4, 4, 2, 64, q_data_type="float32")
    refused(r"kv_indices must be pages of the cache, at least 0 and less than 2, got 2", lambda: wrapper.run(q, k, v))
    variable = fi_ops.VariableBlockSparseAttentionWrapper(empty("cpu"))
    (there, rows, columns), qkv, _ = variable_case("cpu", 4, 2, torch.float32)
    refused(r"VariableBlockSparseAttentionWrapper.run: nothing is planned", lambda: variable.run(*qkv))
    refused(
        r"block_mask_map must be \[num_kv_heads = 4, MB, NB\]", lambda: variable.plan(there, rows, columns, 4, 4, 64)
    )
    refused(r"block_col_sz must be \[2, 5\], .* got \[2, 6\]", lambda: variable.plan(there, rows, rows, 4, 2, 64))
    refused(
        r"'ALIBI': heads have no slopes",
        lambda: variable.plan(there, rows, columns, 4, 2, 64, pos_encoding_mode="ALIBI"),
    )
    variable.plan(there, rows, columns, 4, 2, 64)
    refused(r"k must be \[heads, len, head_dim\] of 2 KV heads", lambda: variable.run(qkv[0], qkv[0][:3], qkv[2]))
