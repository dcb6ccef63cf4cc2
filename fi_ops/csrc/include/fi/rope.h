// Rotary embedding of queries and keys, and its tables of cos and sin.
#pragma once

#include <math.h>

#include "fi/indices.h"
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
  Positions positions;  // batch (or stride 0) x len: the row of each token; none: row = token
  int64_t num_rows;     // of cos and sin
  int64_t batch, len, head_dim;
  int64_t rotary_dim;  // even, at most head_dim
  int64_t width;       // rotary_dim / 2, or rotary_dim: the two members of a pair have their own
  DType dtype, angle_dtype;
  bool interleaved;
};

// Radians a position for each pair, in double: theta^(-i / num_pairs) / scale, or scaled as for Llama 3.1.
struct RopeFrequencies {
  int64_t num_pairs;
  double scale, theta;
  double low_freq_factor, high_freq_factor;
  int64_t old_context_len;  // 0: plain

  FI_HD double at(int64_t i) const {
    const double f = pow(theta, -static_cast<double>(i) / static_cast<double>(num_pairs));
    if (old_context_len == 0) return f / scale;
    // Llama 3.1: wavelengths longer than the old context are stretched by scale, short ones kept, in between
    // mixed.
    const double turns = static_cast<double>(old_context_len) * f / 6.283185307179586476925;
    double keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
    keep = keep < 0 ? 0 : keep > 1 ? 1 : keep;
    return (1 - keep) * (f / scale) + keep * f;
  }
};

struct RopeCosSinParams {
  Indices positions;  // at the offsets of position_rows
  Rows position_rows;
  RopeFrequencies frequencies;
  float* cos;  // positions x num_pairs
  float* sin;
};

}  // namespace fi

FI_KERNEL(rope, fi::RopeParams)
FI_KERNEL(rope_cos_sin, fi::RopeCosSinParams)
