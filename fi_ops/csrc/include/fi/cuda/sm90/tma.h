// The copy engine: boxes of a tensor, named by a tensor map (fi/cuda/sm90/tensor_map.h), into shared memory.
#pragma once

#include <cuda.h>

#include "fi/cuda/sm90/mbarrier.h"

namespace fi::cuda::sm90 {

FI_DEVICE_INLINE void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// The box at (x, y, z, w), innermost first; elements outside of the tensor arrive as zeros and count as
// bytes. `smem` is 1024-byte aligned for boxes with a 128-byte swizzle.
FI_DEVICE_INLINE void load_box(void* smem, const CUtensorMap& map, int x, int y, int z, int w,
                               Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(smem_address(smem)),
      "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

}  // namespace fi::cuda::sm90
