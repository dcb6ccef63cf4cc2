// What a segment's query rows need besides their elements: the keys they see, position, ALiBi, mask row; and
// the logit of one (row, key).
#pragma once

#include "fi/cuda/decode/plan.h"

namespace fi::cuda::decode {

inline constexpr int kMaxRows = 16;

struct RowTable {
  int begin[kMaxRows], end[kMaxRows];  // allowed_keys
  float position[kMaxRows];            // for ALiBi
  float slope[kMaxRows];               // of ALiBi, base 2
  int64_t mask[kMaxRows];              // mask_row
  int slot[kMaxRows];                  // of NewRows; -1: outside of the cache
  int common_begin, common_end;        // keys that every row sees
};

// For the threads of one warp. Rows of the tile past the segment's see all keys: their results are not used.
FI_DEVICE_INLINE void fill_row_table(const AttentionParams& p, const Plan& plan, const SegmentPlace& at,
                                     RowTable& table) {
  const int lane = threadIdx.x % 32;
  KeyRange keys{0, static_cast<int>(p.kv_len)};
  const int row = at.row_begin + lane;
  if (lane < kMaxRows && row < plan.rows) {
    const QueryRow q = query_row(plan, at, lane);
    keys = allowed_keys(p, at.b, q.i);
    if (p.alibi_slopes) {
      table.position[lane] = static_cast<float>(query_position(p, at.b, q.i));
      table.slope[lane] = p.alibi_slopes.at(q.head) * kLog2e;
    }
    table.mask[lane] = mask_row(p, at.b, q.head, q.i);
  } else if (lane < kMaxRows) {
    table.position[lane] = 0.0f;
    table.slope[lane] = 0.0f;
    table.mask[lane] = mask_row(p, at.b, at.kv_head * plan.group, 0);
  }
  if (lane < kMaxRows) table.begin[lane] = keys.begin, table.end[lane] = keys.end;
#pragma unroll
  for (int other = 8; other > 0; other /= 2) {
    keys.begin = max(keys.begin, __shfl_xor_sync(~0u, keys.begin, other));
    keys.end = min(keys.end, __shfl_xor_sync(~0u, keys.end, other));
  }
  if (lane == 0) table.common_begin = keys.begin, table.common_end = keys.end;
}

FI_DEVICE_INLINE bool sees(const RowTable& rows, int row, int key) {
  return key >= rows.begin[row] && key < rows.end[row];
}

// Base 2, without a mask.
FI_DEVICE_INLINE float unmasked_logit(const AttentionParams& p, const RowTable& rows, int row, int key,
                                      float product) {
  float x = product * (p.scale * kLog2e);
  if (p.logits_soft_cap > 0.0f)
    x = tanhf(product * (p.scale / p.logits_soft_cap)) * (p.logits_soft_cap * kLog2e);
  if (p.alibi_slopes) x += (static_cast<float>(key) - rows.position[row]) * rows.slope[row];
  return x;
}

// -inf excludes, also where x is NaN.
FI_DEVICE_INLINE float add_mask(float x, float addend) { return addend == -kInf ? addend : x + addend; }

// Base 2. -inf, also where the product is NaN, for a key that the row doesn't see.
FI_DEVICE_INLINE float logit(const AttentionParams& p, const RowTable& rows, int row, int key, bool masked,
                             float product) {
  if (!sees(rows, row, key)) return -kInf;
  const float x = unmasked_logit(p, rows, row, key, product);
  return masked ? add_mask(x, addend_at(p, rows.mask[row] + key * p.mask_stride_k)) : x;
}

}  // namespace fi::cuda::decode
