#include "fi/cpu/attention_dtypes.h"
#include "fi/cpu/mla_loop.h"

namespace fi::FI_ISA {

void mla_f32(const MlaParams& params, const Parallel& parallel) { run_mla<float, FmaUnit>(params, parallel); }

}  // namespace fi::FI_ISA
