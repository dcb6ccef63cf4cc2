// Attention: the choice of a path. Each path has one predicate, which everyone asks.
#include "fi/cuda/decode.h"
#include "fi/cuda/sm80/prefill.h"

namespace fi::cuda {

void attention(const AttentionParams& p, const Gpu& gpu) {
  if (p.batch == 0 || p.num_qo_heads == 0 || p.qo_len == 0) return;
  if (decode_supports(p)) return attention_decode(p, gpu);
  if (p.rope.cos) return attention(rotate_first(p, gpu), gpu);
  if (prefill_supports(p)) return prefill(p, gpu);
  generic_attention(p, gpu);
}

}  // namespace fi::cuda
