// The attention family's entry: one file a dtype does the work.
#include "fi/cpu/attention_dtypes.h"

namespace fi::FI_ISA {

void attention(const AttentionParams& params, const Parallel& parallel) {
  return params.dtype == DType::f32    ? attention_f32(params, parallel)
         : params.dtype == DType::bf16 ? attention_bf16(params, parallel)
                                       : attention_f16(params, parallel);
}

}  // namespace fi::FI_ISA
