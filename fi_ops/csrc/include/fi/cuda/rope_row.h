// Rotary embedding of pieces of a head's row: what the rope ops and the cache append share.
//
// A thread takes N pairs: their cos and sin once a token, then the pairs of as many heads as it serves. With
// c, s of pair i (rotary_dim / 2 pairs):
//   rotate-half: (x[i], x[half + i])  -> (a c - b s, b c + a s)
//   interleaved: (x[2i], x[2i + 1])   -> (a c - b s, b c + a s)
// Products in fp32, one rounding to the output's type.
#pragma once

#include "fi/cuda/pack.h"

namespace fi::cuda {

template <int N>
struct RopeAngles {
  float cos[N], sin[N];
};

// The angles of pairs first .. first + N. `cos`, `sin`: the arrays, of `dtype`, the token's row starting at
// cos_row, sin_row; `width` values wide: one a pair, or each twice (halves repeated for rotate-half,
// neighbours for interleaved).
template <int N, bool interleaved>
FI_DEVICE_INLINE RopeAngles<N> load_rope_angles(const void* cos, int64_t cos_row, const void* sin,
                                                int64_t sin_row, DType dtype, int64_t width,
                                                int64_t rotary_dim, int64_t first) {
  RopeAngles<N> angles;
  if (interleaved && width == rotary_dim) {
    float low[N], high[N];
    auto every_second = [&](float (&x)[N], const void* p, int64_t row) {
      load_pack_as(low, p, dtype, row + 2 * first);
      load_pack_as(high, p, dtype, row + 2 * first + N);
#pragma unroll
      for (int i = 0; i < N; ++i)
        x[i] = 2 * i < N ? low[2 * i < N ? 2 * i : 0] : high[2 * i < N ? 0 : 2 * i - N];
    };
    every_second(angles.cos, cos, cos_row);
    every_second(angles.sin, sin, sin_row);
  } else {
    load_pack_as(angles.cos, cos, dtype, cos_row + first);
    load_pack_as(angles.sin, sin, dtype, sin_row + first);
  }
  return angles;
}

// Pairs first .. first + N of the row x, rotated, into the row y, which may be x.
template <bool interleaved, int N, class T>
FI_DEVICE_INLINE void rotate_pairs(const T* x, T* y, const RopeAngles<N>& angles, int64_t rotary_dim,
                                   int64_t first) {
  const int64_t at_low = interleaved ? 2 * first : first;
  const int64_t at_high = interleaved ? 2 * first + N : rotary_dim / 2 + first;
  float low[N], high[N], new_low[N], new_high[N];
  load_pack(low, x + at_low);
  load_pack(high, x + at_high);
  if constexpr (interleaved) {
    // The two packs are 2N neighbours; element j of them.
    auto element = [&](int j) { return j < N ? low[j < N ? j : 0] : high[j < N ? 0 : j - N]; };
    auto put = [&](int j, float value) {
      (j < N ? new_low[j < N ? j : 0] : new_high[j < N ? 0 : j - N]) = value;
    };
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float a = element(2 * i), b = element(2 * i + 1), c = angles.cos[i], s = angles.sin[i];
      put(2 * i, fmaf(a, c, -(b * s)));
      put(2 * i + 1, fmaf(b, c, a * s));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float a = low[i], b = high[i], c = angles.cos[i], s = angles.sin[i];
      new_low[i] = fmaf(a, c, -(b * s));
      new_high[i] = fmaf(b, c, a * s);
    }
  }
  store_pack(y + at_low, new_low);
  store_pack(y + at_high, new_high);
}

// Elements begin .. end of a row, bit for bit, by the block's threads along x.
template <int N, class T>
FI_DEVICE_INLINE void copy_elements(const T* x, T* y, int64_t begin, int64_t end) {
  for (int64_t j = begin + int64_t{threadIdx.x} * N; j < end; j += int64_t{blockDim.x} * N)
    copy_pack<N>(y + j, x + j);
}

}  // namespace fi::cuda
