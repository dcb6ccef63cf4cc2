// RMSNorm and LayerNorm over rows.
#pragma once

#include "fi/kernel.h"
#include "fi/rows.h"
#include "fi/scalar.h"

namespace fi {

struct NormParams {
  const void* input;      // rows x hidden_size, of `dtype`
  const void* residual;   // fused add only: rows x hidden_size, of `dtype`; read and written
  const void* weight;     // [hidden_size], of `weight_dtype`
  const void* bias;       // LayerNorm only: [hidden_size], of `bias_dtype`
  void* output;           // rows x hidden_size, of `dtype`; may be `input`
  void* residual_output;  // `residual`, writable
  Rows input_rows, residual_rows, output_rows;
  int64_t hidden_size;
  DType dtype, weight_dtype, bias_dtype;
  float eps;
  float weight_offset;  // 1 for Gemma, else 0
};

}  // namespace fi

FI_KERNEL(rmsnorm, fi::NormParams)
FI_KERNEL(layernorm, fi::NormParams)
