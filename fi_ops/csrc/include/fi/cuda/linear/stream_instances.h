// The streaming kernel's instances for a storage type.
#pragma once

#include "fi/cuda/linear/linear.h"
#include "fi/cuda/linear/stream_kernel.h"

namespace fi::cuda {

template <class T, int Rows>
void linear_stream_of_rows(const LinearParams& p, const Gpu& gpu) {
  using Deep = LinearStream<T, Rows, 8>;     // 144 KB: sm_80, sm_90
  using Shallow = LinearStream<T, Rows, 4>;  // 80 KB: sm_86, sm_89, sm_120
  if (gpu.max_block_smem >= static_cast<int>(sizeof(typename Deep::Smem)))
    return launch_linear_stream<Deep>(p, gpu);
  launch_linear_stream<Shallow>(p, gpu);
}

template <class T>
void linear_stream(const LinearParams& p, const Gpu& gpu) {
  if (p.input_rows.num_rows <= 8) return linear_stream_of_rows<T, 8>(p, gpu);
  linear_stream_of_rows<T, 16>(p, gpu);
}

}  // namespace fi::cuda
