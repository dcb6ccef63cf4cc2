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

}  // namespace fi::cuda::sm90
