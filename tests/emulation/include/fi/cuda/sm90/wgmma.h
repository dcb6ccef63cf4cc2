// The emulated twin of fi/cuda/sm90/wgmma.h.
#pragma once

#include "emulation/products.h"
#include "fi/cuda/sm90/operand.h"

namespace fi::cuda::sm90 {

inline void wgmma_fence() { emulation::fence_products(); }
inline void fence_for_products() { emulation::fence_smem_for_products(); }
inline void wgmma_commit() { emulation::commit_products(); }
template <int Pending>
void wgmma_wait() {
  emulation::wait_for_products(Pending);
}

// Products keep the addresses of these: the compiler has them in memory.
template <int N>
void hold(float (&)[N]) {}
template <int N>
void hold(uint32_t (&)[N]) {}

template <int N>
struct Wgmma {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);

  template <class T>
  static constexpr emulation::Element kElement =
      __is_same(T, bf16) ? emulation::Element::bf16 : emulation::Element::f16;

  template <class T>
  static void k_by_k(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    emulation::start_product({N, kElement<T>, kElement<T>, false, false}, {d, nullptr, a, b, accumulate});
  }
  template <class T>
  static void k_by_mn(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    emulation::start_product({N, kElement<T>, kElement<T>, false, true}, {d, nullptr, a, b, accumulate});
  }
  template <class T>
  static void registers_by_k(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
    emulation::start_product({N, kElement<T>, kElement<T>, true, false}, {d, a, 0, b, accumulate});
  }
  template <class T>
  static void registers_by_mn(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
    emulation::start_product({N, kElement<T>, kElement<T>, true, true}, {d, a, 0, b, accumulate});
  }
};

}  // namespace fi::cuda::sm90
