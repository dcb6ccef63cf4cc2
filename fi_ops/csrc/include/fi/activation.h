// Gated activations: act(first half of a row) * second half.
#pragma once

#include "fi/kernel.h"
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

FI_KERNEL(silu_and_mul, fi::ActivationParams)
FI_KERNEL(gelu_and_mul, fi::ActivationParams)
FI_KERNEL(gelu_tanh_and_mul, fi::ActivationParams)
