// Values of a mask as addends to base-2 logits.
#pragma once

#include "fi/attention.h"
#include "fi/cuda/ptx.h"

namespace fi::cuda::decode {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kInf = __builtin_inff();

// Stands for a finite logit that overflows in base 2 (finfo.min * log2(e)): still "attend, with next to no
// weight", where -inf would be "excluded".
inline constexpr float kLowestLogit = -3.0e38f;

// Values of an additive mask at or below this weigh exactly 0 beside any ordinary value.
FI_INLINE float negligible(DType mask_dtype) { return mask_dtype == DType::f16 ? -65504.0f : -1e30f; }

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

// -inf excludes; a finite value stays finite.
FI_DEVICE_INLINE float mask_addend(const AttentionParams& p, int64_t at) {
  if (p.mask_dtype == DType::boolean) return static_cast<const uint8_t*>(p.mask)[at] ? 0.0f : -kInf;
  const float x = load_float(p.mask, p.mask_dtype, at);
  return x == -kInf ? x : fmaxf(x * kLog2e, kLowestLogit);
}

}  // namespace fi::cuda::decode
