// The plan on the device: making it, and reading one that anybody may have made.
#pragma once

#include "fi/batch_attention.h"
#include "fi/cuda/ptx.h"

namespace fi::cuda {

// Makes p.plan and zeroes some int32s more (host).
void make_plan(const BatchPlanParams& p, int32_t* zeroed, int64_t num_zeroed, const Gpu& gpu);

// The plan as an op makes it for itself, in scratch memory (host).
const int32_t* plan_in_scratch(const BatchAttentionParams& p, int32_t* zeroed, int64_t num_zeroed,
                               const Gpu& gpu);

namespace batch {

// Counts and requests come clamped to what there is: a plan's contents are not checked by default.
struct PlanView {
  const PlanHeader* header;
  const PlanSegment* segments;
  const PlanTile* tiles;
  int max_segments, max_tiles;

  FI_INLINE PlanView of(const BatchAttentionParams& p, const int32_t* plan) {
    const AttentionParams& c = p.call;
    const PlanParts parts =
        PlanParts::of(const_cast<int32_t*>(plan), c.batch, c.qo_len, c.num_qo_heads / c.num_kv_heads);
    return {parts.header, parts.segments, parts.tiles, static_cast<int>(parts.sizes.max_segments),
            static_cast<int>(parts.sizes.max_tiles)};
  }

  FI_DEVICE_INLINE int num_segments() const { return min(max(header->num_segments, 0), max_segments); }
  FI_DEVICE_INLINE int num_tiles() const { return min(max(header->num_tiles, 0), max_tiles); }
};

// Rows (position * group + head of the group) of one request and one KV head that a block takes.
struct RowsOfRequest {
  int64_t request;  // -1: none
  int64_t begin, end;
};

FI_DEVICE_INLINE RowsOfRequest segment_rows(const BatchAttentionParams& p, const PlanView& plan, int segment,
                                            int64_t group) {
  const PlanSegment s = plan.segments[segment];
  if (s.request < 0 || s.request >= p.call.batch) return {-1, 0, 0};
  const int64_t rows = request_of(p, s.request).qo_len * group, begin = clamp_index(s.row_begin, 0, rows);
  return {s.request, begin, begin + kSegmentRows < rows ? begin + kSegmentRows : rows};
}

// Rows [64 * part, 64 * part + 64) of a tile.
FI_DEVICE_INLINE RowsOfRequest tile_rows(const BatchAttentionParams& p, const PlanView& plan, int tile,
                                         int part, int64_t group) {
  const PlanTile t = plan.tiles[tile];
  if (t.request < 0 || t.request >= p.call.batch) return {-1, 0, 0};
  const int64_t queries = request_of(p, t.request).qo_len, first = clamp_index(t.q_begin, 0, queries);
  const int64_t end = (first + kTileQueries < queries ? first + kTileQueries : queries) * group;
  const int64_t begin = clamp_index(first * group + 64 * part, 0, end);
  return {t.request, begin, begin + 64 < end ? begin + 64 : end};
}

struct KeySpan {
  int64_t begin, end;
};

// Keys that causal, window and length leave to query i of a request; [0, 0) where there are none.
FI_INLINE KeySpan keys_of_query(const BatchAttentionParams& p, const Request& r, int64_t i) {
  const int64_t position = i + r.kv_len - r.qo_len;
  KeySpan keys{0, r.kv_len};
  if (p.call.causal && position < keys.end) keys.end = position + 1;
  if (p.call.window_left >= 0 && position > p.call.window_left) keys.begin = position - p.call.window_left;
  return keys.begin < keys.end ? keys : KeySpan{0, 0};
}

// Whether there are tokens of no request.
FI_DEVICE_INLINE bool has_padding(const BatchAttentionParams& p) {
  return p.qo_indptr.at(0) > 0 || p.qo_indptr.at(p.call.batch) < p.call.qo_len;
}

// Output 0 and LSE -inf for the tokens of no request, by thread `me` of `threads` in all.
template <class T>
FI_DEVICE_INLINE void write_padding(const BatchAttentionParams& p, int64_t me, int64_t threads) {
  const AttentionParams& c = p.call;
  const int64_t first = clamp_index(p.qo_indptr.at(0), 0, c.qo_len);
  const int64_t end = clamp_index(p.qo_indptr.at(c.batch), first, c.qo_len);
  const int64_t rows = (first + c.qo_len - end) * c.num_qo_heads;
  for (int64_t at = me; at < rows * c.head_dim_vo; at += threads) {
    const int64_t row = at / c.head_dim_vo, token = row / c.num_qo_heads,
                  n = token < first ? token : token - first + end;
    static_cast<T*>(
        c.out)[n * c.o_stride_n + (row - token * c.num_qo_heads) * c.o_stride_h + at - row * c.head_dim_vo] =
        from_float<T>(0.0f);
  }
  if (c.lse == nullptr) return;
  for (int64_t row = me; row < rows; row += threads) {
    const int64_t token = row / c.num_qo_heads, n = token < first ? token : token - first + end;
    c.lse[n * c.num_qo_heads + row - token * c.num_qo_heads] = -__builtin_inff();
  }
}

}  // namespace batch
}  // namespace fi::cuda
