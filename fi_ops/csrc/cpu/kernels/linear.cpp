// Linear layers of few rows: dot products straight from the rows of the weight as they lie in memory, each
// read once for up to 16 rows of input. What limits it is memory, so while four rows of the weight are
// multiplied, the next four are on their way.
#include "fi/linear.h"

#include "fi/cpu/rowops.h"
#include "fi/cpu/stream_gemv.h"

namespace fi::FI_ISA {
namespace {

// Rows of input that share one reading of the weights: their accumulators stay in L1.
constexpr int64_t kGroupRows = 16;

// Outputs of a block: as many sums as one reduction makes.
constexpr int64_t kBlockColumns = 16;

// Weights of a task, at the most: they stay in L2 for further groups of rows.
constexpr int64_t kTaskBytes = 64 * 1024;

// Bytes of a row of weights that go through at a time: four of them stay in L1 for all rows of a group.
constexpr int64_t kSliceBytes = 8192;

// acc[r][c] += x[r] * w[c], lane by lane, over `size` elements: c counts the four rows of the weight, of
// which those that are none repeat another. Prefetches `next`, what the same rows are multiplied with next.
template <class T, int kRows, bool kPrefetch>
FI_INLINE void multiply_block(Vec* acc, const typename StreamDot<T>::Query* x, int64_t x_stride,
                              const T* const (&w)[4], const T* const (&next)[4], int64_t size, bool first) {
  using Dot = StreamDot<T>;
  Vec sum[kRows][4];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = first ? zero() : acc[r * kBlockColumns + c];
  }
  auto step = [&](const typename Dot::Operand(&wv)[4], int64_t k) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const typename Dot::Operand xv = Dot::load_query(x + r * x_stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[r][c] = Dot::multiply_add(xv, wv[c], sum[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + Dot::kStep <= size; k += Dot::kStep) {
    typename Dot::Operand wv[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      wv[c] = Dot::load_key(w[c] + k);
      if constexpr (kPrefetch) __builtin_prefetch(next[c] + k, 0, 3);
    }
    step(wv, k);
  }
  if (k < size) {
    typename Dot::Operand wv[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) wv[c] = Dot::load_key_partial(w[c] + k, size - k);
    step(wv, k);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[r * kBlockColumns + c] = sum[r][c];
  }
}

// sums[c] = the lanes of acc[c] added up, in an order that depends neither on c nor on other rows.
FI_INLINE void reduce_columns(float (&sums)[kBlockColumns], const Vec* acc) {
#if FI_ISA_LEVEL >= 2
  Vec v[kBlockColumns];
#  pragma GCC unroll 16
  for (int c = 0; c < kBlockColumns; ++c) v[c] = acc[c];
  store(sums, reduce_add16(v));
#else
  for (int c = 0; c < kBlockColumns; c += 4)
    reduce_add4(sums + c, acc[c], acc[c + 1], acc[c + 2], acc[c + 3]);
#endif
}

// The input as the products take it: rows of Query, padded with 0 to whole steps.
template <class T>
struct PackedInput {
  using Query = typename StreamDot<T>::Query;
  Query* rows;
  int64_t stride;
};

template <class T>
void pack_row(typename StreamDot<T>::Query* dst, int64_t stride, const T* src, int64_t size) {
  if constexpr (__is_same(typename StreamDot<T>::Query, T)) {
    __builtin_memcpy(dst, src, size * sizeof(T));
  } else {
    for_each_vec(size, [&](int64_t i, int64_t count) { store(dst + i, load_n(src + i, count)); });
  }
  if (size < stride) __builtin_memset(static_cast<void*>(dst + size), 0, (stride - size) * sizeof(*dst));
}

// Outputs [begin, end) of rows [row, row + rows), rows <= kGroupRows.
template <class T>
void linear_block(const LinearParams& p, const PackedInput<T>& x, int64_t row, int64_t rows, int64_t begin,
                  int64_t end) {
  constexpr int64_t slice = kSliceBytes / sizeof(T);
  Vec acc[kGroupRows * kBlockColumns] = {};
  const T* weight = static_cast<const T*>(p.weight);
  auto weight_row = [&](int64_t c) {
    return weight + (c < p.out_features ? c : p.out_features - 1) * p.weight_stride;
  };
  for (int64_t block = begin; block < end; block += kBlockColumns) {
    const int64_t columns = end - block < kBlockColumns ? end - block : kBlockColumns;
    for (int64_t k = 0; k < p.in_features || k == 0; k += slice) {
      const int64_t size = p.in_features - k < slice ? p.in_features - k : slice;
      for (int64_t c = 0; c < columns; c += 4) {
        const T *w[4], *next[4];
        for (int i = 0; i < 4; ++i) {
          w[i] = weight_row(block + c + i) + k;
          next[i] = weight_row(block + c + i + 4) + k;
        }
        auto run = [&](auto block_rows, auto prefetch, int64_t r) {
          multiply_block<T, block_rows(), prefetch()>(acc + r * kBlockColumns + c,
                                                      x.rows + (row + r) * x.stride + k, x.stride, w, next,
                                                      size, k == 0);
        };
        auto with_rows = [&](auto prefetch, int64_t r) {
          switch (rows - r) {
            case 1:
              return run([] { return 1; }, prefetch, r);
            case 2:
              return run([] { return 2; }, prefetch, r);
            case 3:
              return run([] { return 3; }, prefetch, r);
            default:
              return run([] { return 4; }, prefetch, r);
          }
        };
        with_rows([] { return true; }, 0);
        for (int64_t r = 4; r < rows; r += 4) with_rows([] { return false; }, r);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      alignas(64) float sums[kBlockColumns];
      reduce_columns(sums, acc + r * kBlockColumns);
      T* y = static_cast<T*>(p.output) + p.output_rows.offset(row + r) + block;
      for_each_vec(columns, [&](int64_t i, int64_t count) {
        Vec v = load(sums + i);
        if (p.bias != nullptr) v += load_n(static_cast<const T*>(p.bias) + block + i, count);
        store_n(y + i, v, count);
      });
    }
  }
}

template <class T>
void linear_with(const LinearParams& p, const Parallel& parallel) {
  using Dot = StreamDot<T>;
  const int64_t rows = p.input_rows.num_rows;
  if (rows == 0 || p.out_features == 0) return;
  const int64_t stride = (p.in_features + Dot::kStep - 1) / Dot::kStep * Dot::kStep;
  using Query = typename Dot::Query;
  PackedInput<T> x{static_cast<Query*>(__builtin_malloc(sizeof(Query) * (rows * stride + 1))), stride};
  for_each_row_block(parallel, rows, p.in_features, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      pack_row<T>(x.rows + row * stride, stride, static_cast<const T*>(p.input) + p.input_rows.offset(row),
                  p.in_features);
    }
  });
  const int64_t row_bytes = kBlockColumns * (p.in_features * int64_t(sizeof(T)) + 1);
  const int64_t blocks = kTaskBytes > row_bytes ? kTaskBytes / row_bytes : 1;
  const int64_t work = p.out_features * p.in_features * (1 + rows / kGroupRows);
  for_each_block(serial_if_small(parallel, work), p.out_features, blocks * kBlockColumns,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = 0; row < rows; row += kGroupRows) {
                     const int64_t group = rows - row < kGroupRows ? rows - row : kGroupRows;
                     linear_block<T>(p, x, row, group, begin, end);
                   }
                 });
  __builtin_free(x.rows);
}

}  // namespace

void linear(const LinearParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) { linear_with<decltype(t)>(p, parallel); });
}

}  // namespace fi::FI_ISA
