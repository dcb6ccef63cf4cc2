// Where a CUDA kernel runs: what a binding tells a kernel's entry point about the device at hand.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace fi::cuda {

struct Gpu {
  cudaStream_t stream;
  int num_sms;
  int compute_capability;  // of the code that runs: 90 on Hopper where its own was compiled, else 80
  int max_block_smem;      // bytes of shared memory that a block may ask for: 99, 163 or 227 KB
};

// Throws where a call of the runtime failed.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // what failed here must not be reported again by a later launch
  throw std::runtime_error(std::string("fi_ops: CUDA error in ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace fi::cuda
