// The emulated twin of fi/cuda/sm90/warpgroup.h.
#pragma once

#include "fi/cuda/ptx.h"

namespace fi::cuda::sm90 {

inline constexpr int kWarpgroupThreads = 128;

template <int kRegisters>
void raise_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void lower_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void warpgroup_barrier(int id) { emulation::meet_block(id, kWarpgroupThreads, "warpgroup_barrier"); }

inline unsigned thread_now() { return threadIdx.x; }

}  // namespace fi::cuda::sm90
