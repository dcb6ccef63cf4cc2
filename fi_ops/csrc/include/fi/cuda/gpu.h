// Where a CUDA kernel runs: what a binding tells a kernel's entry point about the device at hand.
#pragma once

#include <cuda_runtime_api.h>

namespace fi::cuda {

struct Gpu {
  cudaStream_t stream;
  int num_sms;
  int compute_capability;  // 10 * major + minor: 90 for Hopper
};

}  // namespace fi::cuda
