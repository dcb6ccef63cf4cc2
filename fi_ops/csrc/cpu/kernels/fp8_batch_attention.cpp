// Attention over a batch of 8-bit queries: these are widened once a call, keys and values as they are read.
#include "fi/fp8_batch_attention.h"

#include "fi/widen_fp8.h"

namespace fi::FI_ISA {

void fp8_batch_attention(const Fp8BatchAttentionParams& p, const Parallel& parallel) {
  batch_attention(with_wide_query(p, [&](const WidenFp8Params& query) { widen_fp8(query, parallel); }),
                  parallel);
}

}  // namespace fi::FI_ISA
