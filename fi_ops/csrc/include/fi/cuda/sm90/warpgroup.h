// Warpgroups (four warps, 128 threads) with roles: registers moved between them.
#pragma once

#include "fi/cuda/ptx.h"

namespace fi::cuda::sm90 {

inline constexpr int kWarpgroupThreads = 128;

// Raises or lowers the registers a thread of this warpgroup may use; a multiple of 8.
template <int kRegisters>
FI_DEVICE_INLINE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
FI_DEVICE_INLINE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// A barrier of one warpgroup; ids from 1 to 15.
FI_DEVICE_INLINE void warpgroup_barrier(int id) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(kWarpgroupThreads) : "memory");
}

// threadIdx.x, read anew, for what would otherwise be computed once and kept.
FI_DEVICE_INLINE unsigned thread_now() {
  unsigned thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

}  // namespace fi::cuda::sm90
