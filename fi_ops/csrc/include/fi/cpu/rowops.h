// What kernels that go over rows share: walking a row by vectors with a tail, loads by run-time dtype, how
// rows are split.
#pragma once

#include "fi/cpu/parallel.h"
#include "fi/cpu/simd.h"
#include "fi/dispatch.h"

namespace fi::FI_ISA {

// Elements of a task: a few microseconds of work.
inline constexpr int64_t kTaskElements = 32768;

// An op on fewer elements than this runs on the calling thread: waking others costs 5 to 20 microseconds.
inline constexpr int64_t kParallelElements = 4 * kTaskElements;
FI_INLINE Parallel serial_if_small(const Parallel& parallel, int64_t elements) {
  return elements < kParallelElements ? Parallel{parallel.launch, 1} : parallel;
}

// Rows of a task. A function of the row's size alone, so that results don't depend on the thread count.
FI_INLINE int64_t rows_per_task(int64_t row_size) { return 1 + kTaskElements / (row_size + 1); }

// f(begin, end) over blocks of rows of `row_size` elements, on several threads where the work is worth it.
template <class F>
FI_INLINE void for_each_row_block(const Parallel& parallel, int64_t num_rows, int64_t row_size, const F& f) {
  for_each_block(serial_if_small(parallel, num_rows * row_size), num_rows, rows_per_task(row_size), f);
}

// Calls f(offset, count) for each vector of a row, the tail last: count < kLanes only there.
template <class F>
FI_INLINE void for_each_vec(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, int64_t{kLanes});
  if (i < n) f(i, n - i);
}

template <class T>
FI_INLINE Vec load_n(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_partial(p, n);
}

template <class T>
FI_INLINE void store_n(T* p, Vec x, int64_t n) {
  if (n == kLanes) {
    store(p, x);
  } else {
    store_partial(p, x, n);
  }
}

// n elements from element i of an array of float, bf16 or f16.
FI_INLINE Vec load_as(const void* p, DType dtype, int64_t i, int64_t n) {
  switch (dtype) {
    case DType::bf16:
      return load_n(static_cast<const bf16*>(p) + i, n);
    case DType::f16:
      return load_n(static_cast<const f16*>(p) + i, n);
    default:
      return load_n(static_cast<const float*>(p) + i, n);
  }
}

}  // namespace fi::FI_ISA
