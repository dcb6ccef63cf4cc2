#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/batch_attention_loop.h"

namespace fi::FI_ISA {

#if FI_ISA_LEVEL >= 4
using Unit = AmxUnit;
#elif FI_ISA_LEVEL == 3
using Unit = Bf16DotUnit;
#else
using Unit = FmaUnit;
#endif

void batch_attention_bf16(const BatchAttentionParams& params, const Parallel& parallel) {
  run_batch_attention<bf16, Unit>(params, parallel);
}

}  // namespace fi::FI_ISA
