// Values of fp8 caches to pairs of f16, which has room for all of both formats.
#pragma once

#include "fi/cuda/ptx.h"
#include "fi/fp8.h"

namespace fi::cuda {

// The two lowest bytes of `raw`.
FI_DEVICE_INLINE uint32_t widen_fp8_pair(uint32_t raw, Fp8 format) {
  // e5m2 is the upper half of f16.
  if (format == Fp8::e5m2) return (raw & 0xffu) << 8 | (raw & 0xff00u) << 16;
#if __CUDA_ARCH__ >= 900
  uint32_t halves;
  asm("{.reg .b16 pair; cvt.u16.u32 pair, %1; cvt.rn.f16x2.e4m3x2 %0, pair;}\n" : "=r"(halves) : "r"(raw));
  return halves;
#else
  return pack2<f16>(from_e4m3(static_cast<uint8_t>(raw)), from_e4m3(static_cast<uint8_t>(raw >> 8)));
#endif
}

}  // namespace fi::cuda
