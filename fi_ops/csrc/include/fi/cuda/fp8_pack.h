// Values of fp8 caches to pairs of f16, which has room for all of both formats.
#pragma once

#include "fi/cuda/ptx.h"
#include "fi/fp8.h"

namespace fi::cuda {

// Four bytes: the lower two values, the upper two.
template <Fp8 kFormat>
FI_DEVICE_INLINE uint2 widen_fp8(uint32_t bytes) {
  if constexpr (kFormat == Fp8::e5m2) {
    return {__byte_perm(bytes, 0, 0x1404), __byte_perm(bytes, 0, 0x3424)};  // the upper halves of f16
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
