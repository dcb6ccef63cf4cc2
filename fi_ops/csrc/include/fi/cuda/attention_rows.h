// What every attention kernel asks about a query row: its keys, the mask's values as addends, its last step.
#pragma once

#include "fi/attention.h"
#include "fi/cuda/ptx.h"

namespace fi::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kInf = __builtin_inff();

// Stands for a finite logit that overflows in base 2 (finfo.min * log2(e)): still "attend, with next to no
// weight", where -inf would be "excluded".
inline constexpr float kLowestLogit = -3.0e38f;

// Values of an additive mask at or below this weigh exactly 0 beside any ordinary value.
FI_INLINE float negligible(DType mask_dtype) { return mask_dtype == DType::f16 ? -65504.0f : -1e30f; }

struct KeyRange {
  int begin, end;
};

// Keys that causal, window and length leave to a query row at `position`; [0, 0) where there are none.
FI_INLINE KeyRange keys_of_position(const AttentionParams& p, int64_t position) {
  int64_t begin = 0, end = p.kv_len;
  if (p.causal && position < end) end = position < 0 ? 0 : position + 1;
  if (p.window_left >= 0 && position > p.window_left) begin = position - p.window_left;
  if (begin >= end) return {0, 0};
  return {static_cast<int>(begin), static_cast<int>(end)};
}

// Value of a mask as a base-2 addend: -inf excludes, a finite value stays finite.
template <class M>
FI_DEVICE_INLINE float mask_addend(M value) {
  if constexpr (__is_same(M, uint8_t)) {
    return value ? 0.0f : -kInf;
  } else {
    const float x = to_float(value);
    return x == -kInf ? x : fmaxf(x * kLog2e, kLowestLogit);
  }
}

// tanh(ln(2) / 2 * y), that is (2^y - 1) / (2^y + 1). Near 0, where that loses digits, a polynomial of 1e-8
// of the result; elsewhere 3e-7.
inline constexpr float kTanhNear = 1.4f;  // |y|
FI_DEVICE_INLINE float tanh_near(float y) {
  const float x = 0.34657359f * y, u = x * x;
  return x * (1.0f + u * (-0.33333072f + u * (0.1332483f + u * (-0.05298927f + u * 0.01714133f))));
}
FI_DEVICE_INLINE float tanh_exp2(float y) {
  return fabsf(y) < kTanhNear ? tanh_near(y) : 1.0f - __fdividef(2.0f, exp2_approx(y) + 1.0f);
}

// Calls f(a null pointer of the mask's type).
template <class F>
FI_DEVICE_INLINE void with_mask_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::boolean:
      return f(static_cast<const uint8_t*>(nullptr));
    case DType::f32:
      return f(static_cast<const float*>(nullptr));
    case DType::bf16:
      return f(static_cast<const bf16*>(nullptr));
    default:
      return f(static_cast<const f16*>(nullptr));
  }
}

// The maximum so far that may be subtracted: 0 while nothing was attended to.
FI_DEVICE_INLINE float usable_max(float m) { return m == -kInf ? 0.0f : m; }

struct RowResult {
  float factor;  // of the accumulated values
  float lse;     // base 2
};

// The last step of a row: the sink joins the sum, the sum divides.
FI_DEVICE_INLINE RowResult finish_row(const AttentionParams& p, int64_t head, float row_max, float row_sum) {
  float total = row_sum, top = row_max, keep = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks.at(head) * kLog2e;
    top = fmaxf(sink, row_max);
    keep = exp2_approx(row_max - usable_max(top));
    total = row_sum * keep + exp2_approx(sink - usable_max(top));
  }
  return {total == 0.0f ? 0.0f : keep / total,
          total == 0.0f || top <= 0.99f * kLowestLogit ? -kInf : usable_max(top) + log2f(total)};
}

}  // namespace fi::cuda
