// fp8 to the 16-bit types, exactly: eight at a time to what the call has, or four to f16.
#pragma once

#include "fi/cuda/ptx.h"
#include "fi/fp8.h"

namespace fi::cuda {

// Each of four bytes as the upper half of 16 bits: bytes 0 and 1, bytes 2 and 3.
FI_DEVICE_INLINE uint2 spread_bytes(uint32_t x) {
  return {__byte_perm(x, 0, 0x1404), __byte_perm(x, 0, 0x3424)};
}

// Two e4m3 in the upper halves of 16 bits, neither NaN: exponent and mantissa, moved to where T has them, are
// off by a power of two alone.
template <class T>
FI_DEVICE_INLINE uint32_t widen_e4m3(uint32_t two) {
  constexpr bool is_bf16 = __is_same(T, bf16);
  constexpr uint32_t factor = is_bf16 ? 0x7b807b80u : 0x5c005c00u;  // 2^120, 2^8
  const uint32_t magnitudes = (two & 0x7f007f00u) >> (is_bf16 ? 4 : 1);
  return multiply2<T>(magnitudes | (two & 0x80008000u), factor);
}

// Two e5m2 in the upper halves of 16 bits: they are halves.
template <class T>
FI_DEVICE_INLINE uint32_t widen_e5m2(uint32_t two) {
  if constexpr (__is_same(T, f16)) {
    return two;
  } else {
    const float2 values = unpack2<f16>(two);
    return pack2<T>(values.x, values.y);
  }
}

template <class T>
FI_DEVICE_INLINE uint4 widen_fp8(uint2 x, Fp8 format) {
  const uint2 low = spread_bytes(x.x), high = spread_bytes(x.y);
  if (format == Fp8::e5m2)
    return {widen_e5m2<T>(low.x), widen_e5m2<T>(low.y), widen_e5m2<T>(high.x), widen_e5m2<T>(high.y)};
  uint4 y{widen_e4m3<T>(low.x), widen_e4m3<T>(low.y), widen_e4m3<T>(high.x), widen_e4m3<T>(high.y)};
  auto nans = [](uint32_t bytes) { return ((bytes & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u; };
  if (nans(x.x) | nans(x.y)) {
    auto mark = [](uint32_t& pair, uint32_t two) {
      const uint32_t nan = ((two & 0x7f007f00u) + 0x01000100u) & 0x80008000u;
      pair |= nan - (nan >> 15);
    };
    mark(y.x, low.x), mark(y.y, low.y), mark(y.z, high.x), mark(y.w, high.y);
  }
  return y;
}

// Four bytes as pairs of f16, which has room for all of both formats: the lower two values, the upper two.
template <Fp8 kFormat>
FI_DEVICE_INLINE uint2 widen_fp8(uint32_t bytes) {
  if constexpr (kFormat == Fp8::e5m2) {
    return spread_bytes(bytes);  // the upper halves of f16
  } else {
#if __CUDA_ARCH__ >= 900
    uint2 pairs;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}\n"
        : "=r"(pairs.x), "=r"(pairs.y)
        : "r"(bytes));
    return pairs;
#else
    const auto value = [&](int n) { return from_e4m3(static_cast<uint8_t>(bytes >> 8 * n)); };
    return {pack2<f16>(value(0), value(1)), pack2<f16>(value(2), value(3))};
#endif
  }
}

}  // namespace fi::cuda
