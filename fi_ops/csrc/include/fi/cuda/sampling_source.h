// What the values of a row mean to the passes over it: logits, logits of which only the order counts,
// probabilities, or what is left of probabilities when others are subtracted.
//
// A source loads values, makes them canonical (-inf weighs nothing), and has Weights: how far from the
// largest a value is, in octaves, on an axis on which even steps do well (the logit itself, or the bits of a
// probability, which are about its logarithm), and what it weighs.
#pragma once

#include "fi/cuda/pack.h"
#include "fi/cuda/ptx.h"
#include "fi/sampling.h"
#include "fi/sampling_math.h"

namespace fi::cuda {

inline constexpr float kInfinity = __builtin_huge_valf();

// What orders tokens: larger first, lower id first among equals. Smaller comes first.
FI_DEVICE_INLINE uint64_t place_of(float x, int32_t id) {
  return uint64_t(order_key(x + 0.0f)) << 32 | uint32_t(id);  // -0 is +0
}
FI_DEVICE_INLINE float logit_at(uint64_t place) { return key_logit(uint32_t(place >> 32)); }

inline constexpr uint64_t kAllPlaces = ~uint64_t{0};

// What is kept: the tokens up to a place.
struct Kept {
  float logit;
  uint32_t last_id;  // of those at that logit

  __device__ explicit Kept(uint64_t place)
      : logit(place == kAllPlaces ? -kInfinity : logit_at(place)), last_id(uint32_t(place)) {}
  __device__ bool operator()(float x, int32_t id) const {
    return (x > logit) | ((x == logit) & (uint32_t(id) <= last_id));  // no branches
  }
};

// A weight has at most so many fraction bits: two halves of it, each a float's mantissa, are exact.
inline constexpr int kMaxFractionBits = 45;

// Weights are integers: a fraction of the largest one's (or less) times 2^fraction_bits.
struct FixedPoint {
  int fraction_bits;
  float low_base;  // 1.5 * 2^(23 - fraction_bits), the last place of which is 2^-fraction_bits

  __device__ void set_fraction_bits(int bits) {
    fraction_bits = bits;
    low_base = __uint_as_float(uint32_t(127 + 23 - bits) << 23 | 1u << 22);
  }
};

// A sum of weights, exact. A conversion to 64-bit integers runs at a small part of the rate of additions;
// adding a large power of two rounds to its last place just so, twice.
struct WeightSum {
  uint64_t high = 0;  // of 2^-22
  uint32_t low = 0;   // of 2^-fraction_bits, signed

  static constexpr uint32_t kTwo = 0x40000000u;  // 2.0f, the last place of which is 2^-22

  // N at once: 64-bit additions are two, and what the bits of the floats begin at is subtracted once.
  template <int N>
  __device__ void add(const FixedPoint& weights, const float (&fractions)[N]) {
    uint32_t highs = 0, lows = 0;
#pragma unroll
    for (const float fraction : fractions) {
      const float a = __fadd_rn(fraction, 2.0f);
      const float rest = __fadd_rn(fraction, -__fadd_rn(a, -2.0f));
      highs += __float_as_uint(a);
      lows += __float_as_uint(__fadd_rn(rest, weights.low_base));
    }
    high += highs - uint32_t(N) * kTwo;
    low += lows - uint32_t(N) * __float_as_uint(weights.low_base);
  }
  // The same, and of those in `some` to `sum_of_some` too.
  template <int N>
  __device__ void add_some(const FixedPoint& weights, const float (&fractions)[N], const bool (&some)[N],
                           WeightSum& sum_of_some) {
    const uint32_t base = __float_as_uint(weights.low_base);
    uint32_t highs = 0, lows = 0, some_highs = 0, some_lows = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float a = __fadd_rn(fractions[i], 2.0f);
      const float rest = __fadd_rn(fractions[i], -__fadd_rn(a, -2.0f));
      const uint32_t h = __float_as_uint(a), l = __float_as_uint(__fadd_rn(rest, weights.low_base));
      highs += h;
      lows += l;
      some_highs += some[i] ? h : kTwo;
      some_lows += some[i] ? l : base;
    }
    high += highs - uint32_t(N) * kTwo;
    low += lows - uint32_t(N) * base;
    sum_of_some.high += some_highs - uint32_t(N) * kTwo;
    sum_of_some.low += some_lows - uint32_t(N) * base;
  }
  __device__ uint64_t total(const FixedPoint& weights) const {
    return (high << (weights.fraction_bits - 22)) + uint64_t(int64_t(int32_t(low)));
  }
};

template <class Weights>
FI_DEVICE_INLINE uint64_t weigh(const Weights& weights, float x) {
  WeightSum sum;
  sum.add(weights, {weights.fraction(x)});
  return sum.total(weights);
}

// All blocks of a row have the same. `eligible` is min-p's: what it is where min-p applies is `min_p_limit`.
struct LogitWeights : FixedPoint {
  static constexpr float kAllEligible = kInfinity;
  static constexpr float kBeyond = 1.0f;  // octaves from fraction_bits to where weights are 0

  float max;             // of the row; 0 where that is infinite
  float exponent_scale;  // log2(e) / temperature
  float eligible;        // logits below max - eligible weigh nothing
  float min_p_limit;

  // Before the row's maximum is known.
  __device__ void prepare(const SamplingDraw& d, int bits) {
    set_fraction_bits(bits);
    exponent_scale = exponent_scale_of(d.temperature);
    // p >= min_p * max(p), as a distance from the largest logit: a prefix, as the other filters are
    min_p_limit = d.min_p > 0.0 ? float(-double(d.temperature) * log(d.min_p)) : kInfinity;
  }
  __device__ void set_max(float x, double) { max = x; }

  static __device__ float distance(float from, float x) { return from - x; }
  // How many octaves a weight is below that of the maximum.
  __device__ float octaves(float x) const { return __fmul_rn(max - x, exponent_scale); }

  // The weight as a fraction of the maximum's.
  __device__ float fraction(float x) const {
    return exp2_approx(max - x <= eligible ? -octaves(x) : -kInfinity);  // a select, no branch
  }
  __device__ float fraction_of_any(float x) const { return exp2_approx(-octaves(x)); }  // all are eligible
  // The least and the most that a weight can be, as a fraction, that many octaves below the maximum. The
  // margin is for what rounding does to octaves and exponentials.
  static constexpr float kMargin = 0x1p-15f;
  __device__ float fraction_at(float octaves) const { return exp2_approx(-octaves); }
  __device__ float least_at(float octaves) const { return exp2_approx(-octaves) * (1.0f - kMargin); }
  __device__ float most_at(float octaves) const { return exp2_approx(-octaves) * (1.0f + kMargin); }
  // How many octaves below the maximum the last eligible weight is.
  __device__ float eligible_octaves() const { return __fmul_rn(eligible, exponent_scale); }
};

struct ProbWeights : FixedPoint {
  static constexpr float kAllEligible = 0.0f;
  static constexpr float kBeyond = 1.125f;       // a float's bits differ from its logarithm by up to 0.09
  static constexpr float exponent_scale = 1.0f;  // distances are octaves

  float max;  // of the row, positive; 1 where that is infinite
  float first_scale,
      second;      // make the largest one a fraction in [0.5, 1): two factors that a float can hold
  float eligible;  // smaller ones weigh nothing
  float min_p_limit;

  __device__ void prepare(const SamplingDraw&, int bits) { set_fraction_bits(bits); }
  __device__ void set_max(float x, double min_p) {
    max = x;
    const ProbScale scale = prob_scale_of(x, 0);
    first_scale = scale.first;
    second = scale.second;
    min_p_limit = min_p > 0.0 ? min_p_floor_of(min_p, x) : 0.0f;
  }

  static __device__ float distance(float from, float x) {
    // -inf is further than any probability, and doesn't overflow.
    return float(__float_as_int(from) - __float_as_int(x)) * 0x1p-23f;
  }
  __device__ float octaves(float x) const { return distance(max, x); }

  __device__ float fraction(float x) const {
    return x >= eligible ? __fmul_rn(__fmul_rn(x, first_scale), second) : 0.0f;
  }
  // The margin is for what rounding does to octaves: relative, and two units in the last place.
  static constexpr float kMargin = 0x1p-15f;
  __device__ float fraction_at(float octaves) const { return at_bits(bits_at(octaves)); }
  __device__ float least_at(float octaves) const {
    return at_bits(::max(bits_at(octaves) - 2, 0)) * (1.0f - kMargin);
  }
  __device__ float most_at(float octaves) const {
    return fminf(at_bits(bits_at(octaves) + 3) * (1.0f + kMargin), 1.0f);
  }
  __device__ float eligible_octaves() const { return eligible > 0.0f ? distance(max, eligible) : kInfinity; }

 private:
  __device__ int32_t bits_at(float octaves) const {
    return ::max(__float_as_int(max) - int32_t(fminf(octaves * 0x1p23f, 0x1p30f)), 0);
  }
  __device__ float at_bits(int32_t bits) const {
    return __fmul_rn(__fmul_rn(__int_as_float(bits), first_scale), second);
  }
};

// Where only the order of finite values counts: they weigh nothing, and what isn't finite lies behind them.
struct NoWeights : FixedPoint {
  float max;   // of the finite values
  float unit;  // octaves in a quarter of a unit

  __device__ void set_range(float largest, float smallest) {
    set_fraction_bits(22);
    max = largest;
    unit = 1.0f / fmaxf(0.25f * largest - 0.25f * smallest, 0x1p-100f);
  }
  static __device__ float distance(float from, float x) { return from - x; }
  // 0 for the largest, 1 for the smallest finite value, infinity for others.
  __device__ float octaves(float x) const {
    // (Rounded alike, so that no difference is negative.)
    const float below = __fadd_rn(__fmul_rn(0.25f, max), -__fmul_rn(0.25f, x));
    return fabsf(x) < kInfinity ? __fmul_rn(below, unit) : kInfinity;
  }
  __device__ float fraction(float) const { return 0.0f; }
};

template <class T>
struct Logits {
  using Value = T;
  using Weights = LogitWeights;
  static constexpr bool kSubtracts = false;
  static constexpr bool kEarly = true;  // bins can be laid out by a sample (fi/cuda/sampling_early.h)
  static constexpr float kNothing = -kInfinity;
  static constexpr float kInfinite = 0.0f;  // +inf counts as this, others as nothing then

  static __device__ float canonical(float x) { return x; }
  static __device__ float checked(float x) { return x; }  // NaN for what can't be
};

template <class T>
struct OrderedLogits : Logits<T> {
  using Weights = NoWeights;
};

struct Probs {
  using Value = float;
  using Weights = ProbWeights;
  static constexpr bool kSubtracts = false;
  static constexpr bool kEarly = false;
  static constexpr float kNothing = 0.0f;
  static constexpr float kInfinite = 1.0f;

  static __device__ float canonical(float x) { return x > 0.0f ? x : -kInfinity; }
  static __device__ float checked(float x) {
    return x > 0.0f ? x : x == 0.0f ? -kInfinity : __uint_as_float(0x7fffffffu);
  }
};

// max(x - other, 0) of two rows.
struct ResidualProbs : Probs {
  static constexpr bool kSubtracts = true;
};

}  // namespace fi::cuda
