#include "fi/cuda/decode/dtypes.h"
#include "fi/cuda/decode/kernel.h"
#include "fi/cuda/decode/tensor_cores.h"

namespace fi::cuda::decode {

void bf16_256(const AttentionParams& p, const Gpu& gpu) { run_decode<bf16, TensorCores<bf16, 256>>(p, gpu); }

}  // namespace fi::cuda::decode
