// Linear layers without demands on alignment or dtype: fp32 on the CUDA cores, never tf32. A warp takes one
// row of the weight with Rows rows of the input at a time.
#pragma once

#include "fi/cuda/rowops.h"
#include "fi/linear.h"

namespace fi::cuda {

struct LinearGeneric {
  static constexpr int kWarps = 8;
  static constexpr int kAhead = 4;  // packs of the weight that a lane loads before it uses the first
  static constexpr int kRun =
      16;  // packs that it adds up before it adds to its sum: short chains of roundings
};

template <class T, int N, int Rows>
__global__ void __launch_bounds__(LinearGeneric::kWarps * 32, 1)
    linear_generic_kernel(const __grid_constant__ LinearParams p) {
  using C = LinearGeneric;
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t n = int64_t{blockIdx.x} * C::kWarps + threadIdx.x / 32;
  if (n >= p.out_features) return;
  const T* weight = static_cast<const T*>(p.weight) + n * p.weight_stride;
  const float bias = p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[n]) : 0.0f;

  for (int64_t first = int64_t{blockIdx.y} * Rows; first < p.input_rows.num_rows;
       first += int64_t{gridDim.y} * Rows) {
    const T* input[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r)  // the last row again where there are fewer: its result is dropped
      input[r] =
          static_cast<const T*>(p.input) + p.input_rows.offset(smaller(first + r, p.input_rows.num_rows - 1));
    float sums[Rows] = {};
    for (int64_t run = lane * N; run < p.in_features; run += 32 * N * C::kRun) {
      float run_sums[Rows] = {};
#pragma unroll 1
      for (int64_t begin = run; begin < run + 32 * N * C::kRun; begin += 32 * N * C::kAhead) {
        float w[C::kAhead][N] = {};
#pragma unroll
        for (int a = 0; a < C::kAhead; ++a)
          if (begin + 32 * N * a < p.in_features) load_pack(w[a], weight + begin + 32 * N * a);
#pragma unroll
        for (int a = 0; a < C::kAhead; ++a) {
          const int64_t k = begin + 32 * N * a;
          if (k >= p.in_features) break;
#pragma unroll
          for (int r = 0; r < Rows; ++r) {
            float x[N], dot = 0.0f;
            load_pack(x, input[r] + k);
#pragma unroll
            for (int i = 0; i < N; ++i) dot += x[i] * w[a][i];
            run_sums[r] += dot;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < Rows; ++r) sums[r] += run_sums[r];
    }
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      for (int offset = 16; offset > 0; offset /= 2) sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], offset);
      if (lane == 0 && first + r < p.input_rows.num_rows)
        static_cast<T*>(p.output)[p.output_rows.offset(first + r) + n] = from_float<T>(sums[r] + bias);
    }
  }
}

template <class T, int N>
void launch_linear_generic(const LinearParams& p, const Gpu& gpu) {
  using C = LinearGeneric;
  const auto run = [&](auto kernel, int rows) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.out_features, C::kWarps)),
                    static_cast<unsigned>(smaller(ceil_div(p.input_rows.num_rows, rows), kMaxGridY)));
    launch(gpu, kernel, grid, C::kWarps * 32, 0, /*overlap=*/true, p);
  };
  if (p.input_rows.num_rows == 1) return run(linear_generic_kernel<T, N, 1>, 1);
  run(linear_generic_kernel<T, N, 8>, 8);
}

}  // namespace fi::cuda
