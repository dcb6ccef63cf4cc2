#include "fi/cuda/decode/cuda_cores.h"
#include "fi/cuda/decode/dtypes.h"
#include "fi/cuda/decode/kernel.h"

namespace fi::cuda::decode {

void on_cuda_cores(const AttentionParams& p, const Gpu& gpu) {
  if (p.dtype == DType::f32) return run_decode<float, CudaCores<float>>(p, gpu);
  if (p.dtype == DType::bf16) return run_decode<bf16, CudaCores<bf16>>(p, gpu);
  run_decode<f16, CudaCores<f16>>(p, gpu);
}

}  // namespace fi::cuda::decode
