// Rotary embedding of one head's row: the one implementation, used by the rope ops and by attention with RoPE
// fused in.
//
// Two steps, because a token's angles serve all of its heads: load_rope_angles() turns a row of the caller's
// cos and sin into fp32 in the form that the loop wants, rotate_row() applies it. With a, b the two members
// of pair i (rotary_dim / 2 pairs), x[i] and x[half + i] for rotate-half, x[2i] and x[2i + 1] interleaved:
//   (a, b) -> (a c - b s, b c' + a s')
// where c', s' are c, s in tables of one value a pair, and the values at b's place in tables of rotary_dim.
// Products in fp32, one rounding to the output's type; elements past rotary_dim are copied.
#pragma once

#include "fi/cpu/rowops.h"

namespace fi::FI_ISA {

// Floats that load_rope_angles() needs for one token.
FI_INLINE constexpr int64_t rope_angle_floats(int64_t rotary_dim) { return 2 * rotary_dim; }

struct RopeAngles {
  const float* cos;  // rotate-half: [half], or [rotary_dim] in tables of that; interleaved: [rotary_dim]
  const float* sin;  // as cos; interleaved: -s and +s'
  bool per_member;   // rotate-half: [rotary_dim]
};

// Neighbouring lanes exchanged: 1 0 3 2 5 4 ...
FI_INLINE Vec swap_pairs(Vec x) {
#if FI_ISA_LEVEL >= 2
  return _mm512_maskz_permute_ps(0xFFFF, x, 0xB1);  // the unmasked form makes GCC 12 warn
#elif FI_ISA_LEVEL == 1
  return _mm256_permute_ps(x, 0xB1);
#else
  return Vec{x[1], x[0], x[3], x[2]};
#endif
}

// The lower half of the lanes, each twice: 0 0 1 1 2 2 ...
FI_INLINE Vec double_low(Vec x) {
#if FI_ISA_LEVEL >= 2
  return _mm512_permutexvar_ps(_mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0), x);
#elif FI_ISA_LEVEL == 1
  return _mm256_permutevar8x32_ps(x, _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0));
#else
  return Vec{x[0], x[0], x[1], x[1]};
#endif
}

// -x in the even lanes, x in the odd ones.
FI_INLINE Vec negate_even(Vec x) { return as_float(as_int(x) ^ ((~iota_i() & 1) << 31)); }

// `cos`, `sin`: the token's rows, of `dtype`, `width` wide: half (one value a pair) or rotary_dim (one value
// an element). `scratch`: rope_angle_floats(rotary_dim) floats; the result may point into it or at the
// caller's rows.
FI_INLINE RopeAngles load_rope_angles(const void* cos, const void* sin, DType dtype, int64_t width,
                                      int64_t rotary_dim, bool interleaved, float* scratch) {
  const int64_t half = rotary_dim / 2;
  if (!interleaved) {
    const bool per_member = width != half;
    if (dtype == DType::f32)
      return {static_cast<const float*>(cos), static_cast<const float*>(sin), per_member};
    for_each_vec(width, [&](int64_t i, int64_t count) {
      store_n(scratch + i, load_as(cos, dtype, i, count), count);
      store_n(scratch + width + i, load_as(sin, dtype, i, count), count);
    });
    return {scratch, scratch + width, per_member};
  }
  float* sin_out = scratch + rotary_dim;
  for_each_vec(rotary_dim, [&](int64_t i, int64_t count) {
    Vec c, s;
    if (width == half) {
      c = double_low(load_as(cos, dtype, i / 2, count / 2));
      s = double_low(load_as(sin, dtype, i / 2, count / 2));
    } else {
      c = load_as(cos, dtype, i, count);
      s = load_as(sin, dtype, i, count);
    }
    store_n(scratch + i, c, count);
    store_n(sin_out + i, negate_even(s), count);
  });
  return {scratch, sin_out, false};
}

template <bool per_member, class T, class O>
FI_INLINE void rotate_halves(const T* x, O* y, const RopeAngles& angles, int64_t half) {
  for_each_vec(half, [&](int64_t i, int64_t count) {
    const Vec a = load_n(x + i, count), b = load_n(x + half + i, count);
    const Vec c = load_n(angles.cos + i, count), s = load_n(angles.sin + i, count);
    store_n(y + i, fma(a, c, -(b * s)), count);
    const int64_t second = per_member ? half + i : i;
    store_n(y + half + i, fma(b, load_n(angles.cos + second, count), a * load_n(angles.sin + second, count)),
            count);
  });
}

// y = the rotated x, head_dim elements; y may be x (then nothing past rotary_dim is touched). T, O: float,
// bf16, f16.
template <class T, class O>
FI_INLINE void rotate_row(const T* x, O* y, const RopeAngles& angles, int64_t rotary_dim, int64_t head_dim,
                          bool interleaved) {
  if (interleaved) {
    // rotary_dim is even and so is kLanes: no vector, the tail included, splits a pair.
    for_each_vec(rotary_dim, [&](int64_t i, int64_t count) {
      const Vec v = load_n(x + i, count);
      store_n(y + i, fma(v, load_n(angles.cos + i, count), swap_pairs(v) * load_n(angles.sin + i, count)),
              count);
    });
  } else {
    const int64_t half = rotary_dim / 2;
    if (angles.per_member) {
      rotate_halves<true>(x, y, angles, half);
    } else {
      rotate_halves<false>(x, y, angles, half);
    }
  }
  if (static_cast<const void*>(x) == static_cast<const void*>(y)) return;
  for_each_vec(head_dim - rotary_dim, [&](int64_t i, int64_t count) {
    store_n(y + rotary_dim + i, load_n(x + rotary_dim + i, count), count);
  });
}

}  // namespace fi::FI_ISA
