// The emulated twin of fi/cuda/sm90/fp8_wgmma.h. Sums are kept in fp32, better than the hardware does.
#pragma once

#include "fi/cuda/sm90/wgmma.h"
#include "fi/fp8.h"

namespace fi::cuda::sm90 {

template <int N>
struct Fp8Wgmma {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);

  template <Fp8 kFormat>
  static constexpr emulation::Element kElement =
      kFormat == Fp8::e4m3 ? emulation::Element::e4m3 : emulation::Element::e5m2;

  template <Fp8 kFormat>
  static void k_by_k(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    emulation::start_product({N, kElement<kFormat>, kElement<kFormat>, false, false},
                             {d, nullptr, a, b, accumulate});
  }
  template <Fp8 kFormat>
  static void registers_by_k(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
    emulation::start_product({N, kElement<kFormat>, kElement<kFormat>, true, false},
                             {d, a, 0, b, accumulate});
  }
  template <Fp8 kFormat>
  static void weights_by_k(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
    emulation::start_product({N, emulation::Element::e4m3, kElement<kFormat>, true, false},
                             {d, a, 0, b, accumulate});
  }
};

inline uint32_t pack4_e4m3(float a, float b, float c, float d) {
  return uint32_t{to_e4m3(a)} | uint32_t{to_e4m3(b)} << 8 | uint32_t{to_e4m3(c)} << 16 |
         uint32_t{to_e4m3(d)} << 24;
}

}  // namespace fi::cuda::sm90
