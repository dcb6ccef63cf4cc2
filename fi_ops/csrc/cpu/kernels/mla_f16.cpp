#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/mla_loop.h"

namespace fi::FI_ISA {

void mla_f16(const MlaParams& params, const Parallel& parallel) { run_mla<f16, FmaUnit>(params, parallel); }

}  // namespace fi::FI_ISA
