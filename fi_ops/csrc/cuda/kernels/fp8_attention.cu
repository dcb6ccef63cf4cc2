// Attention of 8-bit tensors: Hopper's products of 8 bits, or all of them widened for the other kernels.
#include "fi/fp8_attention.h"

#include "fi/widen_fp8.h"
#ifdef FI_CUDA_SM90A
#  include "fi/cuda/sm90/fp8_attention.h"
#endif

namespace fi::cuda {

void fp8_attention(const Fp8AttentionParams& p, const Gpu& gpu) {
  if (p.call.batch == 0 || p.call.num_qo_heads == 0 || p.call.qo_len == 0) return;
#ifdef FI_CUDA_SM90A
  if (gpu.compute_capability == 90 && sm90_fp8_supports(p)) return fp8_attention_sm90(p, gpu);
#endif
  attention(widened(p, [&](const WidenFp8Params& tensor) { widen_fp8(tensor, gpu); }), gpu);
}

}  // namespace fi::cuda
