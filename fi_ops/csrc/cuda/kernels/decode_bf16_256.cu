#include "fi/cuda/decode/cluster_kernel.h"
#include "fi/cuda/decode/dtypes.h"

namespace fi::cuda::decode {

void bf16_256(const AttentionParams& p, const Gpu& gpu) { run_on_tensor_cores<bf16, 256>(p, gpu); }

}  // namespace fi::cuda::decode
