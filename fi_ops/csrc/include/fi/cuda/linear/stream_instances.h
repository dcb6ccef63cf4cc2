// The streaming kernel's instances for a storage type.
#pragma once

#include "fi/cuda/linear/linear.h"
#include "fi/cuda/linear/stream_kernel.h"

namespace fi::cuda {

template <class T, int Rows>
void linear_stream_of_rows(const LinearParams& p, const Gpu& gpu) {
  // Room for two blocks on an SM where it has 227 KB: this kernel's and the next one's. Else what fits.
  using Wide = LinearStream<T, Rows, 6>;
  using Narrow = LinearStream<T, Rows, 4>;
  if (gpu.max_block_smem >= static_cast<int>(sizeof(typename Wide::Smem)))
    return launch_linear_stream<Wide>(p, gpu);
  launch_linear_stream<Narrow>(p, gpu);
}

template <class T>
void linear_stream(const LinearParams& p, const Gpu& gpu) {
  if (p.input_rows.num_rows <= 8) return linear_stream_of_rows<T, 8>(p, gpu);
  linear_stream_of_rows<T, 16>(p, gpu);
}

}  // namespace fi::cuda
