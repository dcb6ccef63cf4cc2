// Rotary embedding of a tile's rows in shared memory.
#pragma once

#include "fi/batch_attention.h"
#include "fi/cuda/rope_row.h"
#include "fi/cuda/sm80/prefill_tile.h"

namespace fi::cuda {

// Whether pairs come eight at a time: rotate_tile() takes one by one else.
inline bool rope_has_packs(const RopeTable& rope) {
  auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return rope.rotary_dim % 16 == 0 && rope.cos_stride_row % 4 == 0 && rope.sin_stride_row % 4 == 0 &&
         is_aligned(rope.cos) && is_aligned(rope.sin);
}

// Pairs 8u .. 8u + 8 of row r.
template <int kDim, bool interleaved, class T>
FI_DEVICE_INLINE void rotate_eight(T* tile, int r, int u, const RopeTable& rope, int64_t table_row) {
  const auto angles = load_rope_angles<8, interleaved, false>(rope.cos, table_row * rope.cos_stride_row,
                                                              rope.sin, table_row * rope.sin_stride_row,
                                                              DType::f32, rope.rotary_dim, 8 * u);
  const int second = interleaved ? 2 * u + 1 : u + static_cast<int>(rope.rotary_dim) / 16;
  auto* a = reinterpret_cast<uint4*>(tile + tile_offset<kDim>(r, interleaved ? 2 * u : u));
  auto* b = reinterpret_cast<uint4*>(tile + tile_offset<kDim>(r, second));
  float low[8], high[8], new_low[8], new_high[8];
  unpack_16<T>(low, *a);
  unpack_16<T>(high, *b);
  rotate_packs<interleaved>(low, high, angles, new_low, new_high);
  auto packed = [](const float (&x)[8]) {
    return uint4{pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])};
  };
  *a = packed(new_low);
  *b = packed(new_high);
}

// Rotates rows [0, kRows) by the table's row of their position_of(row), the nearest there is, rounded to T
// once. For all threads of the block, between barriers.
template <int kDim, int kRows, int kThreads, class T, class Position>
FI_DEVICE_INLINE void rotate_tile(T* tile, const BatchAttentionParams& p, bool has_packs,
                                  const Position& position_of) {
  const RopeTable& rope = p.call.rope;
  if (p.rope_len == 0) return;
  const int pairs = static_cast<int>(rope.rotary_dim) / 2;
  auto table_row = [&](int r) { return clamp_index(position_of(r), 0, p.rope_len - 1); };
  if (has_packs) {
    for (int u = threadIdx.x % 8; u < pairs / 8; u += 8) {
#pragma unroll kRows <= 64 && kDim <= 128 ? 2 : 1  // registers are short
      for (int r = threadIdx.x / 8; r < kRows; r += kThreads / 8) {
        rope.interleaved ? rotate_eight<kDim, true>(tile, r, u, rope, table_row(r))
                         : rotate_eight<kDim, false>(tile, r, u, rope, table_row(r));
      }
    }
    return;
  }
  for (int r = threadIdx.x / 32; r < kRows; r += kThreads / 32) {
    const float* cos = static_cast<const float*>(rope.cos) + table_row(r) * rope.cos_stride_row;
    const float* sin = static_cast<const float*>(rope.sin) + table_row(r) * rope.sin_stride_row;
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
