// Checks of the ops that take tables of cos and sin. `check_cos_sin` in fi_ops/library/_attention_checks.py
// is the same for fakes.
#pragma once

#include "binding/check.h"

namespace fi::binding {

// cos and sin `[1 or batch, length, R or 2R]`, float32 or query's dtype; R = rotary_dim / 2, rotary_dim 0 is
// head_dim. Returns 2R.
inline int64_t check_cos_sin(const char* op, const Tensor& cos, const Tensor& sin, const Tensor& query,
                             int64_t length, int64_t rotary_dim, const char* length_name) {
  const int64_t batch = query.size(0), head_dim = query.size(query.dim() - 1);
  const int64_t rotated = rotary_dim != 0 ? rotary_dim : head_dim;
  FI_CHECK(op, rotary_dim >= 0 && rotary_dim <= head_dim && rotated % 2 == 0,
           "rotary_dim must be even and at most head_dim ", head_dim, ", got ", rotary_dim,
           "; pass 0 for the whole head");
  const int64_t pairs = rotated / 2;
  auto check_one = [&](const char* name, const Tensor& t) {
    check_same_device(op, name, t, "query", query);
    if (query.scalar_type() == ScalarType::Float) {
      check_dtype(op, name, t, std::array{ScalarType::Float});
    } else {
      check_dtype(op, name, t, std::array{ScalarType::Float, query.scalar_type()});
    }
    check_last_dim_contiguous(op, name, t);
    const bool ok = t.dim() == 3 && (t.size(0) == 1 || t.size(0) == batch) && t.size(1) == length &&
                    (t.size(2) == pairs || t.size(2) == 2 * pairs);
    FI_CHECK(op, ok, name, " must be [1 or batch, ", length_name, ", R or 2R] = [1 or ", batch, ", ", length,
             ", ", pairs, " or ", 2 * pairs, "], got ", shape_of(t), "; check rotary_dim and the lengths");
  };
  check_one("cos", cos);
  check_one("sin", sin);
  check_same_dtype(op, "sin", sin, "cos", cos);
  check_shape_of(op, "sin", sin, cos.sizes(), "cos's shape");
  return rotated;
}

}  // namespace fi::binding
