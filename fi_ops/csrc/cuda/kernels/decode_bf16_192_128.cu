#include "fi/cuda/decode/cluster_kernel.h"
#include "fi/cuda/decode/dtypes.h"

namespace fi::cuda::decode {

void bf16_192_128(const AttentionParams& p, const AppendParams* append, const Gpu& gpu) {
  run_on_tensor_cores<bf16, 192, 128>(p, append, gpu);
}

}  // namespace fi::cuda::decode
