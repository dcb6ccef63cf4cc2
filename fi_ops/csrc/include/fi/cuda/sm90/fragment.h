// What a thread of a warpgroup holds of 64 rows (fi/cuda/sm90/wgmma.h has the layout): ways in and out.
#pragma once

#include "fi/cuda/attention_rows.h"

namespace fi::cuda::sm90 {

// A warp's 16 rows of an operand in panels of 128 bytes a row, as steps of operand a in registers. `row`: the
// one that this lane gives the address of, warp's first + lane % 16.
template <int kSteps>
FI_DEVICE_INLINE void load_operand(uint32_t* to, const unsigned char* panels, int panel_bytes, int row,
                                   int lane) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int chunk = (step % 4 * 2 + lane / 16) ^ (row % 8);  // the swizzle
    uint32_t x[4];
    ldmatrix_x4(x, panels + step / 4 * panel_bytes + row * 128 + chunk * 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[4 * step + i] = x[i];
  }
}

// Of a row of up to 128 bits, 32 a lane of a quad in their order, the lane's in the order of a product's
// fragment: bit 2j + e is column 8j + lane % 4 * 2 + e.
FI_DEVICE_INLINE uint32_t in_fragment_order(uint32_t bits, int lane) {
  // Pair i of byte j becomes pair j of byte i: what lane i of the quad wants.
  const auto swap = [&](int distance, uint32_t low) {
    const uint32_t differ = (bits ^ bits >> distance) & low;
    bits ^= differ ^ differ << distance;
  };
  swap(6, 0x00cc00cc);
  swap(12, 0x0000f0f0);
  // Byte i of lane j becomes byte j of lane i.
  bits = __byte_perm(bits, __shfl_xor_sync(kAllLanes, bits, 1), lane & 1 ? 0x3715 : 0x6240);
  return __byte_perm(bits, __shfl_xor_sync(kAllLanes, bits, 2), lane & 2 ? 0x3276 : 0x5410);
}

// Four lanes exchange their words so that each has 16 contiguous bytes: of blocks 4i .. 4i+3 of 8 columns,
// lane t of a quad gets all of block 4i + t.
FI_DEVICE_INLINE void gather_quad(uint32_t (&w)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? w[i] : w[i + bit], bit);
      (upper ? w[i] : w[i + bit]) = other;
    }
  }
}

}  // namespace fi::cuda::sm90
