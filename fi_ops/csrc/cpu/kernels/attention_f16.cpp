#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/dense_attention_loop.h"

namespace fi::FI_ISA {

void attention_f16(const AttentionParams& params, const Parallel& parallel) {
  run_attention<f16, FmaUnit>(params, parallel);
}

}  // namespace fi::FI_ISA
