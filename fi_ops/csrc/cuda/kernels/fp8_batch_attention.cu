// Attention over a batch of 8-bit queries: these are widened, for the kernels that read 8-bit keys.
#include "fi/fp8_batch_attention.h"

#include "fi/widen_fp8.h"

namespace fi::cuda {

void fp8_batch_attention(const Fp8BatchAttentionParams& p, const Gpu& gpu) {
  const AttentionParams& c = p.batch.call;
  if (c.qo_len == 0 || c.num_qo_heads == 0) return;
  batch_attention(with_wide_query(p, [&](const WidenFp8Params& query) { widen_fp8(query, gpu); }), gpu);
}

}  // namespace fi::cuda
