// What kernels that go over rows share: walking a row by vectors with a tail, loads by run-time dtype, how
// rows are split.
#pragma once

#include "fi/cpu/simd.h"

namespace fi::FI_ISA {

// Elements of a task: a few microseconds of work, which is what waking a thread costs; an op that has less
// runs on the calling thread.
inline constexpr int64_t kTaskElements = 32768;

// Rows of a task. A function of the row's size alone, so that results don't depend on the thread count.
FI_INLINE int64_t rows_per_task(int64_t row_size) { return 1 + kTaskElements / (row_size + 1); }

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

// Calls f(T{}) with the storage type of `dtype`.
template <class F>
FI_INLINE void dispatch_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

}  // namespace fi::FI_ISA
