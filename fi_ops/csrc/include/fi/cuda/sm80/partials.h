// Split keys: partial results of the parts, and their joining.
#pragma once

#include "fi/cuda/attention_rows.h"

namespace fi::cuda {

// Partial results of a block whose tiles were split: joined in order of the parts by combine().
struct Partials {
  float* out = nullptr;    // [parts][heads][num_rows][width]: not divided; null: nothing is split
  float* state = nullptr;  // [parts][heads][num_rows][2]: maximum, sum
  int parts = 1;
  int64_t width = 0;  // of head_dim_vo, padded
  int64_t heads = 0;  // batch * num_kv_heads
  int64_t num_rows = 0;

  FI_DEVICE_INLINE int64_t row(int64_t part, int64_t head, int64_t r) const {
    return (part * heads + head) * num_rows + r;
  }
};

// Writes p.out and p.lse from the partial results (host).
void combine(const AttentionParams& p, const Partials& partials, const Gpu& gpu);

}  // namespace fi::cuda
