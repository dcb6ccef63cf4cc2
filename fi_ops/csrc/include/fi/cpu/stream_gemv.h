// Few query rows: dot products and weighted sums straight from rows of K and V as they lie in memory, each
// row of KV read once for all query rows. What limits it is memory, so rows are read in the order of their
// addresses, and all the way those some rows later are prefetched.
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
// The lane sums of 16 vectors, in order. Each round adds the halves of two vectors into one.
FI_INLINE Vec reduce_add16(const Vec (&v)[16]) {
  Vec a[8], b[4];
#  pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    a[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
#  pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d x = (__m512d)a[2 * i], y = (__m512d)a[2 * i + 1];
    b[i] = (Vec)_mm512_unpacklo_pd(x, y) + (Vec)_mm512_unpackhi_pd(x, y);
  }
  auto halves = [](Vec x, Vec y) {
    return _mm512_shuffle_f32x4(x, y, 0x88) + _mm512_shuffle_f32x4(x, y, 0xDD);
  };
  return halves(halves(b[0], b[1]), halves(b[2], b[3]));
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

// s[r][j..j+4) = q[r] . k[j..j+4) for kRows query rows. Prefetches four rows of `next`, one with each line of
// the keys.
template <class T, int kRows, class Rows>
FI_INLINE void dot_block(float* s, int64_t s_stride, const typename StreamDot<T>::Query* q, int64_t q_stride,
                         const T* const (&k)[4], int64_t size, NextRows<Rows> next) {
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
  auto full_step = [&](int64_t d) {
    typename Dot::Operand kv[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) kv[c] = Dot::load_key(k[c] + d);
    step(kv, d);
  };
  constexpr int64_t kLine = 64 / int64_t(sizeof(T));
  int64_t d = 0, fetched = 0;
  for (; d + kLine <= size; d += kLine) {
    if (fetched < 4) next.prefetch(fetched++);
#pragma GCC unroll 4
    for (int64_t u = 0; u < kLine; u += Dot::kStep) full_step(d + u);
  }
  while (fetched < 4) next.prefetch(fetched++);
  for (; d + Dot::kStep <= size; d += Dot::kStep) full_step(d);
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

// Keys where they lie.
template <class T, class Rows>
struct KeysInPlace {
  Rows rows;
  int64_t bytes;  // from one head's part of a row to the next

  // Keys j..j+3 of head h, of `left` that there are.
  FI_HD void operator()(int64_t h, int64_t j, int64_t left, const T* (&key)[4]) const {
    const Rows of_head = rows.shifted(h * bytes);
    for (int c = 0; c < 4; ++c) key[c] = of_head[j + (c < left ? c : left - 1)];
  }
};

// The rows of a tile's heads in a worker's buffers: `rows` of each, `stride` from one head to the next.
struct HeadRows {
  int64_t heads, rows, stride;
};

// s[h][rows][n] = q[h] k[h]^T; keys(h, j, n - j, key) gives keys j..j+3 of head h. Columns up to the next
// multiple of 4 are written too. All heads of four keys are read before the next four, as they lie in memory.
template <class T, class Keys, class Rows>
void stream_scores(float* s, int64_t s_stride, const typename StreamDot<T>::Query* q, int64_t q_stride,
                   HeadRows of, const Keys& keys, int64_t n, int64_t size, const RowsAhead<Rows>& ahead) {
  for (int64_t j = 0; j < n; j += 4) {
    for (int64_t h = 0; h < of.heads; ++h) {
      const T* key[4];
      keys(h, j, n - j, key);
      NextRows<Rows> next = ahead.of(h, j, 4);
      const auto* q_row = q + h * of.stride * q_stride;
      float* s_row = s + h * of.stride * s_stride + j;
      for (int64_t r = 0; r < of.rows; r += 4, q_row += 4 * q_stride, s_row += 4 * s_stride) {
        switch (of.rows - r) {
          case 1:
            dot_block<T, 1>(s_row, s_stride, q_row, q_stride, key, size, next);
            break;
          case 2:
            dot_block<T, 2>(s_row, s_stride, q_row, q_stride, key, size, next);
            break;
          case 3:
            dot_block<T, 3>(s_row, s_stride, q_row, q_stride, key, size, next);
            break;
          default:
            dot_block<T, 4>(s_row, s_stride, q_row, q_stride, key, size, next);
        }
        next.bytes = 0;  // once is enough
      }
    }
  }
}

#if FI_ISA_LEVEL >= 2
inline constexpr int kValueVecs = 4;  // 16 accumulators with 4 query rows
#else
inline constexpr int kValueVecs = 2;
#endif

// acc[kRows][kVecs] += p v over n rows of V, for one strip of columns; !kFull: of its last vector `tail`
// columns.
template <int kRows, int kVecs, bool kFull, class Values>
FI_INLINE void value_block(float* acc, int64_t acc_stride, const float* p, int64_t p_stride, Values v,
                           int64_t n, int64_t tail, PacedRows<Values>& paced) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) sum[r][c] = load(acc + r * acc_stride + c * kLanes);
  }
  for (int64_t j = 0; j < n; ++j) {
    const auto* row = v[j];
    paced.step();
    Vec vv[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) {
      const auto* src = row + c * kLanes;
      vv[c] = kFull || c < kVecs - 1 ? load(src) : load_partial(src, tail);
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
// other's: so they stay in acc until order_columns(). p is 0 from n on.
template <int kRows, int kUnits, bool kFull, class Values>
FI_INLINE void value_block(float* acc, int64_t acc_stride, const bf16* p, int64_t p_stride, Values v,
                           int64_t n, int64_t tail, PacedRows<Values>& paced) {
  Vec sum[kRows][kUnits][2];
#  pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#  pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      sum[r][u][0] = load(acc + r * acc_stride + u * 32);
      sum[r][u][1] = load(acc + r * acc_stride + u * 32 + 16);
    }
  }
  const __mmask32 mask = kFull ? ~__mmask32(0) : (__mmask32(1) << tail) - 1;
  auto load_unit = [&](const bf16* row, int u) {
    return kFull || u < kUnits - 1 ? _mm512_loadu_si512(row + u * 32)
                                   : _mm512_maskz_loadu_epi16(mask, row + u * 32);
  };
  auto add_pair = [&](int64_t j, bool has_odd) {
    __m512bh low[kUnits], high[kUnits];
    const bf16 *even_row = v[j], *odd_row = has_odd ? v[j + 1] : even_row;
    paced.step();
    if (has_odd) paced.step();
#  pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      const __m512i even = load_unit(even_row, u);
      const __m512i odd = has_odd ? load_unit(odd_row, u) : _mm512_setzero_si512();
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
  };
  int64_t j = 0;
  for (; j + 2 <= n; j += 2) add_pair(j, true);
  if (j < n) add_pair(j, false);
#  pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#  pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      store(acc + r * acc_stride + u * 32, sum[r][u][0]);
      store(acc + r * acc_stride + u * 32 + 16, sum[r][u][1]);
    }
  }
}
#endif

// A row of acc, once all is added, to the order of its columns.
template <class Weight>
FI_INLINE void order_columns(float* acc, int64_t size) {
#if FI_ISA_LEVEL >= 3
  if constexpr (__is_same(Weight, bf16)) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t d = 0; d < size; d += 32) {
      const Vec low = load(acc + d), high = load(acc + d + 16);
      store(acc + d, _mm512_permutex2var_ps(low, first, high));
      store(acc + d + 16, _mm512_permutex2var_ps(low, second, high));
    }
  }
#endif
}

// acc[rows][size] += p[rows][n] v[n][size]; acc rows are padded to a multiple of two vectors. Prefetches n
// rows of `next`.
template <class Weight, class Values>
void stream_values(float* acc, int64_t acc_stride, const Weight* p, int64_t p_stride, int64_t rows, Values v,
                   int64_t n, int64_t size, NextRows<Values> next) {
  constexpr int64_t kUnit = __is_same(Weight, float) ? kLanes : 32;
  constexpr int kMost = __is_same(Weight, float) ? kValueVecs : 2;
  const int64_t wide = size / (kMost * kUnit), rest = size - wide * kMost * kUnit;
  const int64_t passes = (wide + (rest + kUnit - 1) / kUnit) * ((rows + 3) / 4);  // over the rows of v
  PacedRows<Values> paced{next, passes};
  for (int64_t r = 0; r < rows; r += 4, acc += 4 * acc_stride, p += 4 * p_stride) {
    auto strips = [&](auto block_rows) {
      constexpr int kRows = block_rows();
      int64_t d = 0;
      for (; d + kMost * kUnit <= size; d += kMost * kUnit)
        value_block<kRows, kMost, true>(acc + d, acc_stride, p, p_stride, v.columns(d), n, 0, paced);
      for (; d + kUnit <= size; d += kUnit)
        value_block<kRows, 1, true>(acc + d, acc_stride, p, p_stride, v.columns(d), n, 0, paced);
      if (d < size)
        value_block<kRows, 1, false>(acc + d, acc_stride, p, p_stride, v.columns(d), n, size - d, paced);
    };
    switch (rows - r) {
      case 1:
        strips([] { return 1; });
        break;
      case 2:
        strips([] { return 2; });
        break;
      case 3:
        strips([] { return 3; });
        break;
      default:
        strips([] { return 4; });
    }
  }
}

}  // namespace fi::FI_ISA
