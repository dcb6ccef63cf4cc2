// Rotary embedding of queries and keys, and its tables of cos and sin.
#pragma once

#include "fi/kernel.h"
#include "fi/rows.h"
#include "fi/scalar.h"

namespace fi {

// Queries or keys: batch x num_heads x len rows of head_dim elements. Strides in elements.
struct RopeHeads {
  const void* input;
  void* output;  // may be `input`
  int64_t num_heads;
  int64_t input_strides[3];  // batch, head, token
  int64_t output_strides[3];
};

struct RopeParams {
  RopeHeads query, key;
  const void* cos;  // batch (or stride 0) x rows x width, of `angle_dtype`
  const void* sin;
  int64_t cos_strides[2];  // batch, row
  int64_t sin_strides[2];
  const void* positions;  // batch (or stride 0) x len, i32 or i64: the row of each token; null: row = token
  int64_t position_strides[2];
  int64_t batch, len, head_dim;
  int64_t rotary_dim;  // even, at most head_dim
  int64_t width;       // rotary_dim / 2, or rotary_dim (each value twice)
  DType dtype, angle_dtype, position_dtype;
  bool interleaved;
};

struct RopeCosSinParams {
  const void* positions;  // single elements, i32 or i64
  Rows position_rows;
  DType position_dtype;
  const double* frequencies;  // [num_pairs], radians a position
  int64_t num_pairs;
  float* cos;  // positions x num_pairs
  float* sin;
};

}  // namespace fi

FI_KERNEL(rope, fi::RopeParams)
FI_KERNEL(rope_cos_sin, fi::RopeCosSinParams)
