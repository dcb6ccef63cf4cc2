// A custom mask's bits, the lowest of a byte first, read where they lie.
#pragma once

#include "fi/cpu/simd.h"

namespace fi::FI_ISA {

// Nothing is read from byte `size` on; bits there are 0.
struct MaskBits {
  const uint8_t* data;
  int64_t size;

  // Up to 56 bits from bit `at` on; what is above bit `n` is 0.
  FI_HD uint64_t load(int64_t at, int64_t n) const {
    const int64_t byte = at / 8, left = size - byte;
    uint64_t x = 0;
    if (left >= 8) {
      __builtin_memcpy(&x, data + byte, 8);
    } else {
      for (int64_t i = 0; i < left; ++i) x |= uint64_t{data[byte + i]} << (8 * i);
    }
    return x >> at % 8 & ((uint64_t{1} << n) - 1);
  }
};

struct BitSummary {
  bool any, all;
};

FI_INLINE BitSummary summarize_bits(const MaskBits& bits, int64_t at, int64_t n) {
  constexpr int64_t step = 56;
  BitSummary s{false, true};
  for (int64_t j = 0; j < n && (s.all || !s.any); j += step) {
    const int64_t width = n - j < step ? n - j : step;
    const uint64_t x = bits.load(at + j, width);
    s.any = s.any || x != 0;
    s.all = s.all && x == (uint64_t{1} << width) - 1;
  }
  return s;
}

// n bits from `at` on as addends of logits: 0 where set, else -inf; lanes up to the next multiple of kLanes
// are 0.
FI_INLINE void stage_bits(float* dst, const MaskBits& bits, int64_t at, int64_t n) {
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t width = n - j < kLanes ? n - j : kLanes;
    const auto x = static_cast<int32_t>(bits.load(at + j, width) | ~uint64_t{0} << width);
    const VecI lanes = (VecI{} + x) >> iota_i() & 1;
    store(dst + j, select(lanes == 1, zero(), set1(-kInf)));
  }
}

}  // namespace fi::FI_ISA
