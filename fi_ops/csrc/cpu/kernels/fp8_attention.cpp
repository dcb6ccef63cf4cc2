// Attention of 8-bit tensors: widened once a call, as the packing engine would for every block of queries.
#include "fi/fp8_attention.h"

#include "fi/widen_fp8.h"

namespace fi::FI_ISA {

void fp8_attention(const Fp8AttentionParams& p, const Parallel& parallel) {
  attention(widened(p, [&](const WidenFp8Params& tensor) { widen_fp8(tensor, parallel); }), parallel);
}

}  // namespace fi::FI_ISA
