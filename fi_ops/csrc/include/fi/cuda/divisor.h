// Division by a number that the host knows: a product and a shift.
#pragma once

#include <cstdint>

#include "fi/scalar.h"

namespace fi::cuda {

// Of numbers below 2^31 by one from 1 to 2^31.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(uint32_t divisor) {
    int log2 = 0;
    while ((uint64_t{1} << log2) < divisor) ++log2;
    shift_ = 31 + log2;
    factor_ = static_cast<uint32_t>(((uint64_t{1} << shift_) + divisor - 1) / divisor);
  }

  FI_HD uint32_t divide(uint32_t x) const { return static_cast<uint32_t>(uint64_t{x} * factor_ >> shift_); }

 private:
  uint32_t factor_ = 0;
  int shift_ = 0;
};

}  // namespace fi::cuda
