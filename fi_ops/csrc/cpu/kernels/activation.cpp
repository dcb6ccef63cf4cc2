// Gated activations, one pass over memory.
#include "fi/activation.h"

#include "fi/cpu/rowops.h"

namespace fi::FI_ISA {
namespace {

FI_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)): no cancellation for negative x.
FI_INLINE Vec gelu_tanh(Vec x) {
  const float k = 0.7978845608028654f;  // sqrt(2 / pi)
  const Vec u = k * x * fma(x * x, set1(0.044715f), set1(1.0f));
  return x / (1.0f + exp(-2.0f * u));
}

// x * (standard normal distribution function), through erfc(z) = e^(-z^2) t q(t), t = 1 / (1 + 0.3275911 z),
// z >= 0: the small tail is computed by itself, so that large negative x keeps its digits. q is a Chebyshev
// fit of degree 9, error below 3e-9.
FI_INLINE Vec gelu(Vec x) {
  const Vec z = abs(x) * 0.7071067811865476f;
  const Vec t = 1.0f / fma(z, set1(0.3275911f), set1(1.0f));
  Vec q = set1(0.05965271011f);
  q = fma(q, t, set1(-0.3332805835f));
  q = fma(q, t, set1(0.6653278460f));
  q = fma(q, t, set1(-0.6107219778f));
  q = fma(q, t, set1(0.5435790095f));
  q = fma(q, t, set1(-0.07310125341f));
  q = fma(q, t, set1(0.2138408130f));
  q = fma(q, t, set1(0.1639340626f));
  q = fma(q, t, set1(0.1860011060f));
  q = fma(q, t, set1(0.1847682677f));
  const Vec tail = 0.5f * t * q * exp(-0.5f * x * x);
  return x * select(x > 0.0f, 1.0f - tail, tail);
}

// Tasks are blocks of rows, and of columns where rows are long: a decode step has one row.
template <class T, class F>
FI_INLINE void gated(const ActivationParams& p, const Parallel& parallel, const F& act) {
  const int64_t n = p.hidden_size, num_rows = p.input_rows.num_rows;
  if (n == 0 || num_rows == 0) return;
  const int64_t columns = n < kTaskElements ? n : kTaskElements;
  const int64_t rows = rows_per_task(columns);
  const int64_t column_tasks = (n + columns - 1) / columns, row_tasks = (num_rows + rows - 1) / rows;
  for_each_task(serial_if_small(parallel, 2 * n * num_rows), row_tasks * column_tasks, [&](int64_t task) {
    const int64_t first = task % column_tasks * columns, row_begin = task / column_tasks * rows;
    const int64_t count = n - first < columns ? n - first : columns;
    const int64_t row_end = row_begin + rows < num_rows ? row_begin + rows : num_rows;
    for (int64_t row = row_begin; row < row_end; ++row) {
      const T* x = static_cast<const T*>(p.input) + p.input_rows.offset(row) + first;
      T* y = static_cast<T*>(p.output) + row * n + first;
      for_each_vec(count, [&](int64_t i, int64_t lanes) {
        store_n(y + i, act(load_n(x + i, lanes)) * load_n(x + n + i, lanes), lanes);
      });
    }
  });
}

}  // namespace

void silu_and_mul(const ActivationParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) { gated<decltype(t)>(p, parallel, [](Vec x) { return silu(x); }); });
}

void gelu_and_mul(const ActivationParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype, [&](auto t) { gated<decltype(t)>(p, parallel, [](Vec x) { return gelu(x); }); });
}

void gelu_tanh_and_mul(const ActivationParams& p, const Parallel& parallel) {
  dispatch_float(p.dtype,
                 [&](auto t) { gated<decltype(t)>(p, parallel, [](Vec x) { return gelu_tanh(x); }); });
}

}  // namespace fi::FI_ISA
