#include "fi/cuda/decode/cluster_kernel.h"
#include "fi/cuda/decode/dtypes.h"

namespace fi::cuda::decode {

void bf16_128(const AttentionParams& p, const Gpu& gpu) { run_on_tensor_cores<bf16, 128>(p, gpu); }

}  // namespace fi::cuda::decode
