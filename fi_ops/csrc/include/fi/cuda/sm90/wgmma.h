// Warpgroup matrix products: d (64 x N, fp32, in registers) += a (64 x 16) * b (16 x N), of bf16 or f16.
//
// Thread 32w + 4g + t of the warpgroup holds in d[4j .. 4j+3] columns 8j + 2t and 8j + 2t + 1 of row 16w + g,
// then of row 16w + g + 8; as operand a in registers: (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..), so
// that columns 16k .. 16k+15 of a product, packed in pairs in the order of d, are step k of the next one's a.
//
// The products run asynchronously. Registers they read or write may be touched only after wgmma_wait, and
// what is written before needs wgmma_fence before the first product; the compiler knows neither, so hold()
// pins the registers on both sides.
#pragma once

#include "fi/cuda/sm90/operand.h"

namespace fi::cuda::sm90 {

// Orders this warp's register accesses before the products that follow.
FI_DEVICE_INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
// Makes what this thread stored in shared memory visible to products that start after a barrier.
FI_DEVICE_INLINE void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }
// Closes a group: the products issued since the last one.
FI_DEVICE_INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Waits until at most `Pending` groups are in flight.
template <int Pending>
FI_DEVICE_INLINE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}

// No access to these registers moves across this point.
template <int N>
FI_DEVICE_INLINE void hold(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N>
FI_DEVICE_INLINE void hold(uint32_t (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

// ---- products ----

// Products N columns wide. The accumulator is replaced where `accumulate` is false.
template <int N>
struct Wgmma;

#define FI_WGMMA_TEXT_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FI_WGMMA_TEXT_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define FI_WGMMA_TEXT_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define FI_WGMMA_TEXT_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define FI_WGMMA_TEXT_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define FI_WGMMA_TEXT_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define FI_WGMMA_TEXT_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define FI_WGMMA_TEXT_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define FI_WGMMA_TEXT_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define FI_WGMMA_TEXT_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define FI_WGMMA_TEXT_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define FI_WGMMA_TEXT_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define FI_WGMMA_TEXT_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define FI_WGMMA_TEXT_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define FI_WGMMA_TEXT_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define FI_WGMMA_TEXT_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define FI_WGMMA_8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FI_WGMMA_TEXT_OF_64 FI_WGMMA_TEXT_0 ", " FI_WGMMA_TEXT_1 ", " FI_WGMMA_TEXT_2 ", " FI_WGMMA_TEXT_3
#define FI_WGMMA_REGISTERS_OF_64 FI_WGMMA_8(0), FI_WGMMA_8(8), FI_WGMMA_8(16), FI_WGMMA_8(24)
#define FI_WGMMA_TEXT_OF_80 FI_WGMMA_TEXT_OF_64 ", " FI_WGMMA_TEXT_4
#define FI_WGMMA_REGISTERS_OF_80 FI_WGMMA_REGISTERS_OF_64, FI_WGMMA_8(32)
#define FI_WGMMA_TEXT_OF_96 FI_WGMMA_TEXT_OF_80 ", " FI_WGMMA_TEXT_5
#define FI_WGMMA_REGISTERS_OF_96 FI_WGMMA_REGISTERS_OF_80, FI_WGMMA_8(40)
#define FI_WGMMA_TEXT_OF_112 FI_WGMMA_TEXT_OF_96 ", " FI_WGMMA_TEXT_6
#define FI_WGMMA_REGISTERS_OF_112 FI_WGMMA_REGISTERS_OF_96, FI_WGMMA_8(48)
#define FI_WGMMA_TEXT_OF_128 FI_WGMMA_TEXT_OF_112 ", " FI_WGMMA_TEXT_7
#define FI_WGMMA_REGISTERS_OF_128 FI_WGMMA_REGISTERS_OF_112, FI_WGMMA_8(56)
#define FI_WGMMA_TEXT_OF_256                                                                                 \
  FI_WGMMA_TEXT_OF_128 ", " FI_WGMMA_TEXT_8 ", " FI_WGMMA_TEXT_9 ", " FI_WGMMA_TEXT_10 ", " FI_WGMMA_TEXT_11 \
                       ", " FI_WGMMA_TEXT_12 ", " FI_WGMMA_TEXT_13 ", " FI_WGMMA_TEXT_14                     \
                       ", " FI_WGMMA_TEXT_15
#define FI_WGMMA_REGISTERS_OF_256                                                                            \
  FI_WGMMA_REGISTERS_OF_128, FI_WGMMA_8(64), FI_WGMMA_8(72), FI_WGMMA_8(80), FI_WGMMA_8(88), FI_WGMMA_8(96), \
      FI_WGMMA_8(104), FI_WGMMA_8(112), FI_WGMMA_8(120)

// A product's operands are its N / 2 accumulators, then r0 to r5: as many as it has.
#define FI_WGMMA_ISSUE_SS(N, TYPE, TRANS, r0, r1, r2)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " r2                                                    \
               ", 0;\n"                                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FI_WGMMA_TEXT_OF_##N \
               "}, " r0 ", " r1 ", p, 1, 1, 0, " TRANS ";\n}\n"                                          \
               : FI_WGMMA_REGISTERS_OF_##N                                                               \
               : "l"(a), "l"(b), "r"(int{accumulate}))
#define FI_WGMMA_ISSUE_RS(N, TYPE, TRANS, r0, r1, r2, r3, r4, r5)                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " r5                                                    \
               ", 0;\n"                                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FI_WGMMA_TEXT_OF_##N \
               "}, "                                                                                     \
               "{" r0 ", " r1 ", " r2 ", " r3 "}, " r4 ", p, 1, 1, " TRANS ";\n}\n"                      \
               : FI_WGMMA_REGISTERS_OF_##N                                                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}))
#define FI_WGMMA(N, r0, r1, r2, r3, r4, r5)                                                            \
  template <>                                                                                          \
  struct Wgmma<N> {                                                                                    \
    /* a K-major, b K-major (b's rows are the product's columns). */                                   \
    template <class T>                                                                                 \
    FI_DEVICE_INLINE static void k_by_k(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {  \
      if constexpr (__is_same(T, bf16)) {                                                              \
        FI_WGMMA_ISSUE_SS(N, "bf16", "0", r0, r1, r2);                                                 \
      } else {                                                                                         \
        FI_WGMMA_ISSUE_SS(N, "f16", "0", r0, r1, r2);                                                  \
      }                                                                                                \
    }                                                                                                  \
    /* a K-major, b MN-major (b's columns are the product's). */                                       \
    template <class T>                                                                                 \
    FI_DEVICE_INLINE static void k_by_mn(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
      if constexpr (__is_same(T, bf16)) {                                                              \
        FI_WGMMA_ISSUE_SS(N, "bf16", "1", r0, r1, r2);                                                 \
      } else {                                                                                         \
        FI_WGMMA_ISSUE_SS(N, "f16", "1", r0, r1, r2);                                                  \
      }                                                                                                \
    }                                                                                                  \
    /* a in registers, b K-major. */                                                                   \
    template <class T>                                                                                 \
    FI_DEVICE_INLINE static void registers_by_k(float (&d)[N / 2], const uint32_t* a, uint64_t b,      \
                                                bool accumulate) {                                     \
      if constexpr (__is_same(T, bf16)) {                                                              \
        FI_WGMMA_ISSUE_RS(N, "bf16", "0", r0, r1, r2, r3, r4, r5);                                     \
      } else {                                                                                         \
        FI_WGMMA_ISSUE_RS(N, "f16", "0", r0, r1, r2, r3, r4, r5);                                      \
      }                                                                                                \
    }                                                                                                  \
    /* a in registers, b MN-major (b's columns are the product's). */                                  \
    template <class T>                                                                                 \
    FI_DEVICE_INLINE static void registers_by_mn(float (&d)[N / 2], const uint32_t* a, uint64_t b,     \
                                                 bool accumulate) {                                    \
      if constexpr (__is_same(T, bf16)) {                                                              \
        FI_WGMMA_ISSUE_RS(N, "bf16", "1", r0, r1, r2, r3, r4, r5);                                     \
      } else {                                                                                         \
        FI_WGMMA_ISSUE_RS(N, "f16", "1", r0, r1, r2, r3, r4, r5);                                      \
      }                                                                                                \
    }                                                                                                  \
  };

FI_WGMMA(64, "%32", "%33", "%34", "%35", "%36", "%37")
FI_WGMMA(80, "%40", "%41", "%42", "%43", "%44", "%45")
FI_WGMMA(96, "%48", "%49", "%50", "%51", "%52", "%53")
FI_WGMMA(112, "%56", "%57", "%58", "%59", "%60", "%61")
FI_WGMMA(128, "%64", "%65", "%66", "%67", "%68", "%69")
FI_WGMMA(256, "%128", "%129", "%130", "%131", "%132", "%133")

#undef FI_WGMMA
#undef FI_WGMMA_ISSUE_SS
#undef FI_WGMMA_ISSUE_RS

}  // namespace fi::cuda::sm90
