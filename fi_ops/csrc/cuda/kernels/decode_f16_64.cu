#include "fi/cuda/decode/dtypes.h"
#include "fi/cuda/decode/kernel.h"
#include "fi/cuda/decode/tensor_cores.h"

namespace fi::cuda::decode {

void f16_64(const AttentionParams& p, const Gpu& gpu) { run_decode<f16, TensorCores<f16, 64>>(p, gpu); }

}  // namespace fi::cuda::decode
