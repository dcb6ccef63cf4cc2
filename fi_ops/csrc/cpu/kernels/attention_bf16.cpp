#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/attention_loop.h"

namespace fi::FI_ISA {

#if FI_ISA_LEVEL >= 4
using Unit = AmxUnit;
#elif FI_ISA_LEVEL == 3
using Unit = Bf16DotUnit;
#else
using Unit = FmaUnit;
#endif

void attention_bf16(const AttentionParams& params, const Parallel& parallel) {
  run_attention<bf16, Unit>(params, parallel);
}

}  // namespace fi::FI_ISA
