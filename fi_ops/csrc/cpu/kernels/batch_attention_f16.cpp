#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/batch_attention_loop.h"

namespace fi::FI_ISA {

void batch_attention_f16(const BatchAttentionParams& params, const Parallel& parallel) {
  run_batch_attention<f16, FmaUnit>(params, parallel);
}

}  // namespace fi::FI_ISA
