// RMSNorm and LayerNorm. A row is held in registers by 1 to 1024 threads, so that it is read once, or, where
// that is not enough, read again for each step.
#pragma once

#include "fi/cuda/reduce.h"
#include "fi/cuda/rowops.h"
#include "fi/norm.h"

namespace fi::cuda {

enum class NormKind { rms, add_rms, layer };

// Packs of N elements that a thread can hold: 16 elements, fewer where each needs an address of its own.
template <int N>
inline constexpr int kHeldPacks = N == 1 ? 8 : 16 / N;

// One row's pointers.
template <class T>
struct NormRow {
  const T* x;
  T* residual;
  T* y;

  template <NormKind kind>
  static FI_DEVICE_INLINE NormRow at(const NormParams& p, int64_t row) {
    return {static_cast<const T*>(p.input) + p.input_rows.offset(row),
            kind == NormKind::add_rms ? static_cast<T*>(p.residual_output) + p.residual_rows.offset(row)
                                      : nullptr,
            static_cast<T*>(p.output) + p.output_rows.offset(row)};
  }
};

template <NormKind kind, int N, class T>
FI_DEVICE_INLINE void load_element_pack(float (&v)[N], const NormRow<T>& row, int64_t i) {
  load_pack(v, row.x + i);
  if constexpr (kind == NormKind::add_rms) {
    float r[N];
    load_pack(r, row.residual + i);
#pragma unroll
    for (int e = 0; e < N; ++e) v[e] += r[e];
  }
}

template <NormKind kind, int N>
FI_DEVICE_INLINE void load_weight_pack(float (&w)[N], float (&bias)[N], const NormParams& p, int64_t i) {
  load_pack_as(w, p.weight, p.weight_dtype, i);
  if constexpr (kind == NormKind::layer) {
    load_pack_as(bias, p.bias, p.bias_dtype, i);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      w[e] += p.weight_offset;
      bias[e] = 0.0f;
    }
  }
}

template <NormKind kind, int N, class T>
FI_DEVICE_INLINE void store_normalized(const NormRow<T>& row, int64_t i, const float (&v)[N],
                                       const float (&w)[N], const float (&bias)[N], float mean, float scale) {
  float y[N];
#pragma unroll
  for (int e = 0; e < N; ++e)
    y[e] = kind == NormKind::layer ? fmaf((v[e] - mean) * scale, w[e], bias[e]) : v[e] * scale * w[e];
  store_pack(row.y + i, y);
}

FI_DEVICE_INLINE float scale_of(float squares, const NormParams& p) {
  return 1.0f / sqrtf(squares / static_cast<float>(p.hidden_size) + p.eps);
}

// A thread holds Packs packs of N elements: pack k of thread t is pack k * blockDim.x + t of the row.
template <NormKind kind, class T, int N, int Packs>
__global__ void __launch_bounds__(1024) norm_in_registers(const __grid_constant__ NormParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t n = p.hidden_size, index = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool live = index < p.input_rows.num_rows;  // threads of no row still take part in the sums
  const auto row = NormRow<T>::template at<kind>(p, live ? index : 0);
  auto element = [&](int k) { return (int64_t{k} * blockDim.x + threadIdx.x) * N; };
  auto inside = [&](int k) { return live && element(k) < n; };

  // Weights are loaded before the sum is known, so that a decode step doesn't wait for memory twice, as long
  // as there are registers for them.
  constexpr bool early = Packs == 1 || (Packs == 2 && kind != NormKind::layer);
  float v[Packs][N], w[early ? Packs : 1][N], bias[early ? Packs : 1][N], sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int k = 0; k < Packs; ++k) {
    if (inside(k)) {
      load_element_pack<kind>(v[k], row, element(k));
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) v[k][e] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < Packs; ++k)
    if (early && inside(k)) load_weight_pack<kind>(w[k], bias[k], p, element(k));
#pragma unroll
  for (int k = 0; k < Packs; ++k) {
    if (kind == NormKind::add_rms && inside(k)) store_pack(row.residual + element(k), v[k]);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      sum += v[k][e];
      squares = fmaf(v[k][e], v[k][e], squares);
    }
  }
  float mean = 0.0f;
  if constexpr (kind == NormKind::layer) {
    // The variance after the mean: no cancellation, whatever the mean.
    mean = sum_along_x(sum) / static_cast<float>(n);
    squares = 0.0f;
#pragma unroll
    for (int k = 0; k < Packs; ++k) {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const float d = inside(k) ? v[k][e] - mean : 0.0f;
        squares = fmaf(d, d, squares);
      }
    }
  }
  const float scale = scale_of(sum_along_x(squares), p);
#pragma unroll
  for (int k = 0; k < Packs; ++k) {
    if (!inside(k)) continue;
    const int at = early ? k : 0;
    if (!early) load_weight_pack<kind>(w[0], bias[0], p, element(k));
    store_normalized<kind>(row, element(k), v[k], w[at], bias[at], mean, scale);
  }
}

// Rows of any length, one a block.
template <NormKind kind, class T, int N>
__global__ void __launch_bounds__(512) norm_in_passes(const __grid_constant__ NormParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t n = p.hidden_size;
  const auto row = NormRow<T>::template at<kind>(p, blockIdx.x);
  float v[N], w[N], bias[N];
  auto for_each_pack = [&](auto f) {
    for (int64_t i = int64_t{threadIdx.x} * N; i < n; i += int64_t{blockDim.x} * N) {
      load_element_pack<kind>(v, row, i);
      f(i);
    }
  };
  float mean = 0.0f, squares = 0.0f;
  if constexpr (kind == NormKind::layer) {
    float sum = 0.0f;
    for_each_pack([&](int64_t) {
#pragma unroll
      for (int e = 0; e < N; ++e) sum += v[e];
    });
    mean = sum_along_x(sum) / static_cast<float>(n);
  }
  for_each_pack([&](int64_t) {
#pragma unroll
    for (int e = 0; e < N; ++e) squares = fmaf(v[e] - mean, v[e] - mean, squares);
  });
  const float scale = scale_of(sum_along_x(squares), p);
  // The residual is written in this pass alone: the sum before it is rounded can be made once more.
  for_each_pack([&](int64_t i) {
    if constexpr (kind == NormKind::add_rms) store_pack(row.residual + i, v);
    load_weight_pack<kind>(w, bias, p, i);
    store_normalized<kind>(row, i, v, w, bias, mean, scale);
  });
}

template <NormKind kind>
void norm(const NormParams& p, const Gpu& gpu) {
  const int64_t n = p.hidden_size, num_rows = p.input_rows.num_rows;
  if (n == 0 || num_rows == 0) return;
  bool fit = n * size_of(p.dtype) % 16 == 0 && packs_fit(p.input, p.dtype, p.input_rows) &&
             packs_fit(p.output, p.dtype, p.output_rows) && packs_fit(p.weight, p.weight_dtype, {});
  if (kind == NormKind::add_rms) fit = fit && packs_fit(p.residual_output, p.dtype, p.residual_rows);
  if (kind == NormKind::layer) fit = fit && packs_fit(p.bias, p.bias_dtype, {});
  dispatch_pack(p.dtype, fit, [&](auto t, auto size) {
    using T = decltype(t);
    constexpr int N = decltype(size)::value, held = kHeldPacks<N>;
    const int64_t packs = n / N;
    if (packs > 1024 * held)
      return launch(gpu, norm_in_passes<kind, T, N>, dim3(static_cast<unsigned>(num_rows)), dim3(512), 0,
                    /*overlap=*/true, p);
    auto launch_held = [&](auto kernel, int64_t packs_a_thread) {
      const int64_t threads = ceil_div(packs, packs_a_thread);
      const unsigned x =
          threads <= 32 ? power_of_2_at_least(threads) : static_cast<unsigned>(ceil_div(threads, 32) * 32);
      const unsigned y = x <= 32 ? 128 / x : 1;
      launch(gpu, kernel, dim3(static_cast<unsigned>(ceil_div(num_rows, y))), dim3(x, y), 0,
             /*overlap=*/true, p);
    };
    // A function of the row's size alone, so that a row's result doesn't depend on how many others there are.
    if constexpr (N > 1) {
      if (packs <= 512) return launch_held(norm_in_registers<kind, T, N, 1>, 1);
    }
    launch_held(norm_in_registers<kind, T, N, held>, held);
  });
}

}  // namespace fi::cuda
