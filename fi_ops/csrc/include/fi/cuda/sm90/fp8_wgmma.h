// Warpgroup matrix products of 8-bit floats: d (64 x N, fp32, in registers) += a (64 x 32) * b (32 x N).
//
// As the products of 16 bits (fi/cuda/sm90/wgmma.h), bytes for bytes, but b is K-major always. Operand a in
// registers: thread 32w + 4g + t of the warpgroup has columns 4t .. 4t+3 of row 16w + g, the same of row 16w
// + g + 8, then columns 16 + 4t .. of both.
//
// Sums are kept to about 14 bits while a product runs: each step of 32 loses what lies 13 bits or so below
// the largest of its terms and of the accumulator, always toward zero.
#pragma once

#include "fi/cuda/sm90/wgmma.h"
#include "fi/fp8.h"

namespace fi::cuda::sm90 {

template <int N>
struct Fp8Wgmma;

// A product's operands are its N / 2 accumulators, then r0 to r5: as many as it has.
#define FI_QGMMA_ISSUE_SS(N, A, B, r0, r1, r2)                                                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " r2                                              \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." A "." B " {" FI_WGMMA_TEXT_OF_##N \
               "}, " r0 ", " r1 ", p, 1, 1;\n}\n"                                                  \
               : FI_WGMMA_REGISTERS_OF_##N                                                         \
               : "l"(a), "l"(b), "r"(int{accumulate}))
#define FI_QGMMA_ISSUE_RS(N, A, B, r0, r1, r2, r3, r4, r5)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " r5                                              \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32." A "." B " {" FI_WGMMA_TEXT_OF_##N \
               "}, "                                                                               \
               "{" r0 ", " r1 ", " r2 ", " r3 "}, " r4 ", p, 1, 1;\n}\n"                           \
               : FI_WGMMA_REGISTERS_OF_##N                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}))
#define FI_QGMMA(N, r0, r1, r2, r3, r4, r5)                                                           \
  template <>                                                                                         \
  struct Fp8Wgmma<N> {                                                                                \
    /* a in shared memory. */                                                                         \
    template <Fp8 kFormat>                                                                            \
    FI_DEVICE_INLINE static void k_by_k(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
      if constexpr (kFormat == Fp8::e4m3) {                                                           \
        FI_QGMMA_ISSUE_SS(N, "e4m3", "e4m3", r0, r1, r2);                                             \
      } else {                                                                                        \
        FI_QGMMA_ISSUE_SS(N, "e5m2", "e5m2", r0, r1, r2);                                             \
      }                                                                                               \
    }                                                                                                 \
    template <Fp8 kFormat>                                                                            \
    FI_DEVICE_INLINE static void registers_by_k(float (&d)[N / 2], const uint32_t* a, uint64_t b,     \
                                                bool accumulate) {                                    \
      if constexpr (kFormat == Fp8::e4m3) {                                                           \
        FI_QGMMA_ISSUE_RS(N, "e4m3", "e4m3", r0, r1, r2, r3, r4, r5);                                 \
      } else {                                                                                        \
        FI_QGMMA_ISSUE_RS(N, "e5m2", "e5m2", r0, r1, r2, r3, r4, r5);                                 \
      }                                                                                               \
    }                                                                                                 \
    /* a in registers, e4m3 whatever b is: what weights are rounded to. */                            \
    template <Fp8 kFormat>                                                                            \
    FI_DEVICE_INLINE static void weights_by_k(float (&d)[N / 2], const uint32_t* a, uint64_t b,       \
                                              bool accumulate) {                                      \
      if constexpr (kFormat == Fp8::e4m3) {                                                           \
        FI_QGMMA_ISSUE_RS(N, "e4m3", "e4m3", r0, r1, r2, r3, r4, r5);                                 \
      } else {                                                                                        \
        FI_QGMMA_ISSUE_RS(N, "e4m3", "e5m2", r0, r1, r2, r3, r4, r5);                                 \
      }                                                                                               \
    }                                                                                                 \
  };

FI_QGMMA(64, "%32", "%33", "%34", "%35", "%36", "%37")
FI_QGMMA(128, "%64", "%65", "%66", "%67", "%68", "%69")

#undef FI_QGMMA
#undef FI_QGMMA_ISSUE_SS
#undef FI_QGMMA_ISSUE_RS

// Four values to e4m3, the first in the lowest byte; what is too large becomes the largest.
FI_DEVICE_INLINE uint32_t pack4_e4m3(float a, float b, float c, float d) {
  uint32_t r;
  asm("{.reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1; cvt.rn.satfinite.e4m3x2.f32 h, %4, %3; "
      "mov.b32 %0, {l, h};}\n"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

}  // namespace fi::cuda::sm90
