// Barriers in shared memory that count arrivals and the bytes of asynchronous copies.
//
// Compiled with FI_BOUNDED_WAITS, a wait that lasts for seconds traps instead of hanging the GPU: for
// developing kernels.
#pragma once

#include "fi/cuda/ptx.h"

namespace fi::cuda::sm90 {

using Barrier = uint64_t;

FI_DEVICE_INLINE void barrier_init(Barrier& barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_address(&barrier)), "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to the copy engine; before the block's __syncthreads.
FI_DEVICE_INLINE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

FI_DEVICE_INLINE void barrier_arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(smem_address(&barrier)) : "memory");
}
// Arrives once all cp.async copies that this thread has started are there.
FI_DEVICE_INLINE void barrier_arrive_after_copies(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];\n" ::"r"(smem_address(&barrier))
               : "memory");
}
// Arrives, and has the phase wait for `bytes` more of copies too.
FI_DEVICE_INLINE void barrier_arrive_expect(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(smem_address(&barrier)),
               "r"(bytes)
               : "memory");
}

// Whether the phase of that parity is over (it may sleep a while before it says no).
FI_DEVICE_INLINE bool barrier_try_wait(Barrier& barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(done)
      : "r"(smem_address(&barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

FI_DEVICE_INLINE void barrier_wait(Barrier& barrier, uint32_t parity) {
#ifdef FI_BOUNDED_WAITS
  if (barrier_try_wait(barrier, parity)) return;
  const long long start = clock64();
  while (!barrier_try_wait(barrier, parity))
    if (clock64() - start > 4'000'000'000) __trap();
#else
  while (!barrier_try_wait(barrier, parity)) {
  }
#endif
}

}  // namespace fi::cuda::sm90
