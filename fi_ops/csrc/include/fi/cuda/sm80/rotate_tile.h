// Rotary embedding of a tile's rows in shared memory.
#pragma once

#include "fi/batch_attention.h"
#include "fi/cuda/sm80/prefill_tile.h"

namespace fi::cuda {

// Rotates rows [0, num_rows) by the table's row of their position_of(row), the nearest there is; a warp a
// row, rounded to T once. For all threads of the block, between barriers.
template <int kDim, int kThreads, class T, class Position>
FI_DEVICE_INLINE void rotate_tile(T* tile, int num_rows, const BatchAttentionParams& p,
                                  const Position& position_of) {
  const RopeTable& rope = p.call.rope;
  if (p.rope_len == 0) return;
  const int pairs = static_cast<int>(rope.rotary_dim) / 2;
  for (int r = static_cast<int>(threadIdx.x) / 32; r < num_rows; r += kThreads / 32) {
    const int64_t at = clamp_index(position_of(r), 0, p.rope_len - 1);
    const float* cos = static_cast<const float*>(rope.cos) + at * rope.cos_stride_row;
    const float* sin = static_cast<const float*>(rope.sin) + at * rope.sin_stride_row;
#pragma unroll 2
    for (int i = threadIdx.x % 32; i < pairs; i += 32) {
      const int low = rope.interleaved ? 2 * i : i, high = rope.interleaved ? 2 * i + 1 : i + pairs;
      T* a = tile + tile_offset<kDim>(r, low / 8) + low % 8;
      T* b = tile + tile_offset<kDim>(r, high / 8) + high % 8;
      const float x = to_float(*a), y = to_float(*b), c = cos[i], s = sin[i];
      *a = from_float<T>(fmaf(x, c, -(y * s)));
      *b = from_float<T>(fmaf(y, c, x * s));
    }
  }
}

}  // namespace fi::cuda
