// A tensor seen as rows: the last dimension contiguous, the leading ones with any strides.
#pragma once

#include <cstdint>

#include "fi/scalar.h"

namespace fi {

struct Rows {
  static constexpr int max_dims = 8;
  int64_t num_rows = 1;       // product of the leading sizes
  int ndim = 0;               // number of leading dimensions after merging those that are evenly spaced
  int64_t sizes[max_dims];    // of the leading dimensions, outermost first
  int64_t strides[max_dims];  // in elements

  FI_HD int64_t offset(int64_t row) const {
    int64_t offset = 0;
    for (int d = ndim - 1; d > 0; --d) {
      offset += (row % sizes[d]) * strides[d];
      row /= sizes[d];
    }
    return ndim > 0 ? offset + row * strides[0] : 0;
  }
};

}  // namespace fi
