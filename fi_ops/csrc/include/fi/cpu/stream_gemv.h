// Few query rows: dot products and weighted sums straight from rows of K and V as they lie in memory, each
// row of KV read once for all query rows. What limits it is memory, so each pass prefetches what the next one
// reads.
#pragma once

#include "fi/cpu/key_rows.h"

namespace fi::FI_ISA {

// dst[0..4) = the lane sums of four vectors.
FI_INLINE void reduce_add4(float* dst, Vec a, Vec b, Vec c, Vec d) {
#if FI_ISA_LEVEL >= 1
#  if FI_ISA_LEVEL >= 2
  auto half = [](Vec x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
  const __m256 ab = _mm256_hadd_ps(half(a), half(b)), cd = _mm256_hadd_ps(half(c), half(d));
#  else
  const __m256 ab = _mm256_hadd_ps(a, b), cd = _mm256_hadd_ps(c, d);
#  endif
  const __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(dst, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  dst[0] = reduce_add(a);
  dst[1] = reduce_add(b);
  dst[2] = reduce_add(c);
  dst[3] = reduce_add(d);
#endif
}

#if FI_ISA_LEVEL >= 2
// The lane sums of 16 vectors, in order. Each round adds the halves of two vectors into one: a blend keeps
// one half of each in place, a shuffle brings the other halves under them.
FI_INLINE Vec reduce_add16(const Vec (&v)[16]) {
  Vec a[8], b[4], c[2];
#  pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_mask_blend_ps(0xFF00, v[i], v[i + 8]) + _mm512_shuffle_f32x4(v[i], v[i + 8], 0x4E);
  }
  const __m512i cross = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
#  pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_mask_blend_ps(0xF0F0, a[i], a[i + 4]) + _mm512_permutex2var_ps(a[i], cross, a[i + 4]);
  }
#  pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Vec swapped = (Vec)_mm512_shuffle_pd((__m512d)b[i], (__m512d)b[i + 2], 0x55);
    c[i] = _mm512_mask_blend_ps(0xCCCC, b[i], b[i + 2]) + swapped;
  }
  const Vec swapped = _mm512_permute_ps(_mm512_mask_blend_ps(0xAAAA, c[1], c[0]), 0xB1);
  return _mm512_mask_blend_ps(0xAAAA, c[0], c[1]) + swapped;
}
#endif

// fp32 products of any storage type. `q` rows are padded with 0 to a multiple of kLanes.
template <class T>
struct StreamDot {
  using Query = float;
  static constexpr int64_t kStep = kLanes;
  using Operand = Vec;
  FI_INLINE Vec load_key(const T* p) { return load(p); }
  FI_INLINE Vec load_key_partial(const T* p, int64_t n) { return load_partial(p, n); }
  FI_INLINE Vec load_query(const float* p) { return load(p); }
  FI_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if FI_ISA_LEVEL >= 3
template <>
struct StreamDot<bf16> {
  using Query = bf16;
  static constexpr int64_t kStep = 2 * kLanes;
  using Operand = __m512bh;
  FI_INLINE __m512bh load_key(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  FI_INLINE __m512bh load_key_partial(const bf16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1, p);
  }
  FI_INLINE __m512bh load_query(const bf16* p) { return load_key(p); }
  FI_INLINE Vec multiply_add(__m512bh a, __m512bh b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
};
#endif

// s[r][j..j+4) = q[r] . k[j..j+4) for kRows query rows.
template <class T, int kRows>
FI_INLINE void dot_block(float* s, int64_t s_stride, const typename StreamDot<T>::Query* q, int64_t q_stride,
                         const T* const (&k)[4], int64_t size) {
  using Dot = StreamDot<T>;
  Vec acc[kRows][4] = {};
  auto step = [&](const typename Dot::Operand(&kv)[4], int64_t d) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const typename Dot::Operand qv = Dot::load_query(q + r * q_stride + d);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = Dot::multiply_add(qv, kv[c], acc[r][c]);
    }
  };
  int64_t d = 0;
  for (; d + Dot::kStep <= size; d += Dot::kStep) {
    typename Dot::Operand kv[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) kv[c] = Dot::load_key(k[c] + d);
    step(kv, d);
  }
  if (d < size) {
    typename Dot::Operand kv[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) kv[c] = Dot::load_key_partial(k[c] + d, size - d);
    step(kv, d);
  }
#if FI_ISA_LEVEL >= 2
  if constexpr (kRows == 4) {
    Vec flat[16];
#  pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) flat[i] = acc[i / 4][i % 4];
    const Vec sums = reduce_add16(flat);
    _mm_storeu_ps(s, _mm512_castps512_ps128(sums));
    _mm_storeu_ps(s + s_stride, _mm512_extractf32x4_ps(sums, 1));
    _mm_storeu_ps(s + 2 * s_stride, _mm512_extractf32x4_ps(sums, 2));
    _mm_storeu_ps(s + 3 * s_stride, _mm512_extractf32x4_ps(sums, 3));
    return;
  }
#endif
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) reduce_add4(s + r * s_stride, acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
}

// s[rows][n] = q k^T. Columns up to the next multiple of 4 are written too (with copies of the last key's
// product). Prefetches `next`, what the following pass reads, along the way.
template <class T, class Keys>
void stream_scores(float* s, int64_t s_stride, const typename StreamDot<T>::Query* q, int64_t q_stride,
                   int64_t rows, Keys k, int64_t n, int64_t size, NextRows<Keys> next) {
  for (int64_t j = 0; j < n; j += 4) {
    const T* key[4];
    for (int c = 0; c < 4; ++c) key[c] = k[j + c < n ? j + c : n - 1];
    if (next) {
      for (int64_t c = j; c < j + 4 && c < n; ++c) next.prefetch(c);
    }
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      dot_block<T, 4>(s + r * s_stride + j, s_stride, q + r * q_stride, q_stride, key, size);
    if (rows - r == 3) {
      dot_block<T, 3>(s + r * s_stride + j, s_stride, q + r * q_stride, q_stride, key, size);
    } else if (rows - r == 2) {
      dot_block<T, 2>(s + r * s_stride + j, s_stride, q + r * q_stride, q_stride, key, size);
    } else if (rows - r == 1) {
      dot_block<T, 1>(s + r * s_stride + j, s_stride, q + r * q_stride, q_stride, key, size);
    }
  }
}

#if FI_ISA_LEVEL >= 2
inline constexpr int kValueVecs = 4;  // 16 accumulators with 4 query rows
#else
inline constexpr int kValueVecs = 2;
#endif

// acc[kRows][kVecs] += p v over n rows of V, for one strip of columns.
template <int kRows, int kVecs, class Values>
FI_INLINE void value_block(float* acc, int64_t acc_stride, const float* p, int64_t p_stride, Values v,
                           int64_t n, int64_t tail, NextRows<Values> next) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) sum[r][c] = load(acc + r * acc_stride + c * kLanes);
  }
  for (int64_t j = 0; j < n; ++j) {
    if (next) next.prefetch(j);
    const auto* row = v[j];
    Vec vv[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      const auto* src = row + c * kLanes;
      vv[c] = c == kVecs - 1 && tail < kLanes ? load_partial(src, tail) : load(src);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec w = set1(p[r * p_stride + j]);
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) sum[r][c] = fma(w, vv[c], sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) store(acc + r * acc_stride + c * kLanes, sum[r][c]);
  }
}

#if FI_ISA_LEVEL >= 3
// The same for bf16 weights: rows of V are interleaved two by two and multiplied as pairs, 32 columns a unit.
// Interleaving within 128-bit lanes leaves columns 8l..8l+3 in one accumulator's lane l and 8l+4..8l+7 in the
// other's; acc in memory is in order. p is 0 from n on.
template <int kRows, int kUnits, class Values>
FI_INLINE void value_pairs_block(float* acc, int64_t acc_stride, const bf16* p, int64_t p_stride, Values v,
                                 int64_t n, int64_t width, NextRows<Values> next) {
  Vec sum[kRows][kUnits][2];
#  pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#  pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      const Vec x = load(acc + r * acc_stride + u * 32), y = load(acc + r * acc_stride + u * 32 + 16);
      sum[r][u][0] = _mm512_shuffle_f32x4(x, y, 0x88);  // 128-bit lanes 0 and 2 of each
      sum[r][u][1] = _mm512_shuffle_f32x4(x, y, 0xDD);
    }
  }
  auto load_unit = [&](int64_t j, int u) {
    const int64_t columns = width - u * 32;
    if (columns >= 32) return _mm512_loadu_si512(v[j] + u * 32);
    return _mm512_maskz_loadu_epi16((__mmask32(1) << columns) - 1, v[j] + u * 32);
  };
  for (int64_t j = 0; j < n; j += 2) {
    if (next) {
      next.prefetch(j);
      next.prefetch(j + 1);
    }
    __m512bh low[kUnits], high[kUnits];
#  pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      const __m512i even = load_unit(j, u), odd = j + 1 < n ? load_unit(j + 1, u) : _mm512_setzero_si512();
      low[u] = (__m512bh)_mm512_unpacklo_epi16(even, odd);
      high[u] = (__m512bh)_mm512_unpackhi_epi16(even, odd);
    }
#  pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, p + r * p_stride + j, sizeof(pair));
      const __m512bh w = (__m512bh)_mm512_set1_epi32(pair);
#  pragma GCC unroll 2
      for (int u = 0; u < kUnits; ++u) {
        sum[r][u][0] = _mm512_dpbf16_ps(sum[r][u][0], w, low[u]);
        sum[r][u][1] = _mm512_dpbf16_ps(sum[r][u][1], w, high[u]);
      }
    }
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#  pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#  pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      store(acc + r * acc_stride + u * 32, _mm512_permutex2var_ps(sum[r][u][0], first, sum[r][u][1]));
      store(acc + r * acc_stride + u * 32 + 16, _mm512_permutex2var_ps(sum[r][u][0], second, sum[r][u][1]));
    }
  }
}

// acc[rows][size] += p[rows][n] v[n][size]; acc rows are padded to a multiple of 32. Prefetches rows of
// `next`.
template <class Values>
void stream_values(float* acc, int64_t acc_stride, const bf16* p, int64_t p_stride, int64_t rows, Values v,
                   int64_t n, int64_t size, NextRows<Values> next) {
  for (int64_t d = 0; d < size; d += 64) {
    const int64_t width = size - d < 64 ? size - d : 64;
    for (int64_t r = 0; r < rows; r += 4) {
      auto run = [&](auto block_rows) {
        float* a = acc + r * acc_stride + d;
        const bf16* w = p + r * p_stride;
        if (width > 32) {
          value_pairs_block<block_rows(), 2>(a, acc_stride, w, p_stride, v.columns(d), n, width, next);
        } else {
          value_pairs_block<block_rows(), 1>(a, acc_stride, w, p_stride, v.columns(d), n, width, next);
        }
      };
      switch (rows - r) {
        case 1:
          run([] { return 1; });
          break;
        case 2:
          run([] { return 2; });
          break;
        case 3:
          run([] { return 3; });
          break;
        default:
          run([] { return 4; });
      }
      next.bytes = 0;  // once is enough
    }
  }
}
#endif

// acc[rows][size] += p[rows][n] v[n][size]; acc rows are padded to a multiple of kLanes. Prefetches rows of
// `next`.
template <class Values>
void stream_values(float* acc, int64_t acc_stride, const float* p, int64_t p_stride, int64_t rows, Values v,
                   int64_t n, int64_t size, NextRows<Values> next) {
  int64_t d = 0;
  while (d < size) {
    const int64_t left = size - d;
    const int64_t vecs = left >= kValueVecs * kLanes ? kValueVecs : left > kLanes ? 2 : 1;
    const int64_t width = vecs * kLanes < left ? vecs * kLanes : left;
    const int64_t tail = width - (vecs - 1) * kLanes;
    for (int64_t r = 0; r < rows; r += 4) {
      const int64_t count = rows - r < 4 ? rows - r : 4;
      auto run = [&](auto block_rows, auto block_vecs) {
        value_block<block_rows(), block_vecs()>(acc + r * acc_stride + d, acc_stride, p + r * p_stride,
                                                p_stride, v.columns(d), n, tail, next);
      };
      auto with_rows = [&](auto block_vecs) {
        switch (count) {
          case 4:
            return run([] { return 4; }, block_vecs);
          case 3:
            return run([] { return 3; }, block_vecs);
          case 2:
            return run([] { return 2; }, block_vecs);
          default:
            return run([] { return 1; }, block_vecs);
        }
      };
      if (vecs == kValueVecs) {
        with_rows([] { return kValueVecs; });
      } else if (vecs == 2) {
        with_rows([] { return 2; });
      } else {
        with_rows([] { return 1; });
      }
      next.bytes = 0;  // once is enough
    }
    d += width;
  }
}

}  // namespace fi::FI_ISA
