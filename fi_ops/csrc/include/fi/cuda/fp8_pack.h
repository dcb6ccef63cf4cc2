// Values of fp8 caches to pairs of 16-bit ones, exactly.
#pragma once

#include "fi/cuda/ptx.h"
#include "fi/fp8.h"

namespace fi::cuda {

// The two lowest bytes of `raw`.
template <class T>
FI_DEVICE_INLINE uint32_t widen_fp8_pair(uint32_t raw, Fp8 format) {
#if __CUDA_ARCH__ >= 900
  uint32_t halves;
  if (format == Fp8::e4m3) {
    asm("{.reg .b16 pair; cvt.u16.u32 pair, %1; cvt.rn.f16x2.e4m3x2 %0, pair;}\n" : "=r"(halves) : "r"(raw));
  } else {
    halves = __byte_perm(raw, 0, 0x1404);  // e5m2 is the upper half of f16
  }
  if constexpr (__is_same(T, f16)) return halves;
  const float2 two = unpack2<f16>(halves);
  return pack2<T>(two.x, two.y);
#else
  const uint8_t low = static_cast<uint8_t>(raw), high = static_cast<uint8_t>(raw >> 8);
  return format == Fp8::e4m3 ? pack2<T>(from_e4m3(low), from_e4m3(high))
                             : pack2<T>(from_e5m2(low), from_e5m2(high));
#endif
}

// Eight values.
template <class T>
FI_DEVICE_INLINE uint4 widen_fp8(uint32_t first, uint32_t second, Fp8 format) {
  return {widen_fp8_pair<T>(first, format), widen_fp8_pair<T>(first >> 16, format),
          widen_fp8_pair<T>(second, format), widen_fp8_pair<T>(second >> 16, format)};
}

}  // namespace fi::cuda
