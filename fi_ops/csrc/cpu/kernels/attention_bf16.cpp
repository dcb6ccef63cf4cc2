#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/dense_attention_loop.h"

namespace fi::FI_ISA {

void attention_bf16(const AttentionParams& params, const Parallel& parallel) {
  run_attention<bf16, Bf16Unit>(params, parallel);
}

}  // namespace fi::FI_ISA
