"""The plan of a batch's attention: how it is cut into work, made on the device from the batch's own index tensors.

No length comes to the host: the plan's size follows from the batch and the number of query tokens alone, so a captured
graph plans anew at each replay. It is what `paged_attention` and `ragged_attention` make for themselves where none is
given; one plan serves all layers of a step.

int32, a header of `num_segments, num_units, num_tiles, unit_keys, batch, nnz_qo, group_size, page_size, causal,
window_left`, then segments `request, row_begin, first_unit, unit_begin, num_units`, then tiles `request, q_begin`; what
lies behind the last of each is 0. A request with at most 64 rows (query heads of a group x queries) is cut into segments of
16 rows, whose keys are counted in units of 64, or `fixed_split_size`: the kernels share the units out evenly over the
device (stream-K). One with more is cut into tiles of 128 queries, ordered by the number of keys that they see, the longest
first (within an eighth of their number: a request's last queries first). `csrc/include/fi/batch_attention.h` has the same.

Sources: Stream-K (Osama et al. 2023); FlashInfer's `plan` (on the host there), its `fixed_split_size`.
"""

from __future__ import annotations

import torch

from ._batch_samples import plan_errors, plan_samples
from ._checks import check, check_dtype, check_same_device, check_shape
from ._plan import UNIT_KEYS, make_plan, plan_size
from ._spec import INDEX_TYPES, Cost, op


def check_fixed_split(name: str, fixed_split_size) -> None:
    check(
        name,
        fixed_split_size >= 0 and fixed_split_size % UNIT_KEYS == 0,
        lambda: (
            f"fixed_split_size must be 0 (none) or a multiple of {UNIT_KEYS}, got {fixed_split_size}; round it up to one"
        ),
    )


def check_lengths(name: str, qo_indptr, kv_indptr, kv_last_page_len, page_size) -> None:
    """The index tensors that say how long requests are. No kv_last_page_len: kv_indptr counts tokens."""
    check_dtype(name, "qo_indptr", qo_indptr, INDEX_TYPES)
    check(
        name,
        qo_indptr.dim() == 1 and qo_indptr.shape[0] >= 1,
        lambda: f"qo_indptr must be [batch + 1], got {list(qo_indptr.shape)}; start it with 0",
    )
    check_same_device(name, "kv_indptr", kv_indptr, "qo_indptr", qo_indptr)
    check_dtype(name, "kv_indptr", kv_indptr, INDEX_TYPES)
    check_shape(name, "kv_indptr", kv_indptr, tuple(qo_indptr.shape), "[batch + 1]")
    if kv_last_page_len is not None:
        check_same_device(name, "kv_last_page_len", kv_last_page_len, "qo_indptr", qo_indptr)
        check_dtype(name, "kv_last_page_len", kv_last_page_len, INDEX_TYPES)
        check_shape(name, "kv_last_page_len", kv_last_page_len, (qo_indptr.shape[0] - 1,), "[batch]")
    check(name, page_size >= 1, lambda: f"page_size must be 1 or more, got {page_size}; pass the cache's")


def _fake(
    qo_indptr,
    kv_indptr,
    kv_last_page_len,
    nnz_qo,
    group_size,
    page_size=1,
    causal=False,
    window_left=-1,
    fixed_split_size=0,
):
    name = "batch_attention_plan"
    check_lengths(name, qo_indptr, kv_indptr, kv_last_page_len, page_size)
    check(name, nnz_qo >= 0, lambda: f"nnz_qo must be 0 or more, got {nnz_qo}; pass the number of query tokens")
    check(
        name,
        group_size >= 1,
        lambda: f"group_size must be 1 or more, got {group_size}; pass num_qo_heads / num_kv_heads",
    )
    check(
        name,
        window_left >= -1,
        lambda: f"window_left must be -1 (no window) or more, got {window_left}; pass -1 for none",
    )
    check_fixed_split(name, fixed_split_size)
    size = plan_size(qo_indptr.shape[0] - 1, nnz_qo, group_size)
    return torch.empty(size, dtype=torch.int32, device=qo_indptr.device)


def _cost(qo_indptr, kv_indptr, kv_last_page_len, nnz_qo, group_size, *_, **__) -> Cost:
    given = [t for t in (qo_indptr, kv_indptr, kv_last_page_len) if t is not None]
    return Cost(bytes=sum(t.nbytes for t in given) + 4 * plan_size(qo_indptr.shape[0] - 1, nnz_qo, group_size))


@op(
    "(Tensor qo_indptr, Tensor kv_indptr, Tensor? kv_last_page_len, SymInt nnz_qo, int group_size, SymInt page_size=1, "
    "bool causal=False, int window_left=-1, int fixed_split_size=0) -> Tensor",
    fake=_fake,
    samples=plan_samples,
    errors=plan_errors,
    cost=_cost,
    dtypes=INDEX_TYPES,
    exact=True,
)
def batch_attention_plan(
    qo_indptr,
    kv_indptr,
    kv_last_page_len,
    nnz_qo,
    group_size,
    page_size=1,
    causal=False,
    window_left=-1,
    fixed_split_size=0,
):
    """The plan of `paged_attention` or (no kv_last_page_len) `ragged_attention`, from device tensors without a sync."""
    return make_plan(
        qo_indptr, kv_indptr, kv_last_page_len, nnz_qo, group_size, page_size, causal, window_left, fixed_split_size
    )
