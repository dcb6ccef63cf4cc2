"""Shared prefixes: cascades of any number of levels and dense prefixes, against attention over each request's whole keys."""

from __future__ import annotations

import pytest
import torch
from batch_cases import DEVICES, attend_dense, check, empty, indptr, per_request

import fi_ops

SIZES = (4, 2, 64)


class Tree:
    """Requests whose keys are, level by level, those of the groups that they are in; all in the pages of one cache.

    groups: of each level, how many requests are in each group; the last level's are 1. lens: of each level, each group's keys.
    """

    def __init__(
        self, device, groups, lens, qo_lens, dtype=torch.float32, page_size=4, layout="NHD", index=torch.int32
    ):
        self.device, self.qo_lens, self.page_size, self.dtype = device, qo_lens, page_size, dtype
        counts = [[-(-n // page_size) for n in level] for level in lens]
        num_pages = sum(map(sum, counts)) + 2
        pages = torch.randperm(num_pages).to(index)
        caches = [torch.randn(num_pages, page_size, 2, 64, device=device).to(dtype) for _ in range(2)]
        self.cache = tuple(c.transpose(1, 2).contiguous() for c in caches) if layout == "HND" else tuple(caches)
        self.q = torch.randn(sum(qo_lens), 4, 64, device=device).to(dtype)
        ends = indptr(qo_lens).tolist()
        self.tables = [], [], [], []
        parts = [[] for _ in qo_lens]  # of each request, (keys, values) of each level
        for group, level_lens, level_counts in zip(groups, lens, counts, strict=True):
            own, pages = pages[: sum(level_counts)], pages[sum(level_counts) :]
            first = indptr(group).tolist()
            self.tables[0].append(torch.tensor([ends[r] for r in first], dtype=index))
            self.tables[1].append(indptr(level_counts, index))
            self.tables[2].append(own)
            last = [(n - 1) % page_size + 1 if n else 0 for n in level_lens]
            self.tables[3].append(torch.tensor(last, dtype=index))
            for g, ids in enumerate(own.split(level_counts)):
                keys = [c[ids.long().to(device)].flatten(0, 1)[: level_lens[g]] for c in caches]
                for r in range(first[g], first[g + 1]):
                    parts[r].append(keys)
        self.keys, self.values = ([torch.cat([p[i] for p in request]) for request in parts] for i in range(2))
        self.queries = list(self.q.split(qo_lens))

    def expect(self, **options):
        def run(convert):
            one = lambda *t: attend_dense(*(convert(x) for x in t), **options)  # noqa: E731
            return per_request(one, self.queries, self.keys, self.values)

        return run


TREES = {
    "decode, one prefix": ([[7], [1] * 7], [[90], [1, 5, 9, 4, 30, 2, 16]], [1] * 7),
    "decode, two prefixes and a request alone": ([[3, 4], [1] * 7], [[90, 33], [1, 5, 9, 4, 30, 2, 16]], [1] * 7),
    "three levels": ([[6], [2, 3, 1], [1] * 6], [[70], [16, 5, 30], [1, 2, 3, 4, 5, 6]], [1] * 6),
    "four levels": ([[4], [4], [2, 2], [1] * 4], [[40], [8], [16, 5], [1, 20, 3, 4]], [1] * 4),
    "append": ([[3], [1] * 3], [[50], [5, 40, 9]], [5, 33, 9]),
    "one level": ([[1] * 3], [[50, 3, 20]], [1, 2, 20]),
    "a group without keys": ([[2, 2], [1] * 4], [[0, 30], [1, 5, 9, 4]], [1] * 4),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels(device, name, dtype):
    tree = Tree(device, *TREES[name], dtype=dtype)
    wrapper = fi_ops.MultiLevelCascadeAttentionWrapper(len(TREES[name][0]), empty(device))
    for causal in (False, True):
        wrapper.plan(*tree.tables, *SIZES, tree.page_size, causal=causal, q_data_type=dtype)
        check([wrapper.run(tree.q, tree.cache)], tree.expect(causal=causal))


@pytest.mark.parametrize("device", DEVICES)
def test_options(device):
    tree = Tree(device, *TREES["append"], layout="HND", index=torch.int64)
    wrapper = fi_ops.MultiLevelCascadeAttentionWrapper(2, empty(device), "HND")
    wrapper.begin_forward(
        *tree.tables, *SIZES, tree.page_size, causal=True, sm_scale=0.2, logits_soft_cap=4.0, q_data_type="float32"
    )
    check([wrapper.forward(tree.q, tree.cache)], tree.expect(causal=True, sm_scale=0.2, logits_soft_cap=4.0))
    wrapper.end_forward()


@pytest.mark.parametrize("device", DEVICES)
def test_a_request_that_shares_nothing(device):
    """A query outside of a level's requests has no keys there."""
    groups, lens, qo_lens = [[3], [1] * 5], [[40], [1, 5, 9, 4, 30]], [1] * 5
    tree = Tree(device, [[3, 2], [1] * 5], [[40, 0], lens[1]], qo_lens)
    tables = [list(t) for t in tree.tables]
    tables[0][0], tables[1][0], tables[3][0] = tables[0][0][:2], tables[1][0][:2], tables[3][0][:1]
    assert groups[0] == [int(tables[0][0][1])]
    wrapper = fi_ops.MultiLevelCascadeAttentionWrapper(2, empty(device))
    wrapper.plan(*tables, *SIZES, tree.page_size, q_data_type="float32")
    check([wrapper.run(tree.q, tree.cache)], tree.expect())


@pytest.mark.parametrize("device", DEVICES)
def test_cuda_graph_mode(device):
    ints = {"dtype": torch.int32, "device": device}
    buffers = [
        [torch.zeros(n + 1, **ints) for n in (1, 7)], [torch.zeros(n + 1, **ints) for n in (1, 7)],
        [torch.zeros(40, **ints) for _ in range(2)], [torch.zeros(n, **ints) for n in (1, 7)],
    ]  # fmt: skip
    wrapper = fi_ops.MultiLevelCascadeAttentionWrapper(2, empty(device), "NHD", True, *buffers)
    assert wrapper.is_cuda_graph_enabled
    graph = out = q = cache = None
    for prefix, own in ((90, [1, 5, 9, 4, 30, 2, 16]), (3, [40, 5, 0, 4, 3, 2, 1])):
        tree = Tree(device, [[7], [1] * 7], [[prefix], own], [1] * 7)
        wrapper.plan(*tree.tables, *SIZES, tree.page_size, q_data_type="float32")
        check([wrapper.run(tree.q, tree.cache)], tree.expect())
        assert torch.equal(buffers[1][1].cpu(), tree.tables[1][1])
        if device != "cuda":
            continue
        if graph is None:
            q, cache = tree.q.clone(), tuple(torch.zeros(60, *c.shape[1:], device=device) for c in tree.cache)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = wrapper.run(q, cache)
        q.copy_(tree.q)
        for static, pages in zip(cache, tree.cache, strict=True):
            static[: pages.shape[0]].copy_(pages)
        graph.replay()
        check([out], tree.expect())


@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device):
    tree = Tree(device, *TREES["three levels"])
    wrapper = fi_ops.MultiLevelCascadeAttentionWrapper(3, empty(device))
    wrapper.plan(*tree.tables, *SIZES, tree.page_size, q_data_type="float32")
    compiled = torch.compile(lambda q, cache: wrapper.run(q, cache), fullgraph=True)
    check([compiled(tree.q, tree.cache)], tree.expect())
    with torch.compiler.set_stance("fail_on_recompile"):
        tree = Tree(device, *TREES["three levels"])
        wrapper.plan(*tree.tables, *SIZES, tree.page_size, q_data_type="float32")
        check([compiled(tree.q, tree.cache)], tree.expect())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_dense_prefix(device, layout):
    turn = (lambda t: t.transpose(0, 1).contiguous()) if layout == "HND" else (lambda t: t)
    prefix = [torch.randn(60, 2, 64, device=device).half() for _ in range(2)]
    for qo_lens, lens in (([1] * 4, [1, 30, 9, 5]), ([5, 1, 20, 3], [5, 30, 20, 5])):
        tree = Tree(device, [[1] * 4], [lens], qo_lens, dtype=torch.float16, layout=layout)
        tree.keys, tree.values = (
            [torch.cat((p, t)) for t in own] for p, own in zip(prefix, (tree.keys, tree.values), strict=True)
        )
        qo_indptr, *table = (t[0] for t in tree.tables)
        args = (tree.q, *(turn(p) for p in prefix), tree.cache)
        if qo_lens == [1] * 4:
            wrapper = fi_ops.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(empty(device), layout)
            wrapper.begin_forward(*table, *SIZES, tree.page_size)
            check([wrapper.forward(*args)], tree.expect())
        wrapper = fi_ops.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(empty(device), layout)
        wrapper.begin_forward(qo_indptr, *table, *SIZES, tree.page_size)
        check([wrapper.forward(*args, causal=True, sm_scale=0.2)], tree.expect(causal=True, sm_scale=0.2))
        wrapper.end_forward()


def test_refusals():
    wrapper = fi_ops.MultiLevelCascadeAttentionWrapper(2, empty("cpu"))
    tree = Tree("cpu", *TREES["append"])
    with pytest.raises(
        RuntimeError,
        match=r"MultiLevelCascadeAttentionWrapper.plan: qo_indptr_arr must have a tensor a level, 2, got 1",
    ):
        wrapper.plan(tree.tables[0][:1], *tree.tables[1:], *SIZES, 4)
    for option, value in (("pos_encoding_mode", "ROPE_LLAMA"), ("window_left", 9)):
        with pytest.raises(RuntimeError, match=f"{option} must be .* positions are not known across levels"):
            wrapper.plan(*tree.tables, *SIZES, 4, **{option: value})
    with pytest.raises(RuntimeError, match=r"num_levels must be 1 or more, got 0"):
        fi_ops.MultiLevelCascadeAttentionWrapper(0, empty("cpu"))
    with pytest.raises(RuntimeError, match=r"paged_kv_indptr_buf_arr must have a tensor a level, 2, got None"):
        fi_ops.MultiLevelCascadeAttentionWrapper(
            2, empty("cpu"), use_cuda_graph=True, qo_indptr_buf_arr=[torch.zeros(2)] * 2
        )
