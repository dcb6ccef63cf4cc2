// The emulated twin of fi/cuda/sm90/stmatrix.h.
#pragma once

#include "fi/cuda/ptx.h"

namespace fi::cuda::sm90 {

inline void stmatrix_x4(void* row, const uint32_t* r) {
  require_aligned(row, 16, "stmatrix_x4");
  const auto* slots = emulation::meet_warp(0xffffffffu, "stmatrix_x4", &row, sizeof(row));
  const int lane = emulation::current().lane;
  for (int matrix = 0; matrix < 4; ++matrix) {
    unsigned char* to;
    std::memcpy(&to, slots[8 * matrix + lane / 4], sizeof(to));
    std::memcpy(to + lane % 4 * 4, &r[matrix], 4);
  }
  __syncwarp();  // the instruction is one step for a warp
}

}  // namespace fi::cuda::sm90
