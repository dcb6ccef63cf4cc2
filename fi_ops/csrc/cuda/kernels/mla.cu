// Latent attention over a paged cache: the choice of a kernel.
#include "fi/mla.h"

#include "fi/cuda/mla/generic.h"
#ifdef FI_CUDA_SM90A
#  include "fi/cuda/sm90/mla.h"
#endif

namespace fi::cuda {

void mla_paged_attention(const MlaParams& p, const Gpu& gpu) {
  const AttentionParams& c = p.batch.call;
  if (c.qo_len == 0 || c.num_qo_heads == 0) return;
#ifdef FI_CUDA_SM90A
  if (gpu.compute_capability == 90 && sm90_mla_supports(p)) return sm90_mla(p, gpu);
#endif
  mla::on_cuda_cores(p, gpu);
}

}  // namespace fi::cuda
