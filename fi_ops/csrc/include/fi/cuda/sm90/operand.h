// How a product's operands in shared memory are named (fi/cuda/sm90/wgmma.h).
//
// A tile is kept in panels of 64 columns (128 bytes), as TMA writes boxes with a 128-byte swizzle: rows of
// 128 bytes, groups of 8 rows of 1024 bytes, the panel 1024-byte aligned.
//
// - K-major (the product sums along the columns): 16 columns on are 32 bytes on; no stride between panels.
// - MN-major (the product sums along the rows): 16 rows on are 2048 bytes on; a product wider than a panel
//   finds the next `panel_bytes` on.
#pragma once

#include "fi/cuda/ptx.h"

namespace fi::cuda::sm90 {

FI_DEVICE_INLINE uint64_t operand(uint32_t smem, uint32_t panel_bytes) {
  constexpr uint64_t kGroupBytes = 1024, kSwizzle128 = 1;
  return static_cast<uint64_t>((smem & 0x3ffff) >> 4) | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
         (kGroupBytes >> 4) << 32 | kSwizzle128 << 62;
}
FI_DEVICE_INLINE uint64_t k_major(uint32_t smem) { return operand(smem, 16); }
FI_DEVICE_INLINE uint64_t mn_major(uint32_t smem, uint32_t panel_bytes) { return operand(smem, panel_bytes); }
// The same operand, `bytes` further.
FI_DEVICE_INLINE uint64_t at(uint64_t operand, uint32_t bytes) { return operand + (bytes >> 4); }
// In 32 bits: the address is in the lower half, and carries nothing.
FI_DEVICE_INLINE uint64_t at_low(uint64_t operand, uint32_t bytes) {
  return (operand & 0xffffffff00000000) |
         static_cast<uint32_t>(static_cast<uint32_t>(operand) + (bytes >> 4));
}

}  // namespace fi::cuda::sm90
