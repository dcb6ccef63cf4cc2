// The custom mask of a tile as a word for each row: its keys' bits, those left out that the row may not see.
#pragma once

#include <type_traits>

#include "fi/batch_attention.h"
#include "fi/cuda/sm80/block_rows.h"

namespace fi::cuda {

template <int kKeys>
using MaskWord = std::conditional_t<kKeys <= 32, uint32_t, uint64_t>;

// Bits [begin, end) of a word, where they are in it.
FI_DEVICE_INLINE uint64_t bits_between(int begin, int end) {
  if (begin >= end || begin >= 64 || end <= 0) return 0;
  const uint64_t from = ~uint64_t{0} << (begin > 0 ? begin : 0);
  return end >= 64 ? from : from & ~(~uint64_t{0} << end);
}

// Of query i, keys [first, first + kKeys), lowest first.
template <int kKeys>
FI_DEVICE_INLINE MaskWord<kKeys> mask_word(const BatchAttentionParams& p, const Request& r,
                                           const RowKeys& row, int64_t i, int first) {
  static_assert(kKeys % 8 == 0 && kKeys <= 64);
  const uint64_t seen = bits_between(row.begin - first, row.end - first) & (~uint64_t{0} >> (64 - kKeys));
  if (seen == 0) return 0;
  const int64_t bit = i * r.kv_len + first, byte = r.mask_begin + bit / 8;
  const int shift = static_cast<int>(bit % 8);
  uint64_t word = 0;
#pragma unroll
  for (int n = 0; n <= kKeys / 8; ++n) {
    const uint64_t x = byte + n < p.mask_bytes ? p.custom_mask[byte + n] : 0;
    word |= n == 0 ? x >> shift : shift > 0 || n < 8 ? x << (8 * n - shift) : 0;
  }
  return static_cast<MaskWord<kKeys>>(word & seen);
}

}  // namespace fi::cuda
