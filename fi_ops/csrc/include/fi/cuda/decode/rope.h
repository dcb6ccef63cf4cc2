// Rotation of query rows on their way into shared memory, eight elements at once, and of single pairs: keys
// that lie in shared memory, and whatever vectors don't fit.
#pragma once

#include "fi/cuda/decode/mask.h"
#include "fi/cuda/pack.h"

namespace fi::cuda::decode {

// The element that element d is paired with, and the column of cos and sin that d takes.
FI_DEVICE_INLINE int rope_partner(const RopeTable& t, int d) {
  const int half = static_cast<int>(t.rotary_dim / 2);
  return t.interleaved ? d ^ 1 : d < half ? d + half : d - half;
}
FI_DEVICE_INLINE int rope_column(const RopeTable& t, int d) {
  const int half = static_cast<int>(t.rotary_dim / 2);
  return t.width != half ? d : t.interleaved ? d / 2 : d < half ? d : d - half;
}

// x[d] cos + x[partner] sin, the partner negated for the first of a pair, by table row `row` of batch b.
FI_DEVICE_INLINE float rotated(const RopeTable& t, int b, int64_t row, float x, float partner, int d) {
  const int column = rope_column(t, d);
  const float cos = load_float(t.cos, t.dtype, b * t.cos_stride_b + row * t.cos_stride_row + column);
  const float sin = load_float(t.sin, t.dtype, b * t.sin_stride_b + row * t.sin_stride_row + column);
  return fmaf(x, cos, (d < rope_partner(t, d) ? -partner : partner) * sin);
}

// Element d of the row x after rotation, rounded to T.
template <class T>
FI_DEVICE_INLINE T rotated(const RopeTable& t, int b, int64_t row, const T* x, int d) {
  if (d >= t.rotary_dim) return x[d];
  return from_float<T>(rotated(t, b, row, to_float(x[d]), to_float(x[rope_partner(t, d)]), d));
}

// Whether chunks of eight 16-bit elements hold what their rotation needs of tables that are read 16 bytes at
// a time. Asked on the host, once a call.
inline bool rope_takes_chunks(const RopeTable& t) {
  auto whole = [&](const void* data, int64_t stride_b, int64_t stride_row) {
    const int64_t values = t.dtype == DType::f32 ? 4 : 8;
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride_b % values == 0 && stride_row % values == 0;
  };
  return t.cos && t.rotary_dim % (t.interleaved ? 8 : 16) == 0 &&
         whole(t.cos, t.cos_stride_b, t.cos_stride_row) && whole(t.sin, t.sin_stride_b, t.sin_stride_row);
}

// A chunk of eight elements to be rotated. fetch() has all its loads on their way and waits for none of them.
template <class T>
class RopeChunk {
 public:
  // Besides the chunk itself, from element d < rotary_dim on, of the row x of batch b and table row `row`.
  FI_DEVICE_INLINE void fetch(const RopeTable& t, int b, int64_t row, const T* x, int d) {
    if (!t.interleaved) other_ = load_16(x + rope_partner(t, d));
    const int column = rope_column(t, d);
    fetch_values(cos_, t, t.cos, b * t.cos_stride_b + row * t.cos_stride_row + column);
    fetch_values(sin_, t, t.sin, b * t.sin_stride_b + row * t.sin_stride_row + column);
  }

  // The chunk x, rotated; the roundings are those of `rotated`.
  FI_DEVICE_INLINE uint4 rotate(const RopeTable& t, const uint4& x, int d) const {
    float a[8], other[8], cos[8], sin[8];
    unpack_16<T>(a, x);
    values(cos, t.dtype, cos_);
    values(sin, t.dtype, sin_);
    if (t.interleaved) {
      const bool one_a_pair = t.width == t.rotary_dim / 2;
#pragma unroll
      for (int e = 7; e >= 0; --e) {
        if (one_a_pair) cos[e] = cos[e / 2], sin[e] = sin[e / 2];
        other[e] = e % 2 ? a[e ^ 1] : -a[e ^ 1];
      }
    } else {
      unpack_16<T>(other, other_);
      const bool low = d < t.rotary_dim / 2;
#pragma unroll
      for (int e = 0; e < 8; ++e) other[e] = low ? -other[e] : other[e];
    }
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int e = 2 * w;
      words[w] = pack2<T>(fmaf(a[e], cos[e], other[e] * sin[e]),
                          fmaf(a[e + 1], cos[e + 1], other[e + 1] * sin[e + 1]));
    }
    return {words[0], words[1], words[2], words[3]};
  }

 private:
  // Eight values from value `at` on, or the four that eight interleaved elements share.
  FI_DEVICE_INLINE static void fetch_values(uint4 (&to)[2], const RopeTable& t, const void* table,
                                            int64_t at) {
    const bool four = t.interleaved && t.width == t.rotary_dim / 2;
    if (t.dtype == DType::f32) {
      const float* from = static_cast<const float*>(table) + at;
      to[0] = load_16(from);
      if (!four) to[1] = load_16(from + 4);
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(table) + at;
      if (four) {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        to[0].x = v.x, to[0].y = v.y;
      } else {
        to[0] = load_16(from);
      }
    }
  }

  FI_DEVICE_INLINE static void values(float (&x)[8], DType dtype, const uint4 (&v)[2]) {
    if (dtype == DType::f32) {
      unpack_16<float>(x, v[0]);
      unpack_16<float>(x + 4, v[1]);
    } else if (dtype == DType::bf16) {
      unpack_16<bf16>(x, v[0]);
    } else {
      unpack_16<f16>(x, v[0]);
    }
  }

  uint4 other_ = {0, 0, 0, 0};  // rotate-half: the other elements of the pairs
  uint4 cos_[2] = {}, sin_[2] = {};
};

}  // namespace fi::cuda::decode
