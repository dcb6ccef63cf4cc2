// The rows of a block of query rows: which keys each of them may see by causal, window and length.
//
// Head-query fusion: the rows of a KV head are query heads of its group x query positions, row = position *
// group + head. A block takes consecutive rows, so its few queries reach almost the same keys, and each
// row of K and V is read once for the whole group.
#pragma once

#include "fi/cuda/attention_rows.h"

namespace fi::cuda {

// What the kernels ask about one row; kept in shared memory.
struct RowKeys {
  int begin, end;
};
struct Row : RowKeys {
  float position;  // for ALiBi
  float slope;     // of ALiBi, base 2; 0: none
};

struct BlockRange {
  int begin, end;            // the union of the rows' keys
  int open_begin, open_end;  // keys that every row sees
  bool flag;                 // `flag` of every row
};

// Coordinates of a block of rows: rows [row_begin, row_begin + its size) of a KV head, `num_rows` in all.
struct BlockOfRows {
  int b, kv_head;
  unsigned row_begin, num_rows, group;

  FI_DEVICE_INLINE int query(int r) const { return static_cast<int>((row_begin + r) / group); }
  FI_DEVICE_INLINE int head(int r) const {
    return kv_head * static_cast<int>(group) + static_cast<int>((row_begin + r) % group);
  }
  FI_DEVICE_INLINE bool has(int r) const { return row_begin + r < num_rows; }
};

// Fills rows[0, kRows) and returns what they have in common. `flag` is a property of row threadIdx.x.
// For all threads of the block, kThreads >= kRows; `partial`: 5 ints a warp. Ends with a barrier.
// R: Row, or RowKeys where there is no ALiBi.
template <int kRows, int kThreads, class R>
FI_DEVICE_INLINE BlockRange load_rows(const AttentionParams& p, const BlockOfRows& block, R* rows, bool flag,
                                      int* partial) {
  constexpr int kFar = 0x7fffffff;
  const int r = threadIdx.x;
  // begin, -end, -open_begin, open_end, flag: all joined by the minimum.
  int v[5] = {kFar, 0, 0, kFar, 1};
  if (r < kRows) {
    R row{};
    if (block.has(r)) {
      const int64_t position = query_position(p, block.b, block.query(r));
      const KeyRange keys = keys_of_position(p, position);
      row.begin = keys.begin, row.end = keys.end;
      if constexpr (__is_same(R, Row)) {
        row.position = static_cast<float>(position);
        if (p.alibi_slopes) row.slope = p.alibi_slopes.at(block.head(r)) * kLog2e;
      }
      if (keys.begin < keys.end) {
        v[0] = keys.begin, v[1] = -keys.end;
        v[2] = -keys.begin, v[3] = keys.end;
      } else {
        v[2] = -kFar, v[3] = 0;
      }
      v[4] = flag;
    }
    rows[r] = row;
  }
#pragma unroll
  for (int k = 0; k < 5; ++k) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) v[k] = min(v[k], __shfl_xor_sync(kAllLanes, v[k], lanes));
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32 * 5 + k] = v[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 5; ++k) {
    for (int w = 0; w < kThreads / 32; ++w) v[k] = min(v[k], partial[w * 5 + k]);
  }
  BlockRange range{v[0], -v[1], -v[2], v[3], v[4] != 0};
  if (range.begin >= range.end) range.begin = range.end = 0;
  return range;
}

}  // namespace fi::cuda
