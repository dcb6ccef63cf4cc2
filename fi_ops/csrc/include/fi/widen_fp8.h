// Keys and values of 8 bits as the queries' dtype, for the kernels over dense tensors.
#pragma once

#include "fi/fp8.h"
#include "fi/kernel.h"
#include "fi/rows.h"

namespace fi {

struct WidenFp8Params {
  const void* input;
  Rows rows;
  int64_t dim;  // elements of a row
  Fp8 format;
  DType dtype;   // of output
  void* output;  // [rows.num_rows, dim]
};

}  // namespace fi

FI_KERNEL(widen_fp8, fi::WidenFp8Params)
