// Attention over a batch: one file a dtype does the work.
#include "fi/cpu/attention_dtypes.h"

namespace fi::FI_ISA {

void batch_attention(const BatchAttentionParams& p, const Parallel& parallel) {
  return p.call.dtype == DType::f32    ? batch_attention_f32(p, parallel)
         : p.call.dtype == DType::bf16 ? batch_attention_bf16(p, parallel)
                                       : batch_attention_f16(p, parallel);
}

}  // namespace fi::FI_ISA
