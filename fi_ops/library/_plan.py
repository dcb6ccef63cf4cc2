"""What the plan of a batch's attention is, in plain Python (`plan.py` has the op), and the lengths that index tensors say."""

from __future__ import annotations

import torch

_FEW_ROWS, _SEGMENT_ROWS, UNIT_KEYS, _TILE_QUERIES = 64, 16, 64, 128
_HEADER, _SEGMENT, _TILE = 10, 5, 2


def _sizes(batch, nnz_qo, group_size):
    """The most segments and tiles that there can be."""
    rows = nnz_qo * group_size
    return rows // _SEGMENT_ROWS + torch.sym_min(batch, rows), nnz_qo // _TILE_QUERIES + torch.sym_min(batch, nnz_qo)


def plan_size(batch, nnz_qo, group_size):
    """Elements of a plan."""
    segments, tiles = _sizes(batch, nnz_qo, group_size)
    return _HEADER + _SEGMENT * segments + _TILE * tiles


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
    units, octave = -(-num_keys // UNIT_KEYS), 0
    while units >= 8:
        units, octave = units // 2, octave + 1
    return 8 * octave + units


def make_plan(
    qo_indptr,
    kv_indptr,
    kv_last_page_len,
    nnz_qo,
    group_size,
    page_size=1,
    causal=False,
    window_left=-1,
    fixed_split_size=0,
) -> torch.Tensor:
    """`batch_attention_plan`'s definition."""
    batch, unit_keys = qo_indptr.shape[0] - 1, fixed_split_size or UNIT_KEYS
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
