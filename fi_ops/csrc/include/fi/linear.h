// Linear layers of few rows: output = input @ weight^T + bias.
#pragma once

#include "fi/kernel.h"
#include "fi/rows.h"
#include "fi/scalar.h"

namespace fi {

struct LinearParams {
  const void* input;   // rows x in_features, of `dtype`
  const void* weight;  // [out_features, in_features], of `dtype`; rows `weight_stride` elements apart
  const void* bias;    // [out_features], of `dtype`; null: none
  void* output;        // rows x out_features, of `dtype`
  Rows input_rows, output_rows;
  int64_t in_features, out_features, weight_stride;
  DType dtype;
};

}  // namespace fi

FI_KERNEL(linear, fi::LinearParams)
