// Index tensors as the kernels read them.
#pragma once

#include "binding/check.h"
#include "fi/indices.h"

namespace fi::binding {

inline Indices indices_of(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long, t.stride(0)};
}

// The indptr of requests with `count` of something each: 0, count, 2 * count ...
inline Indices equal_counts(int64_t count) { return {nullptr, false, count}; }

// [len] or [batch, len].
inline Positions positions_of(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long, last == 1 ? t.stride(0) : 0,
          t.stride(last)};
}

}  // namespace fi::binding
