// The last step of a row: the sink joins the sum, the sum divides, the LSE (base 2).
#pragma once

#include "fi/cuda/sm80/mask_tiles.h"

namespace fi::cuda {

// The maximum so far that may be subtracted: 0 while nothing was attended to.
FI_DEVICE_INLINE float usable_max(float m) { return m == -kInf ? 0.0f : m; }

struct RowResult {
  float factor;  // of the accumulated values
  float lse;
};

FI_DEVICE_INLINE RowResult finish_row(const AttentionParams& p, int64_t head, float row_max, float row_sum) {
  float total = row_sum, top = row_max, keep = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks.at(head) * kLog2e;
    top = fmaxf(sink, row_max);
    keep = exp2f(row_max - usable_max(top));
    total = row_sum * keep + exp2f(sink - usable_max(top));
  }
  return {total == 0.0f ? 0.0f : keep / total,
          total == 0.0f || top <= 0.99f * kLowestLogit ? -kInf : usable_max(top) + log2f(total)};
}

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
