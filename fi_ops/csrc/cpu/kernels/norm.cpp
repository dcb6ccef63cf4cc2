// RMSNorm and LayerNorm: one row a time, statistics in fp32, the row read twice (the second time from L1).
#include "fi/norm.h"

#include "fi/cpu/rowops.h"

namespace fi::FI_ISA {
namespace {

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
      Vec w = load_as(p.weight, p.weight_dtype, i, count) + p.weight_offset;
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
      Vec w = load_as(p.weight, p.weight_dtype, i, count);
      store_n(y + i, fma(v, w, load_as(p.bias, p.bias_dtype, i, count)), count);
    });
  }
}

}  // namespace

void rmsnorm(const NormParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_row_block(parallel, p.input_rows.num_rows, p.hidden_size, [&](int64_t begin, int64_t end) {
      float* sum_row = p.residual != nullptr
                           ? static_cast<float*>(__builtin_malloc(sizeof(float) * p.hidden_size))
                           : nullptr;
      rmsnorm_rows<T>(p, begin, end, sum_row);
      __builtin_free(sum_row);
    });
  });
}

void layernorm(const NormParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_row_block(parallel, p.input_rows.num_rows, p.hidden_size,
                       [&](int64_t begin, int64_t end) { layernorm_rows<T>(p, begin, end); });
  });
}

}  // namespace fi::FI_ISA
