// RMSNorm and LayerNorm: one row a time, statistics in fp32, the row read twice (the second time from L1).
#include "fi/cpu/norm.h"

#include "fi/cpu/simd.h"

namespace fi::FI_ISA {
namespace {

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

FI_INLINE Vec load_weight(const void* p, DType dtype, int64_t i, int64_t n) {
  switch (dtype) {
    case DType::bf16: return load_n(static_cast<const bf16*>(p) + i, n);
    case DType::f16: return load_n(static_cast<const f16*>(p) + i, n);
    default: return load_n(static_cast<const float*>(p) + i, n);
  }
}

// Rows of a task: enough work to be worth handing out.
FI_INLINE int64_t rows_per_task(int64_t hidden_size) { return 1 + 16384 / (hidden_size + 1); }

template <class T>
void rmsnorm_rows(const NormParams& p, int64_t begin, int64_t end, float* sum_row) {
  const int64_t n = p.hidden_size;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.input) + p.input_rows.offset(row);
    T* y = static_cast<T*>(p.output) + p.output_rows.offset(row);
    Vec squares = zero();
    if (p.residual != nullptr) {
      // The sum is normalised before it is rounded to T, so it is kept in fp32 for the second pass.
      T* residual = static_cast<T*>(p.residual_output) + p.residual_rows.offset(row);
      for_each_vec(n, [&](int64_t i, int64_t count) {
        Vec v = load_n(x + i, count) + load_n(residual + i, count);
        store_n(sum_row + i, v, count);
        store_n(residual + i, v, count);
        squares = fma(v, v, squares);
      });
    } else {
      for_each_vec(n, [&](int64_t i, int64_t count) {
        Vec v = load_n(x + i, count);
        squares = fma(v, v, squares);
      });
    }
    const float scale = 1.0f / __builtin_sqrtf(reduce_add(squares) / float(n) + p.eps);
    for_each_vec(n, [&](int64_t i, int64_t count) {
      Vec v = p.residual != nullptr ? load_n(sum_row + i, count) : load_n(x + i, count);
      Vec w = load_weight(p.weight, p.weight_dtype, i, count) + p.weight_offset;
      store_n(y + i, v * scale * w, count);
    });
  }
}

template <class T>
void layernorm_rows(const NormParams& p, int64_t begin, int64_t end) {
  const int64_t n = p.hidden_size;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.input) + p.input_rows.offset(row);
    T* y = static_cast<T*>(p.output) + p.output_rows.offset(row);
    Vec sum = zero();
    for_each_vec(n, [&](int64_t i, int64_t count) { sum += load_n(x + i, count); });
    const float mean = reduce_add(sum) / float(n);
    // A second pass for the variance: no cancellation, whatever the mean.
    Vec squares = zero();
    for_each_vec(n, [&](int64_t i, int64_t count) {
      Vec d = load_n(x + i, count) - mean;
      if (count < kLanes) d = select(iota_i() < int32_t(count), d, zero());
      squares = fma(d, d, squares);
    });
    const float scale = 1.0f / __builtin_sqrtf(reduce_add(squares) / float(n) + p.eps);
    for_each_vec(n, [&](int64_t i, int64_t count) {
      Vec v = (load_n(x + i, count) - mean) * scale;
      Vec w = load_weight(p.weight, p.weight_dtype, i, count);
      store_n(y + i, fma(v, w, load_weight(p.bias, p.bias_dtype, i, count)), count);
    });
  }
}

template <class F>
FI_INLINE void dispatch_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
    default: return f(float{});
  }
}

}  // namespace

void rmsnorm(const NormParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_block(parallel, p.input_rows.num_rows, rows_per_task(p.hidden_size), [&](int64_t begin, int64_t end) {
      float* sum_row = p.residual != nullptr ? static_cast<float*>(__builtin_malloc(sizeof(float) * p.hidden_size)) : nullptr;
      rmsnorm_rows<T>(p, begin, end, sum_row);
      __builtin_free(sum_row);
    });
  });
}

void layernorm(const NormParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_block(parallel, p.input_rows.num_rows, rows_per_task(p.hidden_size),
                   [&](int64_t begin, int64_t end) { layernorm_rows<T>(p, begin, end); });
  });
}

}  // namespace fi::FI_ISA
