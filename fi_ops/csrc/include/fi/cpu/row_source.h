// What the values of a row mean to the passes over it (fi/cpu/sample_row.h): logits, logits of which only the
// order counts, or probabilities.
//
// A source loads values, says which can't be, makes the others canonical (-inf weighs nothing and is behind
// all others; -0 is +0), weighs them in fixed point, and measures distances on an axis on which buckets of
// even width do well: the logit itself, or the bits of a probability, which are about its logarithm.
#pragma once

#include "fi/cpu/simd.h"
#include "fi/sampling_math.h"

namespace fi::FI_ISA {

FI_INLINE uint32_t mask_bits(VecI m) {
#if FI_ISA_LEVEL >= 2
  return _mm512_movepi32_mask((__m512i)m);
#elif FI_ISA_LEVEL == 1
  return uint32_t(_mm256_movemask_ps((__m256)m));
#else
  return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u);
#endif
}

// Truncates to integers: values in [0, 2^62].
FI_INLINE void store_fixed(int64_t* p, Vec x) {
#if FI_ISA_LEVEL >= 2
  _mm512_storeu_si512(p, _mm512_cvttps_epi64(_mm512_castps512_ps256(x)));
  _mm512_storeu_si512(p + 8, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(x, 1)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = int64_t(x[i]);
#endif
}

// A running sum of fixed-point vectors.
struct FixedSum {
#if FI_ISA_LEVEL >= 2
  __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  [[gnu::always_inline]] void add(Vec x) {
    low = _mm512_add_epi64(low, _mm512_cvttps_epi64(_mm512_castps512_ps256(x)));
    high = _mm512_add_epi64(high, _mm512_cvttps_epi64(_mm512_extractf32x8_ps(x, 1)));
  }
  [[gnu::always_inline]] int64_t total() const {
    return _mm512_reduce_add_epi64(_mm512_add_epi64(low, high));
  }
#else
  int64_t sum[4] = {};
  [[gnu::always_inline]] void add(Vec x) {
    for (int i = 0; i < kLanes; ++i) sum[i % 4] += int64_t(x[i]);
  }
  [[gnu::always_inline]] int64_t total() const { return (sum[0] + sum[1]) + (sum[2] + sum[3]); }
#endif
};

// With `kWeighs`, +inf in a row takes all weight: `infinite` makes it 0 and all others -inf. Without, a
// weight is never asked for, and +inf is the largest value.
template <class T, bool kWeighs = true>
struct Logits {
  using Coordinate = float;
  static constexpr float kNothing = -kInf;  // fills up a last vector
  static constexpr float kInfinite = 0.0f;  // +inf counts as this
  static constexpr bool kHasWeights = kWeighs;

  const T* data;
  bool infinite = false;
  float max = 0;
  float exponent_scale = 0;  // log2(e) / temperature: octaves of weight in a unit of the axis
  float fixed_scale = 0;     // 2^fraction_bits
  float eligible = kInf;     // values further from the maximum weigh nothing (min-p)

  [[gnu::always_inline]] Vec load(int64_t i) const { return fi::FI_ISA::load(data + i); }
  [[gnu::always_inline]] Vec load_partial(int64_t i, int64_t n) const {
    return fi::FI_ISA::load_partial(data + i, n);
  }
  [[gnu::always_inline]] static VecI invalid(Vec raw) { return raw != raw; }
  // (Where the CPU flushes denormals, they become 0 here as in every comparison.)
  [[gnu::always_inline]] Vec canonical(Vec raw) const {
    if (kWeighs && __builtin_expect(infinite, 0)) return select(raw == kInf, zero(), set1(-kInf));
    return raw + 0.0f;
  }

  void set_weights(int64_t n, float temperature) {
    fixed_scale = float(int64_t{1} << weight_fraction_bits(n));
    exponent_scale = exponent_scale_of(temperature);
  }
  // p >= min_p * max(p), as a distance from the largest logit.
  void set_min_p(double min_p, float temperature) {
    eligible = min_p > 0.0 ? float(-double(temperature) * __builtin_log(min_p)) : kInf;
  }
  [[gnu::always_inline]] bool is_eligible(float x) const { return max - x <= eligible; }
  [[gnu::always_inline]] VecI is_eligible(Vec x) const { return max - x <= eligible; }

  // The weights before they become integers, min-p or not, in units of unit_scale(): here fractions of the
  // maximum's.
  [[gnu::always_inline]] Vec real_weight(Vec x) const {
    const Vec distance = max - x;
    return exp2_nonpositive(-(distance * exponent_scale));
  }
  // The weights, integers as floats: 2^fraction_bits for the maximum.
  [[gnu::always_inline]] Vec weigh(Vec x) const {
    if (!kWeighs) return zero();
    return select(is_eligible(x), real_weight(x) * fixed_scale, zero());
  }
  float unit_scale() const { return fixed_scale; }

  static float coordinate(float x) { return x; }
  [[gnu::always_inline]] static Vec distance(float from, Vec x) { return from - x; }
  [[gnu::always_inline]] static float distance(float from, float x) { return from - x; }
};

// Non-negative float weights, as they are or (`minus`) what is left of them when others are subtracted.
struct Probs {
  using Coordinate = int32_t;
  static constexpr float kNothing = 0.0f;
  static constexpr float kInfinite = 1.0f;
  static constexpr bool kHasWeights = true;

  const float* data;
  const float* minus = nullptr;
  bool infinite = false;
  float max = 0;
  float exponent_scale = 0x1p-23f;  // octaves in a unit of the last place
  float floor = 0;                  // smaller ones weigh nothing (min-p)
  ProbScale scale = {};
  float fixed_scale = 0;  // 2^fraction_bits, which no weight reaches

  [[gnu::always_inline]] Vec load(int64_t i) const {
    const Vec x = fi::FI_ISA::load(data + i);
    return minus == nullptr ? x : rest(x, fi::FI_ISA::load(minus + i));
  }
  [[gnu::always_inline]] Vec load_partial(int64_t i, int64_t n) const {
    const Vec x = fi::FI_ISA::load_partial(data + i, n);
    return minus == nullptr ? x : rest(x, fi::FI_ISA::load_partial(minus + i, n));
  }
  [[gnu::always_inline]] static Vec rest(Vec x, Vec other) {
    return fi::FI_ISA::max(zero(), x - other);  // NaN stays
  }
  [[gnu::always_inline]] static VecI invalid(Vec raw) { return (raw != raw) | (raw < 0.0f); }
  [[gnu::always_inline]] Vec canonical(Vec raw) const {
    if (__builtin_expect(infinite, 0)) return select(raw == kInf, set1(1.0f), set1(-kInf));
    return select(raw > 0.0f, raw, set1(-kInf));
  }

  void set_weights(int64_t n, float) {
    const int fraction_bits = prob_fraction_bits(n);
    fixed_scale = float(int64_t{1} << fraction_bits);
    scale = prob_scale_of(max, fraction_bits);
  }
  void set_min_p(double min_p, float) { floor = min_p_floor_of(min_p, max); }
  [[gnu::always_inline]] bool is_eligible(float x) const { return x >= floor; }
  [[gnu::always_inline]] VecI is_eligible(Vec x) const { return x >= floor; }

  // The weights before they become integers, min-p or not.
  [[gnu::always_inline]] Vec real_weight(Vec x) const {
    return select(x > 0.0f, x * scale.first * scale.second, zero());
  }
  [[gnu::always_inline]] Vec weigh(Vec x) const { return select(is_eligible(x), real_weight(x), zero()); }
  float unit_scale() const { return 1.0f; }

  static int32_t coordinate(float x) { return int32_t(float_bits(x)); }
  // (-inf has bits just so that the difference doesn't overflow.)
  [[gnu::always_inline]] static Vec distance(int32_t from, Vec x) { return to_vec(from - as_int(x)); }
  [[gnu::always_inline]] static float distance(int32_t from, float x) {
    return float(from - int32_t(float_bits(x)));
  }
};

}  // namespace fi::FI_ISA
