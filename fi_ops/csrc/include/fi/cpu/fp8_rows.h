// Rows of 8-bit floats to the dtypes that kernels compute with: exact, whatever the processor does with
// denormals, for no operand or result here is one.
#pragma once

#include "fi/cpu/rowops.h"
#include "fi/fp8.h"

namespace fi::FI_ISA {

FI_INLINE VecU load_bytes(const uint8_t* p, int64_t n) {
  typedef uint8_t VecB __attribute__((vector_size(kLanes)));
  VecB x{};
  if (n == kLanes) {
    __builtin_memcpy(&x, p, kLanes);
  } else {
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
  }
  return __builtin_convertvector(x, VecU);
}

// The format's exponent and mantissa in a float's place are off by a power of two; its denormals, written as
// mantissas of its least normal number, are that much too large.
template <int mantissa_bits, int bias>
FI_INLINE VecU widen_magnitude(VecU magnitude) {
  constexpr uint32_t least_normal = (128u - bias) << 23;
  const VecU moved = magnitude << (23 - mantissa_bits);
  const Vec denormal = (Vec)(moved | least_normal) - bits_float(least_normal);
  return magnitude < (1u << mantissa_bits) ? (VecU)denormal : moved + ((127u - bias) << 23);
}

FI_INLINE Vec widen_e4m3(VecU x) {
  const VecU magnitude = x & 0x7fu;
  const VecU y = widen_magnitude<3, 7>(magnitude) | (x & 0x80u) << 24;
  return (Vec)(magnitude == 0x7fu ? VecU{} + 0x7fc00000u : y);
}

FI_INLINE Vec widen_e5m2(VecU x) {
  const VecU magnitude = x & 0x7fu;
  const VecU special = magnitude == 0x7cu ? VecU{} + 0x7f800000u : VecU{} + 0x7fc00000u;
  return (Vec)((magnitude >= 0x7cu ? special : widen_magnitude<2, 15>(magnitude)) | (x & 0x80u) << 24);
}

template <class T>
FI_INLINE void convert_row(T* dst, const uint8_t* src, int64_t n, Fp8 format) {
  for_each_vec(n, [&](int64_t i, int64_t count) {
    const VecU x = load_bytes(src + i, count);
    store_n(dst + i, format == Fp8::e4m3 ? widen_e4m3(x) : widen_e5m2(x), count);
  });
}

}  // namespace fi::FI_ISA
