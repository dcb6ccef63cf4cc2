#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/batch_attention_loop.h"

namespace fi::FI_ISA {

void batch_attention_f32(const BatchAttentionParams& params, const Parallel& parallel) {
  run_batch_attention<float, FmaUnit>(params, parallel);
}

}  // namespace fi::FI_ISA
