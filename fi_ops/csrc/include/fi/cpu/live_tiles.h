// Which tiles of KV a block of query rows must read: the row ranges that causal, window and length allow, and
// the scan of a mask for tiles with nothing in them. A tile that is not in the list is never loaded.
#pragma once

#include "fi/attention.h"
#include "fi/cpu/simd.h"

namespace fi::FI_ISA {

struct Range {
  int64_t begin, end;
};

// Keys that causal, window and length leave to query row i; may be empty.
FI_INLINE Range allowed_keys(const AttentionParams& p, int64_t b, int64_t i) {
  Range r{0, p.kv_len};
  if (!p.causal && p.window_left < 0) return r;
  const int64_t pos = query_position(p, b, i);
  if (p.causal && pos < r.end) r.end = pos < 0 ? 0 : pos + 1;
  if (p.window_left >= 0 && pos > p.window_left) r.begin = pos - p.window_left;
  if (r.begin > r.end) r.begin = r.end;
  return r;
}

// The union of allowed_keys over query rows [i0, i1) (positions need not ascend).
FI_INLINE Range allowed_keys(const AttentionParams& p, int64_t b, int64_t i0, int64_t i1) {
  Range all{p.kv_len, 0};
  for (int64_t i = i0; i < i1; ++i) {
    const Range r = allowed_keys(p, b, i);
    if (r.begin == r.end) continue;
    if (r.begin < all.begin) all.begin = r.begin;
    if (r.end > all.end) all.end = r.end;
  }
  return all.begin < all.end ? all : Range{0, 0};
}

// An entry of a tile list: the tile's index, and whether every value of the mask in it is "attend, add
// nothing".
FI_INLINE int32_t tile_entry(int64_t tile, bool open) { return int32_t(tile << 1 | int64_t(open)); }
FI_INLINE int64_t tile_index(int32_t entry) { return entry >> 1; }
FI_INLINE bool tile_open(int32_t entry) { return entry & 1; }

// Values of an additive mask at or below this weigh exactly 0 beside any ordinary value.
FI_INLINE float negligible(DType mask_dtype) { return mask_dtype == DType::f16 ? -65504.0f : -1e30f; }

struct MaskSummary {
  float top;  // the largest value (bool: 0 where any is true, else -inf)
  bool open;  // all 0 (bool: all true)
};

FI_INLINE MaskSummary summarize_bool(const uint8_t* m, int64_t stride, int64_t n) {
  uint8_t any = 0, all = 1;
  if (stride == 1) {
    for (int64_t j = 0; j < n; ++j) {
      any |= m[j];
      all &= m[j];
    }
  } else {
    for (int64_t j = 0; j < n; ++j) {
      any |= m[j * stride];
      all &= m[j * stride];
    }
  }
  return {any ? 0.0f : -kInf, all != 0};
}

template <class T>
FI_INLINE MaskSummary summarize_additive(const T* m, int64_t stride, int64_t n) {
  float top = -kInf, bottom = kInf;
  int64_t j = 0;
  if (stride == 1 && n >= kLanes) {
    Vec t = set1(-kInf), b = set1(kInf);
    for (; j + kLanes <= n; j += kLanes) {
      const Vec x = load(m + j);
      t = max(x, t);
      b = min(x, b);
    }
    top = reduce_max(t);
    bottom = reduce_min(b);
  }
  for (; j < n; ++j) {
    const float x = to_float(m[j * stride]);
    top = x > top ? x : top;
    bottom = x < bottom ? x : bottom;
  }
  return {top, top == 0.0f && bottom == 0.0f};
}

FI_INLINE MaskSummary summarize(const AttentionParams& p, int64_t b, int64_t h, int64_t i, Range r) {
  if (r.begin >= r.end) return {-kInf, true};
  const int64_t n = r.end - r.begin, stride = p.mask_stride_k;
  const int64_t offset = b * p.mask_stride_b + h * p.mask_stride_h + i * p.mask_stride_q + r.begin * stride;
  switch (p.mask_dtype) {
    case DType::boolean:
      return summarize_bool(static_cast<const uint8_t*>(p.mask) + offset, stride, n);
    case DType::f32:
      return summarize_additive(static_cast<const float*>(p.mask) + offset, stride, n);
    case DType::bf16:
      return summarize_additive(static_cast<const bf16*>(p.mask) + offset, stride, n);
    default:
      return summarize_additive(static_cast<const f16*>(p.mask) + offset, stride, n);
  }
}

// Lists the tiles that heads [h0, h1) x query rows [i0, i1) of batch b read; returns how many. `list` and
// `tops` have room for all tiles. Heads and rows over which the mask is broadcast are scanned once.
inline int64_t list_live_tiles(const AttentionParams& p, int64_t b, int64_t h0, int64_t h1, int64_t i0,
                               int64_t i1, int64_t tile, int32_t* list, float* tops) {
  const Range all = allowed_keys(p, b, i0, i1);
  const int64_t first = all.begin / tile, last = (all.end + tile - 1) / tile;
  const bool same_rows = p.mask_stride_q == 0 && !p.causal && p.window_left < 0;
  if (p.mask_stride_h == 0) h1 = h0 + 1;
  if (same_rows) i1 = i0 + 1;
  const float low = negligible(p.mask_dtype);
  for (int64_t t = first; t < last; ++t) {
    tops[t] = -kInf;
    list[t] = tile_entry(t, true);
  }
  bool can_drop = true;  // every row has an ordinary value somewhere, or nothing at all
  for (int64_t h = h0; h < h1; ++h) {
    for (int64_t i = i0; i < i1; ++i) {
      const Range row = allowed_keys(p, b, i);
      float row_top = -kInf;
      for (int64_t t = row.begin / tile; t * tile < row.end; ++t) {
        Range r{t * tile, (t + 1) * tile};
        if (r.begin < row.begin) r.begin = row.begin;
        if (r.end > row.end) r.end = row.end;
        const MaskSummary s = summarize(p, b, h, i, r);
        if (s.top > tops[t]) tops[t] = s.top;
        if (!s.open) list[t] = tile_entry(t, false);
        row_top = s.top > row_top ? s.top : row_top;
      }
      can_drop = can_drop && (row_top == -kInf || row_top > 0.5f * low);
    }
  }
  int64_t count = 0;
  for (int64_t t = first; t < last; ++t) {
    if (tops[t] == -kInf || (can_drop && tops[t] <= low)) continue;
    list[count++] = list[t];
  }
  return count;
}

}  // namespace fi::FI_ISA
