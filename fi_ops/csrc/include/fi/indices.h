// Index tensors: int32 or int64, as the caller has them.
#pragma once

#include <cstdint>

#include "fi/scalar.h"

namespace fi {

// One dimension. Without data, where that is a meaning at all, entry i is i * stride: the indptr of equal
// counts.
struct Indices {
  const void* data = nullptr;
  bool wide = false;  // int64, else int32
  int64_t stride = 1;

  FI_HD explicit operator bool() const { return data != nullptr; }
  FI_HD int64_t at(int64_t i) const {
    if (data == nullptr) return i * stride;
    return wide ? static_cast<const int64_t*>(data)[i * stride]
                : static_cast<const int32_t*>(data)[i * stride];
  }
};

// One number for each token: the key position of a query row, the cache slot of a new token. [batch, len].
struct Positions {
  const void* data = nullptr;  // null: none given
  bool wide = false;           // int64, else int32
  int64_t stride_b = 0, stride_i = 0;

  FI_HD explicit operator bool() const { return data != nullptr; }
  FI_HD int64_t at(int64_t b, int64_t i) const {
    const int64_t offset = b * stride_b + i * stride_i;
    return wide ? static_cast<const int64_t*>(data)[offset] : static_cast<const int32_t*>(data)[offset];
  }
};

}  // namespace fi
