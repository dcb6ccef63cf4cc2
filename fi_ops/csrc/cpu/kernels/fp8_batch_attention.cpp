// Attention over a batch of 8-bit queries: these are widened once a call, keys and values as they are read.
#include "fi/fp8_batch_attention.h"

#include "fi/widen_fp8.h"

namespace fi::FI_ISA {

void fp8_batch_attention(const Fp8BatchAttentionParams& p, const Parallel& parallel) {
  const BatchAttentionParams wide = with_wide_query(p);
  widen_fp8(widening(p, wide), parallel);
  batch_attention(wide, parallel);
}

}  // namespace fi::FI_ISA
