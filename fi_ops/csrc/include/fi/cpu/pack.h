// Packing rows of K and V into the panels that tile_gemm.h reads.
#pragma once

#include "fi/cpu/key_rows.h"

namespace fi::FI_ISA {

FI_INLINE VecI interleave_lo(VecI a, VecI b) {
#if FI_ISA_LEVEL >= 2
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif FI_ISA_LEVEL == 1
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

FI_INLINE VecI interleave_hi(VecI a, VecI b) {
#if FI_ISA_LEVEL >= 2
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif FI_ISA_LEVEL == 1
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Transposes kLanes x kLanes words: log2(kLanes) rounds of a perfect shuffle of the rows.
FI_INLINE void transpose(VecI (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    VecI w[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      w[2 * i] = interleave_lo(v[i], v[i + kLanes / 2]);
      w[2 * i + 1] = interleave_hi(v[i], v[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = w[i];
  }
}

// kLanes words of a row from element d on: floats, or pairs of bf16 as they lie. Elements from `size` on are
// 0.
template <class Unit, class T>
FI_INLINE VecI load_words(const T* row, int64_t d, int64_t size) {
  if constexpr (Unit::kPair == 1) {
    return as_int(d + kLanes <= size ? load(row + d) : load_partial(row + d, size - d));
  } else {
    constexpr int64_t count = 2 * kLanes;
    VecI words{};
    if (d + count <= size) {
      __builtin_memcpy(&words, row + d, sizeof(words));
    } else {
      uint16_t tail[count] = {};
      for (int64_t i = 0; i < size - d; ++i) tail[i] = row[d + i].bits;
      __builtin_memcpy(&words, tail, sizeof(words));
    }
    return words;
  }
}

// Pieces that pack_keys makes of n rows.
template <class Unit>
FI_INLINE int64_t num_key_blocks(int64_t n, int64_t depth) {
  constexpr int64_t block = kLanes * Unit::kPair;
  return (n + kLanes - 1) / kLanes * ((depth + block - 1) / block);
}

// K^T of `n` rows: panels of kLanes rows, each depth x kLanes elements; dims from `size` to `depth` and rows
// from n to the end of the last panel are 0. between() is called before each piece.
template <class Unit, class Rows, class Between>
void pack_keys(typename Unit::Element* dst, Rows rows, int64_t n, int64_t size, int64_t depth,
               Between between) {
  constexpr int64_t word = Unit::kPair;
  for (int64_t r = 0; r < n; r += kLanes) {
    typename Unit::Element* panel = dst + r * depth;
    for (int64_t d = 0; d < depth; d += kLanes * word) {
      between();
      VecI v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        v[i] = r + i < n && d < size ? load_words<Unit>(rows[r + i], d, size) : VecI{};
      }
      transpose(v);
      const int64_t count = (depth - d) / word < kLanes ? (depth - d) / word : kLanes;
      for (int64_t i = 0; i < count; ++i) {
        __builtin_memcpy(panel + (d + i * word) * kLanes, &v[i], sizeof(VecI));
      }
    }
  }
}

// V of `n` rows: panels of kLanes columns, each `depth` (rows, padded with 0) x kLanes elements.
template <class Unit, class Rows>
void pack_values(typename Unit::Element* dst, Rows rows, int64_t n, int64_t size, int64_t depth,
                 int64_t panel_stride) {
  for (int64_t d = 0; d < size; d += kLanes) {
    typename Unit::Element* panel = dst + d / kLanes * panel_stride;
    const int64_t width = size - d < kLanes ? size - d : kLanes;
    if constexpr (Unit::kPair == 1) {
      for (int64_t r = 0; r < depth; ++r) {
        Vec x{};
        if (r < n) x = width == kLanes ? load(rows[r] + d) : load_partial(rows[r] + d, width);
        store(panel + r * kLanes, x);
      }
    } else {
      auto bits = [&](int64_t r) {
        VecH h{};
        if (r < n) h = width == kLanes ? load_bits(rows[r] + d) : load_bits_partial(rows[r] + d, width);
        return __builtin_convertvector(h, VecU);
      };
      for (int64_t r = 0; r < depth; r += 2) {
        const VecU pairs = bits(r) | (bits(r + 1) << 16);
        __builtin_memcpy(panel + r * kLanes, &pairs, sizeof(pairs));
      }
    }
  }
}

}  // namespace fi::FI_ISA
