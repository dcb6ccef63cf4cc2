// RMSNorm and LayerNorm over rows.
#pragma once

#include "fi/cpu/isa.h"
#include "fi/cpu/parallel.h"
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

FI_DECLARE_KERNEL(void, rmsnorm, (const fi::NormParams& params, const fi::Parallel& parallel))
FI_DECLARE_KERNEL(void, layernorm, (const fi::NormParams& params, const fi::Parallel& parallel))
