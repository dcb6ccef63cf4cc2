#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/mla_loop.h"

namespace fi::FI_ISA {

void mla_bf16(const MlaParams& params, const Parallel& parallel) {
  run_mla<bf16, Bf16Unit>(params, parallel);
}

}  // namespace fi::FI_ISA
