// Rotary embedding of pieces of a head's row: what the rope ops and the cache append share.
//
// A thread takes N pairs: their cos and sin once a token, then the pairs of as many heads as it serves. With
// a, b the two members of pair i (rotary_dim / 2 pairs), x[i] and x[half + i] for rotate-half, x[2i] and
// x[2i + 1] interleaved:
//   (a, b) -> (a c - b s, b c' + a s')
// where c', s' are c, s in tables of one value a pair, and the values at b's place in tables of rotary_dim
// (`per_member`). Products in fp32, one rounding to the output's type.
#pragma once

#include "fi/cuda/pack.h"

namespace fi::cuda {

// Element j of 2N neighbours that lie in two packs.
template <int N>
FI_DEVICE_INLINE float of_two_packs(const float (&low)[N], const float (&high)[N], int j) {
  return j < N ? low[j < N ? j : 0] : high[j < N ? 0 : j - N];
}

template <int N, bool per_member>
struct RopeAngles {
  float cos[per_member ? 2 : 1][N];  // of the first members (or both), of the second
  float sin[per_member ? 2 : 1][N];
};

// The angles of pairs first .. first + N. `cos`, `sin`: the arrays, of `dtype`, the token's row starting at
// cos_row, sin_row.
template <int N, bool interleaved, bool per_member>
FI_DEVICE_INLINE RopeAngles<N, per_member> load_rope_angles(const void* cos, int64_t cos_row, const void* sin,
                                                            int64_t sin_row, DType dtype, int64_t rotary_dim,
                                                            int64_t first) {
  RopeAngles<N, per_member> angles;
  auto load = [&](float (&x)[per_member ? 2 : 1][N], const void* p, int64_t row) {
    if constexpr (!per_member) {
      load_pack_as(x[0], p, dtype, row + first);
    } else if constexpr (!interleaved) {
      load_pack_as(x[0], p, dtype, row + first);
      load_pack_as(x[1], p, dtype, row + rotary_dim / 2 + first);
    } else {
      float low[N], high[N];
      load_pack_as(low, p, dtype, row + 2 * first);
      load_pack_as(high, p, dtype, row + 2 * first + N);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x[0][i] = of_two_packs(low, high, 2 * i);
        x[1][i] = of_two_packs(low, high, 2 * i + 1);
      }
    }
  };
  load(angles.cos, cos, cos_row);
  load(angles.sin, sin, sin_row);
  return angles;
}

// N pairs in two packs of N neighbours: their first members and their second ones, or interleaved one after
// the other.
template <bool interleaved, int N, bool per_member>
FI_DEVICE_INLINE void rotate_packs(const float (&low)[N], const float (&high)[N],
                                   const RopeAngles<N, per_member>& angles, float (&new_low)[N],
                                   float (&new_high)[N]) {
  constexpr int second = per_member ? 1 : 0;
  if constexpr (interleaved) {
    auto set = [&](int j, float value) {
      (j < N ? new_low[j < N ? j : 0] : new_high[j < N ? 0 : j - N]) = value;
    };
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float a = of_two_packs(low, high, 2 * i), b = of_two_packs(low, high, 2 * i + 1);
      set(2 * i, fmaf(a, angles.cos[0][i], -(b * angles.sin[0][i])));
      set(2 * i + 1, fmaf(b, angles.cos[second][i], a * angles.sin[second][i]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float a = low[i], b = high[i];
      new_low[i] = fmaf(a, angles.cos[0][i], -(b * angles.sin[0][i]));
      new_high[i] = fmaf(b, angles.cos[second][i], a * angles.sin[second][i]);
    }
  }
}

// Pairs first .. first + N of the row x, rotated: two calls put(i, values) with N neighbours of the rotated
// row, from its element i on, once everything is read.
template <bool interleaved, int N, bool per_member, class T, class Put>
FI_DEVICE_INLINE void rotate_pairs_to(const T* x, const RopeAngles<N, per_member>& angles, int64_t rotary_dim,
                                      int64_t first, const Put& put) {
  const int64_t at_low = interleaved ? 2 * first : first;
  const int64_t at_high = interleaved ? 2 * first + N : rotary_dim / 2 + first;
  float low[N], high[N], new_low[N], new_high[N];
  load_pack(low, x + at_low);
  load_pack(high, x + at_high);
  rotate_packs<interleaved>(low, high, angles, new_low, new_high);
  put(at_low, new_low);
  put(at_high, new_high);
}

// The same into the row y, which may be x.
template <bool interleaved, int N, bool per_member, class T>
FI_DEVICE_INLINE void rotate_pairs(const T* x, T* y, const RopeAngles<N, per_member>& angles,
                                   int64_t rotary_dim, int64_t first) {
  rotate_pairs_to<interleaved>(x, angles, rotary_dim, first,
                               [&](int64_t i, const float (&values)[N]) { store_pack(y + i, values); });
}

// Elements begin .. end of a row, bit for bit, by the block's threads along x.
template <int N, class T>
FI_DEVICE_INLINE void copy_elements(const T* x, T* y, int64_t begin, int64_t end) {
  for (int64_t j = begin + int64_t{threadIdx.x} * N; j < end; j += int64_t{blockDim.x} * N)
    copy_pack<N>(y + j, x + j);
}

}  // namespace fi::cuda
