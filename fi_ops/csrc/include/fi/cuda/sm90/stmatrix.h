// Matrix fragments into shared memory.
#pragma once

#include "fi/cuda/ptx.h"

namespace fi::cuda::sm90 {

// Four 8x8 matrices of 16-bit elements, laid out over the lanes as ldmatrix_x4 gives them; lanes 8i .. 8i+7
// give the row addresses of matrix i.
FI_DEVICE_INLINE void stmatrix_x4(void* row, const uint32_t* r) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(smem_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace fi::cuda::sm90
