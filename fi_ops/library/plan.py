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
from ._spec import INDEX_TYPES, Cost, op

_FEW_ROWS, _SEGMENT_ROWS, _UNIT_KEYS, _TILE_QUERIES = 64, 16, 64, 128
_HEADER, _SEGMENT, _TILE = 10, 5, 2


def _sizes(batch, nnz_qo, group_size):
    """The most segments and tiles that there can be."""
    rows = nnz_qo * group_size
    return rows // _SEGMENT_ROWS + torch.sym_min(batch, rows), nnz_qo // _TILE_QUERIES + torch.sym_min(batch, nnz_qo)


def plan_size(batch, nnz_qo, group_size):
    """Elements of a plan."""
    segments, tiles = _sizes(batch, nnz_qo, group_size)
    return _HEADER + _SEGMENT * segments + _TILE * tiles


def check_fixed_split(name: str, fixed_split_size) -> None:
    check(
        name,
        fixed_split_size >= 0 and fixed_split_size % _UNIT_KEYS == 0,
        lambda: (
            f"fixed_split_size must be 0 (none) or a multiple of {_UNIT_KEYS}, got {fixed_split_size}; round it up to one"
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


def request_lengths(qo_indptr, kv_indptr, kv_last_page_len, page_size: int) -> list[tuple[int, int, int, int]]:
    """Of each request: its first query token, their number, its first entry of the table (or key), the number of its keys."""
    q, kv = qo_indptr.tolist(), kv_indptr.tolist()
    requests = []
    for b in range(len(q) - 1):
        pages = kv[b + 1] - kv[b]
        length = pages * page_size
        if kv_last_page_len is not None and pages:
            length = (pages - 1) * page_size + int(kv_last_page_len[b])
        requests.append((q[b], q[b + 1] - q[b], kv[b], length))
    return requests


def _keys_seen(first, last, qo_len, kv_len, causal, window_left) -> tuple[int, int]:
    """The keys that some of the queries first .. last of a request see."""
    offset = kv_len - qo_len
    begin = max(0, first + offset - window_left) if window_left >= 0 else 0
    end = min(kv_len, last + offset + 1) if causal else kv_len
    return (begin, end) if begin < end else (0, 0)


def _tile_class(num_keys: int) -> int:
    units, octave = -(-num_keys // _UNIT_KEYS), 0
    while units >= 8:
        units, octave = units // 2, octave + 1
    return 8 * octave + units


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
    batch, unit_keys = qo_indptr.shape[0] - 1, fixed_split_size or _UNIT_KEYS
    segments, tiles, units = [], [], 0
    for b, (_, qo_len, _, kv_len) in enumerate(request_lengths(qo_indptr, kv_indptr, kv_last_page_len, page_size)):
        rows = qo_len * group_size
        if rows > _FEW_ROWS:
            for first in reversed(range(0, qo_len, _TILE_QUERIES)):
                last = min(first + _TILE_QUERIES, qo_len) - 1
                begin, end = _keys_seen(first, last, qo_len, kv_len, causal, window_left)
                tiles.append((-_tile_class(end - begin), b, first))
            continue
        for row in range(0, rows, _SEGMENT_ROWS):
            first, last = row // group_size, (min(row + _SEGMENT_ROWS, rows) - 1) // group_size
            begin, end = _keys_seen(first, last, qo_len, kv_len, causal, window_left)
            begin, end = begin // unit_keys, -(-end // unit_keys)
            segments.append((b, row, units, begin, end - begin))
            units += end - begin
    max_segments, max_tiles = _sizes(batch, nnz_qo, group_size)
    plan = torch.zeros(plan_size(batch, nnz_qo, group_size), dtype=torch.int32)
    header = (len(segments), units, len(tiles), unit_keys, batch, nnz_qo, group_size, page_size, causal, window_left)
    plan[:_HEADER] = torch.tensor(header)
    behind_header = plan[_HEADER:]
    for i, segment in enumerate(segments):
        behind_header[_SEGMENT * i :][:_SEGMENT] = torch.tensor(segment)
    behind_segments = behind_header[_SEGMENT * max_segments :]
    for i, (_, b, first) in enumerate(sorted(tiles, key=lambda tile: tile[0])):
        behind_segments[_TILE * i :][:_TILE] = torch.tensor((b, first))
    assert len(segments) <= max_segments and len(tiles) <= max_tiles
    return plan.to(qo_indptr.device)
