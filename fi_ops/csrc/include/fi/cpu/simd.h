// Vectors of float for the ISA level this file is compiled at.
//
// `Vec` is a GCC/Clang vector type of kLanes floats: + - * / and comparisons are the language's own (a
// comparison gives a VecI of 0 / -1), and `a * b + c` contracts to an FMA where the level has one. What the
// language lacks is below: loads and stores of all storage types with tails, conversions, min/max, select,
// reductions, exp2, exp, tanh. Everything is inside the level's namespace and `static`.
#pragma once

#include "fi/scalar.h"

#if FI_ISA_LEVEL >= 1
#  include <immintrin.h>
#endif

namespace fi::FI_ISA {

#if FI_ISA_LEVEL >= 2
inline constexpr int kLanes = 16;
#elif FI_ISA_LEVEL == 1
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));  // storage bits of 16-bit types

inline constexpr float kInf = __builtin_inff();
inline constexpr float kLog2e = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

FI_INLINE Vec set1(float x) { return Vec{} + x; }
FI_INLINE Vec zero() { return Vec{}; }

FI_INLINE VecI iota_i() {
  VecI r;
  for (int i = 0; i < kLanes; ++i) r[i] = i;
  return r;
}

FI_INLINE VecI as_int(Vec x) { return (VecI)x; }
FI_INLINE Vec as_float(VecI x) { return (Vec)x; }
FI_INLINE Vec to_vec(VecI x) { return __builtin_convertvector(x, Vec); }

FI_INLINE Vec select(VecI mask, Vec a, Vec b) { return mask ? a : b; }
FI_INLINE VecI select(VecI mask, VecI a, VecI b) { return mask ? a : b; }

// a * b + c, fused at every level that has FMA (built with -ffp-contract=fast).
FI_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if FI_ISA_LEVEL >= 2
  return _mm512_fmadd_ps(a, b, c);
#elif FI_ISA_LEVEL == 1
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// max/min return b where either is NaN: put the value whose NaN should survive second.
FI_INLINE Vec max(Vec a, Vec b) {
#if FI_ISA_LEVEL >= 2
  return _mm512_max_ps(a, b);
#elif FI_ISA_LEVEL == 1
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

FI_INLINE Vec min(Vec a, Vec b) {
#if FI_ISA_LEVEL >= 2
  return _mm512_min_ps(a, b);
#elif FI_ISA_LEVEL == 1
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

FI_INLINE Vec abs(Vec x) { return as_float(as_int(x) & 0x7fffffff); }

// ---- 16-bit storage ----

FI_INLINE Vec bf16_to_vec(VecH h) { return (Vec)(__builtin_convertvector(h, VecU) << 16); }

FI_INLINE Vec f16_to_vec(VecH h) {
#if FI_ISA_LEVEL >= 2
  return _mm512_cvtph_ps((__m256i)h);
#elif FI_ISA_LEVEL == 1
  return _mm256_cvtph_ps((__m128i)h);
#else
  const VecU w = __builtin_convertvector(h, VecU) << 16;
  const VecU two_w = w + w;
  const Vec normal = (Vec)((two_w >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const Vec denormal = (Vec)((two_w >> 17) | (126u << 23)) - 0.5f;
  const VecU magnitude = two_w < (1u << 27) ? (VecU)denormal : (VecU)normal;
  return (Vec)((w & 0x80000000u) | magnitude);
#endif
}

FI_INLINE VecH vec_to_bf16(Vec x) {
#if FI_ISA_LEVEL >= 3
  return (VecH)_mm512_cvtneps_pbh(x);
#else
  const VecU u = (VecU)x;
  const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const VecU nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, VecH);
#endif
}

FI_INLINE VecH vec_to_f16(Vec x) {
#if FI_ISA_LEVEL >= 2
  return (VecH)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif FI_ISA_LEVEL == 1
  return (VecH)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecU w = (VecU)x;
  const VecU shl1 = w + w;
  const Vec magnitude = ((Vec)(w & 0x7fffffffu) * 0x1.0p+112f) * 0x1.0p-110f;
  const VecU exponent = shl1 & 0xff000000u;
  const VecU bias = exponent < 0x71000000u ? VecU{} + 0x71000000u : exponent;
  const VecU bits = (VecU)((Vec)((bias >> 1) + 0x07800000u) + magnitude);
  const VecU nonsign = ((bits >> 13) & 0x7c00u) + (bits & 0x0fffu);
  const VecU value = shl1 > 0xff000000u ? VecU{} + 0x7e00u : nonsign;
  return __builtin_convertvector(((w >> 16) & 0x8000u) | value, VecH);
#endif
}

// ---- loads and stores; the partial forms touch exactly n elements (0 <= n <= kLanes), other lanes are 0
// ----

FI_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

FI_INLINE VecH load_bits(const void* p) {
  VecH x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

FI_INLINE Vec load(const bf16* p) { return bf16_to_vec(load_bits(p)); }
FI_INLINE Vec load(const f16* p) { return f16_to_vec(load_bits(p)); }

FI_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }

FI_INLINE void store(bf16* p, Vec x) {
  const VecH h = vec_to_bf16(x);
  __builtin_memcpy(p, &h, sizeof(h));
}

FI_INLINE void store(f16* p, Vec x) {
  const VecH h = vec_to_f16(x);
  __builtin_memcpy(p, &h, sizeof(h));
}

// Two vectors next to each other; for bf16 one instruction converts both where there is one.
template <class T>
FI_INLINE void store_pair(T* p, Vec x, Vec y) {
#if FI_ISA_LEVEL >= 3
  if constexpr (__is_same(T, bf16)) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(y, x));
    return;
  }
#endif
  store(p, x);
  store(p + kLanes, y);
}

FI_INLINE Vec load_partial(const float* p, int64_t n) {
#if FI_ISA_LEVEL >= 2
  return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p);
#else
  Vec x{};
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) x[i] = p[i];
  }
  return x;
#endif
}

FI_INLINE VecH load_bits_partial(const void* p, int64_t n) {
#if FI_ISA_LEVEL >= 2
  return (VecH)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1u), p);
#else
  VecH x{};
  const auto* bits = static_cast<const uint16_t*>(p);
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) x[i] = bits[i];
  }
  return x;
#endif
}

FI_INLINE Vec load_partial(const bf16* p, int64_t n) { return bf16_to_vec(load_bits_partial(p, n)); }
FI_INLINE Vec load_partial(const f16* p, int64_t n) { return f16_to_vec(load_bits_partial(p, n)); }

FI_INLINE void store_partial(float* p, Vec x, int64_t n) {
#if FI_ISA_LEVEL >= 2
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), x);
#else
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) p[i] = x[i];
  }
#endif
}

FI_INLINE void store_bits_partial(void* p, VecH x, int64_t n) {
#if FI_ISA_LEVEL >= 2
  _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1u), (__m256i)x);
#else
  auto* bits = static_cast<uint16_t*>(p);
  for (int i = 0; i < kLanes; ++i) {
    if (i < n) bits[i] = x[i];
  }
#endif
}

FI_INLINE void store_partial(bf16* p, Vec x, int64_t n) { store_bits_partial(p, vec_to_bf16(x), n); }
FI_INLINE void store_partial(f16* p, Vec x, int64_t n) { store_bits_partial(p, vec_to_f16(x), n); }

// ---- reductions over the lanes ----

FI_INLINE float reduce_add(Vec x) {
#if FI_ISA_LEVEL >= 2
  return _mm512_reduce_add_ps(x);
#elif FI_ISA_LEVEL == 1
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_shuffle_ps(r, r, 1)));
#else
  return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

FI_INLINE float reduce_max(Vec x) {
#if FI_ISA_LEVEL >= 2
  return _mm512_reduce_max_ps(x);
#elif FI_ISA_LEVEL == 1
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_shuffle_ps(r, r, 1)));
#else
  const float a = x[0] > x[2] ? x[0] : x[2];
  const float b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
#endif
}

FI_INLINE float reduce_min(Vec x) { return -reduce_max(-x); }

FI_INLINE bool any(VecI mask) {
#if FI_ISA_LEVEL >= 2
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif FI_ISA_LEVEL == 1
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// ---- elementary functions ----

// x rounded to the nearest integer, as a float, for |x| < 2^22: the adder drops the fraction bits.
FI_INLINE Vec round_small(Vec x) {
  const float magic = 0x1.8p23f;
  return (x + magic) - magic;
}

// 2^f for f in [-0.5, 0.5], relative error below 2^-24 (minimax, degree 6).
FI_INLINE Vec exp2_poly(Vec f) {
  Vec p = set1(1.535336188319500e-4f);
  p = fma(p, f, set1(1.339887440266574e-3f));
  p = fma(p, f, set1(9.618437357674640e-3f));
  p = fma(p, f, set1(5.550332471162809e-2f));
  p = fma(p, f, set1(2.402264791363012e-1f));
  p = fma(p, f, set1(6.931472028550421e-1f));
  return fma(p, f, set1(1.0f));
}

// x * 2^n for integer-valued n in [-300, 300]; over- and underflow are gradual and right.
FI_INLINE Vec scale2(Vec x, Vec n) {
#if FI_ISA_LEVEL >= 2
  return _mm512_scalef_ps(x, n);
#else
  const VecI i = __builtin_convertvector(n, VecI);
  const VecI half = i >> 1;
  return x * as_float((half + 127) << 23) * as_float((i - half + 127) << 23);
#endif
}

// 2^x over the whole range; NaN stays NaN.
FI_INLINE Vec exp2(Vec x) {
  x = min(set1(130.0f), max(set1(-160.0f), x));
  const Vec n = round_small(x);
  return scale2(exp2_poly(x - n), n);
}

#if FI_ISA_LEVEL >= 3
// 2^x, relative error below 2^-13.7, for weights that are rounded to bf16 anyway; below 2^-125 it is 0. The
// mask, on the polynomial too, keeps results that underflow away from the scaling: Intel's cores take 100 ns
// over such a vector.
FI_INLINE Vec exp2_bf16(Vec x) {
  const __mmask16 normal = _mm512_cmp_ps_mask(x, set1(-125.0f), _CMP_NLT_UQ);    // true where NaN
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  Vec p = set1(7.8024521e-2f);                                                   // minimax on [0, 1]
  p = fma(p, f, set1(2.2606716e-1f));
  p = fma(p, f, set1(6.9583350e-1f));
  p = _mm512_maskz_fmadd_ps(normal, p, f, set1(9.9992520e-1f));
  return _mm512_maskz_scalef_ps(normal, p, x);
}
#endif

// 2^x for x <= 0, what a softmax needs: the exponent is added to the polynomial's as an integer. Results
// under 2^-126 lose digits, x <= -127 (also -inf) is 0, NaN stays NaN. kRounded: bf16 precision will do.
template <bool kRounded = false>
FI_INLINE Vec exp2_nonpositive(Vec x) {
#if FI_ISA_LEVEL >= 3
  if constexpr (kRounded) return exp2_bf16(x);
#endif
  const float magic = 0x1.8p23f;
  x = max(set1(-127.0f), x);
  const Vec shifted = x + magic;  // the low bits now hold round(x)
  const Vec f = x - (shifted - magic);
  return as_float(as_int(exp2_poly(f)) + (as_int(shifted) << 23));
}

// e^x over the whole range; ln 2 is subtracted in two parts so that large |x| keeps its digits.
FI_INLINE Vec exp(Vec x) {
  x = min(set1(90.0f), max(set1(-110.0f), x));
  const Vec n = round_small(x * kLog2e);
  Vec r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  return scale2(p, n);
}

// tanh as an odd rational function; beyond the clamp the result is +-1 to float precision.
FI_INLINE Vec tanh(Vec x) {
  x = min(set1(7.90531110763549805f), max(set1(-7.90531110763549805f), x));
  const Vec x2 = x * x;
  Vec p = set1(-2.76076847742355e-16f);
  p = fma(p, x2, set1(2.00018790482477e-13f));
  p = fma(p, x2, set1(-8.60467152213735e-11f));
  p = fma(p, x2, set1(5.12229709037114e-08f));
  p = fma(p, x2, set1(1.48572235717979e-05f));
  p = fma(p, x2, set1(6.37261928875436e-04f));
  p = fma(p, x2, set1(4.89352455891786e-03f));
  Vec q = set1(1.19825839466702e-06f);
  q = fma(q, x2, set1(1.18534705686654e-04f));
  q = fma(q, x2, set1(2.26843463243900e-03f));
  q = fma(q, x2, set1(4.89352518554385e-03f));
  return x * p / q;
}

}  // namespace fi::FI_ISA
