// How samplers order and weigh tokens, on every device.
//
// Tokens are ordered larger first, lower id first among equals. Weights are exp((logit - max) / temperature),
// or probabilities times a power of two, as integers (fixed point), so that sums are exact: their order
// doesn't matter.
#pragma once

#include <math.h>

#include "fi/scalar.h"

namespace fi {

// Order-preserving bits of a logit, inverted: a smaller key comes first. -0 must have been made +0.
FI_INLINE uint32_t order_key(float x) {
  const uint32_t bits = float_bits(x);
  return ~(bits & 0x80000000u ? ~bits : bits | 0x80000000u);
}

FI_INLINE float key_logit(uint32_t key) {
  const uint32_t mono = ~key;
  return bits_float(mono & 0x80000000u ? mono & 0x7fffffffu : ~mono);
}

// The fraction bits of a weight: the sum of n weights of at most 2^bits stays at most 2^62.
FI_INLINE int weight_fraction_bits(int64_t n) {
  int bits = 62;
  for (uint64_t reach = 1; reach < uint64_t(n); reach *= 2) --bits;
  return bits;
}

// log2(e) / temperature, within the normal floats, so that 0 * scale and inf * scale are no NaN.
FI_INLINE float exponent_scale_of(float temperature) {
  const double scale = 1.4426950408889634 / double(temperature);
  return float(scale > 0x1p127 ? 0x1p127 : scale < 0x1p-126 ? 0x1p-126 : scale);
}

// Likewise for probabilities: no more than every device can sum, so that all have the same weights.
FI_INLINE int prob_fraction_bits(int64_t n) {
  const int bits = weight_fraction_bits(n);
  return bits < 45 ? bits : 45;
}

// What makes probabilities of at most `max` (> 0, finite) weights below 2^fraction_bits: a power of two, so
// that only digits under 1 are lost, on every device the same. In two factors, either of which a float can
// hold.
struct ProbScale {
  float first, second;
};
FI_INLINE ProbScale prob_scale_of(float max, int fraction_bits) {
  int exponent = 0;
  frexpf(max, &exponent);
  const int shift = fraction_bits - exponent;
  return {ldexpf(1.0f, shift / 2), ldexpf(1.0f, shift - shift / 2)};
}

// The smallest probability that min_p keeps beside `max`.
FI_INLINE float min_p_floor_of(double min_p, float max) {
  const double limit = min_p * double(max);
  const float floor = float(limit);
  return double(floor) < limit ? bits_float(float_bits(floor) + 1) : floor;
}

// The weight that a prefix must reach, for top_p in (0, 1).
FI_INLINE int64_t mass_target(double top_p, int64_t mass) {
  const int64_t target = int64_t(__builtin_ceil(top_p * double(mass)));
  return target < 1 ? 1 : target > mass ? mass : target;
}

// floor(uniform * total), for uniform in [0, 1); a cumulative integer weight exceeds uniform * total exactly
// if it exceeds this.
FI_INLINE int64_t draw_target(int64_t total, float uniform) {
  const uint64_t fraction = uint64_t(double(uniform) * 0x1p63);
  return int64_t((static_cast<unsigned __int128>(uint64_t(total)) * fraction) >> 63);
}

}  // namespace fi
