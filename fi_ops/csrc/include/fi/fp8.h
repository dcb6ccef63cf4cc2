// The 8-bit float formats of KV caches, one value at a time.
//
// From float: to nearest even, values past the largest (infinities too) to the largest, NaN to NaN. That is
// the GPU's `satfinite` conversion, written out so that every device and ISA level gives the same bytes.
#pragma once

#include "fi/scalar.h"

namespace fi {

// What a cache holds where that is not the dtype of what is written to it.
enum class Fp8 : int32_t { none, e4m3, e5m2 };

// A format with an exponent of 7 - mantissa_bits bits; `largest` and `nan` without the sign bit.
template <int mantissa_bits, int bias, uint8_t largest, uint8_t nan>
FI_INLINE uint8_t to_fp8_bits(float x) {
  constexpr int dropped = 23 - mantissa_bits;
  constexpr uint32_t max_magnitude = (uint32_t{largest} << dropped) + ((127u - bias) << 23);
  constexpr uint32_t least_normal = (128u - bias) << 23;
  // A float whose last bit is the last bit of the format's denormals: the float adder does the rounding.
  constexpr uint32_t magic = (127u + 1 - bias + dropped) << 23;
  const uint32_t bits = float_bits(x), magnitude = bits & 0x7fffffffu;
  const uint32_t denormal = float_bits(bits_float(magnitude) + bits_float(magic)) - magic;
  const uint32_t rounded = magnitude + (1u << (dropped - 1)) - 1 + ((magnitude >> dropped) & 1);
  const uint32_t normal = (rounded >> dropped) - ((127u - bias) << mantissa_bits);
  uint32_t result = magnitude < least_normal ? denormal : normal;
  result = magnitude >= max_magnitude ? uint32_t{largest} : result;
  result = magnitude > 0x7f800000u ? uint32_t{nan} : result;
  return static_cast<uint8_t>(result | (bits >> 24 & 0x80u));
}

FI_INLINE uint8_t to_e4m3(float x) { return to_fp8_bits<3, 7, 0x7e, 0x7f>(x); }
FI_INLINE uint8_t to_e5m2(float x) { return to_fp8_bits<2, 15, 0x7b, 0x7f>(x); }

// Exact. The format's exponent and mantissa, moved into a float's place, are off by a power of two alone;
// what is all ones is infinity or NaN.
template <int mantissa_bits, int bias>
FI_INLINE float from_fp8_bits(uint8_t x) {
  const float magnitude =
      bits_float(static_cast<uint32_t>(x & 0x7f) << (23 - mantissa_bits)) * bits_float((254u - bias) << 23);
  return bits_float(float_bits(magnitude) | static_cast<uint32_t>(x & 0x80) << 24);
}

FI_INLINE float from_e4m3(uint8_t x) {
  return (x & 0x7f) == 0x7f ? bits_float(0x7fc00000u) : from_fp8_bits<3, 7>(x);
}
FI_INLINE float from_e5m2(uint8_t x) {
  if ((x & 0x7c) != 0x7c) return from_fp8_bits<2, 15>(x);
  return bits_float((x & 3 ? 0x7fc00000u : 0x7f800000u) | static_cast<uint32_t>(x & 0x80) << 24);
}

}  // namespace fi
