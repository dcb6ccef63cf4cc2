// Linear layers of few rows: dot products straight from the rows of the weight as they lie in memory, each
// read once for up to 16 rows of input. What limits it is memory, so while four rows of the weight are
// multiplied, the next four are on their way.
#include "fi/linear.h"

#include "fi/cpu/rowops.h"
#include "fi/cpu/stream_gemv.h"

namespace fi::FI_ISA {
namespace {

// Rows of input that share one reading of the weights.
constexpr int64_t kGroupRows = 16;

// A tile of sums in registers, kTileRows of the input by kTileColumns of the weight. It is wide because what
// is read again and again for the next rows are the weights, which stay in L1; the input comes from L2.
constexpr int kTileRows = 2;
#if FI_ISA_LEVEL >= 2
constexpr int kTileColumns = 8;
#else
constexpr int kTileColumns = 4;
#endif

// Bytes of a row of weights that go through at a time: a tile's and the next one's stay in L1.
constexpr int64_t kSliceBytes = 2048;

// Outputs whose sums are kept until they are written.
constexpr int64_t kBlockColumns = 16;

// Weights of a task, at the most: they stay in L2 for further groups of rows.
constexpr int64_t kTaskBytes = 64 * 1024;

// Walks the weights of a tile line by line, each row from start to end: memory is fastest in that order. All
// passes over the tile before take their share of it, or memory would stand still during some of them.
struct Prefetch {
  const char* at;
  int64_t left;             // bytes of the row
  int64_t row_bytes, skip;  // between the end of a row and the next one

  template <int kLines>
  [[gnu::always_inline]] void step() {
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(at + 64 * i, 0, 3);
    at += 64 * kLines;
    left -= 64 * kLines;
    if (left <= 0) {
      at += skip;
      left = row_bytes;
    }
  }
};

// sums[r][c] = x[r] . w[c] over `size` elements, for kRows rows of the input and kTileColumns of the weight.
// The order of additions depends neither on the place of a row nor on its neighbours. (Not inlined: what the
// loops around it keep in registers would push the sums out of theirs.)
template <class T, int kRows, int kLines>
[[gnu::noinline]] void multiply_tile(float (&sums)[kTileRows][kTileColumns],
                                     const typename StreamDot<T>::Query* x, int64_t x_stride, const T* w,
                                     int64_t w_stride, int64_t size, Prefetch& prefetch) {
  using Dot = StreamDot<T>;
  Vec acc[kRows][kTileColumns] = {};
  auto step = [&](auto load_weight) {
    typename Dot::Operand xv[kRows];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) xv[r] = Dot::load_query(x + r * x_stride);
#pragma GCC unroll 8
    for (int c = 0; c < kTileColumns; ++c) {
      const typename Dot::Operand wv = load_weight(w + c * w_stride);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) acc[r][c] = Dot::multiply_add(xv[r], wv, acc[r][c]);
    }
    x += Dot::kStep;
    w += Dot::kStep;
  };
  Prefetch next = prefetch;
  int64_t left = size;
  for (; left >= Dot::kStep; left -= Dot::kStep) {
    next.step<kLines>();
    step([](const T* p) { return Dot::load_key(p); });
  }
  prefetch = next;
  if (left > 0) step([&](const T* p) { return Dot::load_key_partial(p, left); });
#if FI_ISA_LEVEL >= 2
  Vec flat[16] = {};
#  pragma GCC unroll 16
  for (int i = 0; i < kRows * kTileColumns; ++i) flat[i] = acc[i / kTileColumns][i % kTileColumns];
  store(sums[0], reduce_add16(flat));
#else
#  pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) reduce_add4(sums[r], acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
#endif
}

FI_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The input as the products take it: rows of Query, padded with 0 to whole steps.
template <class T>
struct PackedInput {
  typename StreamDot<T>::Query* rows;
  int64_t stride;
};

template <class T>
void pack_row(typename StreamDot<T>::Query* dst, int64_t stride, const T* src, int64_t size) {
  if constexpr (__is_same(typename StreamDot<T>::Query, T)) {
    if (size > 0) __builtin_memcpy(dst, src, size * sizeof(T));  // without features there may be no tensor
  } else {
    for_each_vec(size, [&](int64_t i, int64_t count) { store_n(dst + i, load_n(src + i, count), count); });
  }
  __builtin_memset(static_cast<void*>(dst + size), 0, (stride - size) * sizeof(*dst));
}

// Outputs [begin, end) of `rows` rows from `row` on, in up to kPasses passes over the weights, of which all
// but the first find them in L1.
template <class T, int kPasses>
void linear_block(const LinearParams& p, const PackedInput<T>& x, int64_t row, int64_t rows, int64_t begin,
                  int64_t end) {
  // Slices of one size, all but the last, so that the way through memory is even.
  const int64_t num_slices = (p.in_features * int64_t(sizeof(T)) + kSliceBytes - 1) / kSliceBytes;
  const int64_t slice =
      num_slices > 1 ? round_up((p.in_features + num_slices - 1) / num_slices, 64) : p.in_features;
  constexpr int64_t step_lines = kTileColumns * StreamDot<T>::kStep * int64_t(sizeof(T)) / 64;
  constexpr int lines = step_lines > kPasses ? step_lines / kPasses : 1;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t block = begin; block < end; block += kBlockColumns) {
    const int64_t columns = end - block < kBlockColumns ? end - block : kBlockColumns;
    float sums[kGroupRows][kBlockColumns] = {};
    for (int64_t c = 0, width; c < columns; c += width) {
      // The last few columns go one by one, each as a tile of its copies.
      width = columns - c < kTileColumns ? 1 : kTileColumns;
      const int64_t w_stride = width == 1 ? 0 : p.weight_stride;
      for (int64_t k = 0; k < p.in_features; k += slice) {
        const int64_t left = p.in_features - k, size = left < slice ? left : slice;
        const T* w = weight + (block + c) * p.weight_stride + k;
        const T* w_next = left > slice ? w + slice : w - k + width * p.weight_stride;
        const int64_t row_bytes = size * sizeof(T);
        Prefetch next{reinterpret_cast<const char*>(w_next), row_bytes, row_bytes,
                      p.weight_stride * int64_t(sizeof(T)) - row_bytes};
        const typename StreamDot<T>::Query* xs = x.rows + row * x.stride + k;
        for (int64_t r = 0; r < rows; r += kTileRows) {
          float tile[kTileRows][kTileColumns];
          const int64_t tile_rows = rows - r < kTileRows ? rows - r : kTileRows;
          if (tile_rows == 2) {
            multiply_tile<T, 2, lines>(tile, xs + r * x.stride, x.stride, w, w_stride, size, next);
          } else {
            multiply_tile<T, 1, lines>(tile, xs + r * x.stride, x.stride, w, w_stride, size, next);
          }
          for (int64_t i = 0; i < tile_rows; ++i) {
            for (int64_t j = 0; j < width; ++j) sums[r + i][c + j] += tile[i][j];
          }
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* y = static_cast<T*>(p.output) + p.output_rows.offset(row + r) + block;
      for_each_vec(columns, [&](int64_t i, int64_t count) {
        Vec v = load(sums[r] + i);
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
  const int64_t stride = round_up(p.in_features, Dot::kStep);
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
                     if (group > 8) {
                       linear_block<T, 8>(p, x, row, group, begin, end);
                     } else if (group > 4) {
                       linear_block<T, 4>(p, x, row, group, begin, end);
                     } else if (group > 2) {
                       linear_block<T, 2>(p, x, row, group, begin, end);
                     } else {
                       linear_block<T, 1>(p, x, row, group, begin, end);
                     }
                   }
                 });
  __builtin_free(x.rows);
}

}  // namespace

void linear(const LinearParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) { linear_with<decltype(t)>(p, parallel); });
}

}  // namespace fi::FI_ISA
