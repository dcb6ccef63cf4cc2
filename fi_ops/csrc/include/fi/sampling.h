// Sampling from logits.
#pragma once

#include "fi/kernel.h"
#include "fi/scalar.h"

namespace fi {

// One draw: which row it is from, its filters, its random number.
struct SamplingDraw {
  int64_t row;
  int64_t top_k;      // <= 0 or >= vocab_size: no filter
  double top_p;       // >= 1: no filter; 0: argmax
  double min_p;       // 0: no filter
  float temperature;  // 0: argmax
  float uniform;      // in [0, 1)
};

struct SamplingParams {
  const void* logits;         // rows x vocab_size, of `dtype`
  const SamplingDraw* draws;  // [batch]
  void* samples;              // [batch], int32 or int64 by `sample_dtype`
  bool* valid;                // [batch]
  int64_t batch;
  int64_t vocab_size;
  int64_t row_stride;  // elements between rows of logits
  DType dtype;
  DType sample_dtype;
  bool top_k_first;  // top-p's mass is that of what top-k and min-p left; else that of the whole row
  bool exact_ties;   // top-k keeps exactly k, lowest ids first; else all that equal the k-th
};

}  // namespace fi

FI_KERNEL(top_k_top_p_sample, fi::SamplingParams)
