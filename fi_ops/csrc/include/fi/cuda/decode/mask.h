// Elements of a mask, of whatever dtype.
#pragma once

#include "fi/cuda/attention_rows.h"

namespace fi::cuda::decode {

// Where a row of the mask starts, in elements.
FI_INLINE int64_t mask_row(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
  return b * p.mask_stride_b + h * p.mask_stride_h + i * p.mask_stride_q;
}

// An element of a float array of any dtype.
FI_DEVICE_INLINE float load_float(const void* data, DType dtype, int64_t at) {
  return dtype == DType::f32    ? static_cast<const float*>(data)[at]
         : dtype == DType::bf16 ? to_float(static_cast<const bf16*>(data)[at])
                                : to_float(static_cast<const f16*>(data)[at]);
}

// Element `at` of the mask as an addend.
FI_DEVICE_INLINE float addend_at(const AttentionParams& p, int64_t at) {
  if (p.mask_dtype == DType::boolean) return mask_addend(static_cast<const uint8_t*>(p.mask)[at]);
  return mask_addend(load_float(p.mask, p.mask_dtype, at));
}

}  // namespace fi::cuda::decode
