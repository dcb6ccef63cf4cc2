// The two engines under latent attention: what a tile of joined rows [ckv | kpe] is multiplied with, and how.
//
//   MlaRows: dot products and weighted sums straight from the rows as they lie; blocks of them fill 32
//   registers. MlaTiles: keys and values packed, where that is faster.
#pragma once

#include "fi/cpu/attention_engine.h"

namespace fi::FI_ISA {

// Values of rows of T times weights: kKeys keys a step, kVecs * kLanes columns at a time.
template <class T>
struct MlaValues {
  using Weight = float;
  using Operand = Vec;
  static constexpr int64_t kKeys = 1;

  template <int kVecs>
  FI_INLINE void load_columns(const char* const* rows, int64_t offset, Vec (&v)[kVecs]) {
    const T* row = reinterpret_cast<const T*>(rows[0] + offset);
#pragma GCC unroll 4
    for (int i = 0; i < kVecs; ++i) v[i] = load(row + i * kLanes);
  }
  FI_INLINE Vec broadcast(const float* p) { return set1(*p); }
  FI_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
};

#if FI_ISA_LEVEL >= 3
// Pairs of rows, interleaved within 128-bit lanes; sums are in that order too until order_columns().
template <>
struct MlaValues<bf16> {
  using Weight = bf16;
  using Operand = __m512bh;
  static constexpr int64_t kKeys = 2;

  template <int kVecs>
  FI_INLINE void load_columns(const char* const* rows, int64_t offset, __m512bh (&v)[kVecs]) {
    const char *even = rows[0] + offset, *odd = rows[1] + offset;
#  pragma GCC unroll 4
    for (int i = 0; i < kVecs; i += 2) {
      const __m512i a = _mm512_loadu_si512(even + i * 32), b = _mm512_loadu_si512(odd + i * 32);
      v[i] = (__m512bh)_mm512_unpacklo_epi16(a, b);
      v[i + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
    }
  }
  FI_INLINE __m512bh broadcast(const bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  FI_INLINE Vec multiply_add(__m512bh a, __m512bh b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
};
#endif

// acc[kRows][4 * kLanes] = or += p[kRows][n] v[n][4 * kLanes]; n is a multiple of kKeys. A constant stride of
// p leaves the addresses in few registers.
template <class T, int kRows, int64_t kStride>
[[gnu::noinline]] void mla_value_block(float* acc, int64_t acc_stride, const typename MlaValues<T>::Weight* p,
                                       const char* const* rows, int64_t offset, int64_t n, bool accumulate) {
  using Values = MlaValues<T>;
  Vec sum[kRows][4] = {};
  for (int64_t j = 0; j < n; j += Values::kKeys) {
    typename Values::Operand v[4];
    Values::load_columns(rows + j, offset, v);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename Values::Operand w = Values::broadcast(p + r * kStride + j);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[r][i] = Values::multiply_add(w, v[i], sum[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r, acc += acc_stride) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* dst = acc + i * kLanes;
      store(dst, accumulate ? load(dst) + sum[r][i] : sum[r][i]);
    }
  }
}

// between(): called many times, evenly, while a tile is worked on.
template <class T>
struct MlaRows {
  using Query = typename StreamDot<T>::Query;
  static constexpr int64_t kStepDepth = StreamDot<T>::kStep;
  static constexpr int64_t kStepKeys = kLanes;  // weights are 0 up to a multiple
  static constexpr int64_t kStepRows = 1;
  static constexpr int64_t kStepColumns = 2 * kLanes;  // that may lie in another order until order()
  static constexpr int64_t kTaskRows = 128;
  static constexpr int64_t kTile = 64;
  static constexpr int64_t kScoreKeys = 8;  // stay in a level-1 cache while all query rows pass
  static constexpr int64_t kColumns = 4 * kLanes;
  static constexpr int64_t kBlockRows = 6;  // 24 accumulators of 32 registers

  struct Buffers {
    void carve(Carver&, int64_t, int64_t) {}
  };

  static void begin() {}
  static void end() {}

  // Calls of between().
  static int64_t calls(int64_t rows, int64_t n, int64_t size_vo) {
    return ceil_div(n, kScoreKeys) * ceil_div(rows, 4) + ceil_div(rows, kBlockRows) * (size_vo / kColumns);
  }

  // s[rows][n] = q k^T.
  template <class Between>
  static void scores(float* s, int64_t s_stride, const Query* q, int64_t q_stride, int64_t rows,
                     PointerRows<T> k, int64_t n, int64_t size, int64_t, Buffers&, Between& between) {
    for (int64_t j = 0; j < n; j += kScoreKeys) {
      const int64_t count = n - j < kScoreKeys ? n - j : kScoreKeys;
      const PointerRows<T> keys = k.from(j);
      const RowsAhead<PointerRows<T>> nothing{keys, count, keys, 0, count, 0, 0};  // between() fetches
      for (int64_t r = 0; r < rows; r += 4) {
        between();
        stream_scores<T>(s + r * s_stride + j, s_stride, q + r * q_stride, q_stride,
                         {1, rows - r < 4 ? rows - r : 4, 0}, KeysInPlace<T, PointerRows<T>>{keys, 0}, count,
                         size, nothing);
      }
    }
  }

  // acc[rows][size] = or += p[rows][n] v[n][size], with columns as stream_values has them. Where n is odd,
  // v[n] is a row of zeros.
  template <int64_t kStride, class Between>
  static void values(float* acc, int64_t acc_stride, const Query* p, int64_t rows, PointerRows<T> v,
                     int64_t n, int64_t size, bool accumulate, Buffers&, Between& between) {
    const int64_t steps = round_up(n, MlaValues<T>::kKeys), blocks = ceil_div(rows, kBlockRows);
    int64_t d = 0;
    for (; d + kColumns <= size; d += kColumns) {
      for (int64_t block = 0; block < blocks; ++block) {
        between();
        const int64_t r = rows * block / blocks, count = rows * (block + 1) / blocks - r;
        const auto run = [&](auto block_rows) {
          mla_value_block<T, block_rows(), kStride>(acc + r * acc_stride + d, acc_stride, p + r * kStride,
                                                    v.rows, d * int64_t(sizeof(T)), steps, accumulate);
        };
        switch (count) {
          case 1:
            run([] { return 1; });
            break;
          case 2:
            run([] { return 2; });
            break;
          case 3:
            run([] { return 3; });
            break;
          case 4:
            run([] { return 4; });
            break;
          case 5:
            run([] { return 5; });
            break;
          default:
            run([] { return 6; });
        }
      }
    }
    if (d < size) {
      const int64_t bytes = (round_up(size, 2 * kLanes) - d) * int64_t(sizeof(float));
      for (int64_t r = 0; !accumulate && r < rows; ++r) __builtin_memset(acc + r * acc_stride + d, 0, bytes);
      stream_values(acc + d, acc_stride, p, kStride, rows, v.columns(d), n, size - d,
                    NextRows<PointerRows<T>>{v, 0});
    }
  }

  static void order(float* acc, int64_t size) { order_columns<Query>(acc, size); }
};

template <class T, class Unit>
struct MlaTiles {
  using Query = typename Unit::Element;
  static constexpr int64_t kStepDepth = Unit::kStepK;
  static constexpr int64_t kStepKeys = kLanes > Unit::kStepK ? kLanes : Unit::kStepK;
  static constexpr int64_t kStepRows = Unit::kStepRows;
  static constexpr int64_t kStepColumns = kLanes;
  static constexpr int64_t kTaskRows = Unit::kTaskRows;
  static constexpr int64_t kTile = 64;

  struct Buffers {
    Query *keys, *values;  // packed
    void carve(Carver& carver, int64_t depth, int64_t size_vo) {
      keys = carver.take<Query>(kTile * depth);
      values = carver.take<Query>(kTile * round_up(size_vo, kLanes));
    }
  };

  static void begin() { Unit::begin(); }
  static void end() { Unit::end(); }

  static int64_t calls(int64_t, int64_t n, int64_t size_vo) { return num_key_blocks<Unit>(n, size_vo); }

  template <class Between>
  static void scores(float* s, int64_t s_stride, const Query* q, int64_t q_stride, int64_t rows,
                     PointerRows<T> k, int64_t n, int64_t size, int64_t depth, Buffers& w, Between& between) {
    pack_keys<Unit>(w.keys, k, n, size, depth, between);
    Unit::gemm(q, q_stride, w.keys, depth * kLanes, s, s_stride, round_up(rows, kStepRows),
               ceil_div(n, kLanes), depth, false);
  }

  template <int64_t kStride, class Between>
  static void values(float* acc, int64_t acc_stride, const Query* p, int64_t rows, PointerRows<T> v,
                     int64_t n, int64_t size, bool accumulate, Buffers& w, Between&) {
    const int64_t n_padded = round_up(n, Unit::kStepK);
    pack_values<Unit>(w.values, v, n, size, n_padded, kTile * kLanes);
    Unit::gemm(p, kStride, w.values, kTile * kLanes, acc, acc_stride, round_up(rows, kStepRows),
               ceil_div(size, kLanes), n_padded, accumulate);
  }

  static void order(float*, int64_t) {}
};

template <class T, class Unit>
struct MlaEngineOf {
#if FI_ISA_LEVEL >= 2
  using type = MlaRows<T>;
#else
  using type = MlaTiles<T, Unit>;
#endif
};

#if FI_ISA_LEVEL == 2 || FI_ISA_LEVEL >= 4
// bf16 takes two instructions to widen, too many to do it again for every four rows; AMX takes what is
// packed.
template <class Unit>
struct MlaEngineOf<bf16, Unit> {
  using type = MlaTiles<bf16, Unit>;
};
#endif

}  // namespace fi::FI_ISA
