// Rotation of single pairs, for query rows on their way into shared memory and for keys that lie there.
#pragma once

#include "fi/cuda/decode/mask.h"

namespace fi::cuda::decode {

// One pair of a row: its two elements become (a c - b s, b c + a s).
struct RopePair {
  int first, second;
  float cos, sin;

  FI_DEVICE_INLINE float low(float a, float b) const { return fmaf(a, cos, -(b * sin)); }
  FI_DEVICE_INLINE float high(float a, float b) const { return fmaf(b, cos, a * sin); }
};

// Pair `pair` of table row `row` of batch b.
FI_DEVICE_INLINE RopePair rope_pair(const RopeTable& t, int b, int64_t row, int pair) {
  const int half = static_cast<int>(t.rotary_dim / 2);
  const int column = t.interleaved && t.width != half ? 2 * pair : pair;
  return {t.interleaved ? 2 * pair : pair, t.interleaved ? 2 * pair + 1 : half + pair,
          load_float(t.cos, t.dtype, b * t.cos_stride_b + row * t.cos_stride_row + column),
          load_float(t.sin, t.dtype, b * t.sin_stride_b + row * t.sin_stride_row + column)};
}

// Element d of the row x after rotation, rounded to T.
template <class T>
FI_DEVICE_INLINE T rotated(const RopeTable& t, int b, int64_t row, const T* x, int d) {
  if (d >= t.rotary_dim) return x[d];
  const int half = static_cast<int>(t.rotary_dim / 2);
  const RopePair pair = rope_pair(t, b, row, t.interleaved ? d / 2 : d < half ? d : d - half);
  const float a = to_float(x[pair.first]), b_ = to_float(x[pair.second]);
  return from_float<T>(d == pair.first ? pair.low(a, b_) : pair.high(a, b_));
}

}  // namespace fi::cuda::decode
