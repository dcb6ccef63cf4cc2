// Latent attention: one file a dtype does the work.
#include "fi/cpu/attention_dtypes.h"

namespace fi::FI_ISA {

void mla_paged_attention(const MlaParams& p, const Parallel& parallel) {
  const DType dtype = p.batch.call.dtype;
  return dtype == DType::f32    ? mla_f32(p, parallel)
         : dtype == DType::bf16 ? mla_bf16(p, parallel)
                                : mla_f16(p, parallel);
}

}  // namespace fi::FI_ISA
