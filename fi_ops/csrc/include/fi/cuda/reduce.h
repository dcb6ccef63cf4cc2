// Sums over the threads of a row.
#pragma once

#include "fi/cuda/ptx.h"

namespace fi::cuda {

// The sum of x over the block's threads along x, to all of them. Every thread of the block calls it.
// blockDim.x is a power of two up to 32 (with several rows along y, filling warps), or a multiple of 32 with
// one row a block.
FI_DEVICE_INLINE float sum_along_x(float x) {
  for (int offset = static_cast<int>(blockDim.x < 32 ? blockDim.x : 32) / 2; offset > 0; offset /= 2)
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (blockDim.x <= 32) return x;
  __shared__ float warp_sums[32];
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();  // the sums of a call before this have been read
  if (lane == 0) warp_sums[warp] = x;
  __syncthreads();
  x = lane < blockDim.x / 32 ? warp_sums[lane] : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

}  // namespace fi::cuda
