// Attention for few query rows: decode steps, speculative verification (docs/kernels/decode_cuda.md).
#pragma once

#include "fi/attention.h"

namespace fi::cuda {

// Query rows of a KV head (query heads of its group x query positions) up to which attention_decode is the
// kernel to take. It computes more as well, but reads K and V again for every 16 of them.
inline constexpr int64_t kDecodeRows = 16;

inline bool decode_supports(const AttentionParams& p) {
  return p.num_kv_heads > 0 && p.num_qo_heads / p.num_kv_heads * p.qo_len <= kDecodeRows;
}

// Any dtype, head_dim and strides, every feature of AttentionParams. `append`: what goes into the cache
// first, as in AppendAttentionParams; null: nothing.
void attention_decode(const AttentionParams& p, const AppendParams* append, const Gpu& gpu);

}  // namespace fi::cuda
