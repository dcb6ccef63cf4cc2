// Gated activations: act(first half of a row) * second half.
#pragma once

#include "fi/cpu/isa.h"
#include "fi/cpu/parallel.h"
#include "fi/rows.h"
#include "fi/scalar.h"

namespace fi {

struct ActivationParams {
  const void* input;  // rows x (2 * hidden_size), of `dtype`
  void* output;       // rows x hidden_size, contiguous, of `dtype`
  Rows input_rows;
  int64_t hidden_size;
  DType dtype;
};

}  // namespace fi

FI_DECLARE_KERNEL(void, silu_and_mul, (const fi::ActivationParams& params, const fi::Parallel& parallel))
FI_DECLARE_KERNEL(void, gelu_and_mul, (const fi::ActivationParams& params, const fi::Parallel& parallel))
FI_DECLARE_KERNEL(void, gelu_tanh_and_mul, (const fi::ActivationParams& params, const fi::Parallel& parallel))
