#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/mla_loop.h"

namespace fi::FI_ISA {

#if FI_ISA_LEVEL >= 4
using Bf16Engine = MlaTiles;
#else
using Bf16Engine = MlaRows<bf16>;
#endif

void mla_bf16(const MlaParams& params, const Parallel& parallel) {
  run_mla<bf16, Bf16Engine>(params, parallel);
}

}  // namespace fi::FI_ISA
