#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/batch_attention_loop.h"

namespace fi::FI_ISA {

void batch_attention_bf16(const BatchAttentionParams& params, const Parallel& parallel) {
  run_batch_attention<bf16, Bf16Unit>(params, parallel);
}

}  // namespace fi::FI_ISA
