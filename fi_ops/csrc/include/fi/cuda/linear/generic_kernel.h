// Linear layers without demands on alignment or dtype: fp32 on the CUDA cores, never tf32. A warp takes one
// row of the weight with kRows rows of the input at a time.
#pragma once

#include "fi/cuda/rowops.h"
#include "fi/linear.h"

namespace fi::cuda {

struct LinearGeneric {
  static constexpr int kRows = 8;
  static constexpr int kWarps = 8;
  static constexpr int kRun =
      16;  // packs that a lane adds up before it adds to its sum: short chains of roundings
};

template <class T, int N>
__global__ void __launch_bounds__(LinearGeneric::kWarps * 32) linear_generic_kernel(const LinearParams p) {
  using C = LinearGeneric;
  allow_next_kernel();
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t n = int64_t{blockIdx.x} * C::kWarps + threadIdx.x / 32;
  if (n >= p.out_features) return;
  const T* weight = static_cast<const T*>(p.weight) + n * p.weight_stride;
  const float bias = p.bias != nullptr ? to_float(static_cast<const T*>(p.bias)[n]) : 0.0f;

  for (int64_t first = int64_t{blockIdx.y} * C::kRows; first < p.input_rows.num_rows;
       first += int64_t{gridDim.y} * C::kRows) {
    const T* input[C::kRows];
#pragma unroll
    for (int r = 0; r < C::kRows; ++r)  // the last row again where there are fewer: its result is dropped
      input[r] =
          static_cast<const T*>(p.input) + p.input_rows.offset(smaller(first + r, p.input_rows.num_rows - 1));
    float sums[C::kRows] = {};
    for (int64_t begin = lane * N; begin < p.in_features; begin += 32 * N * C::kRun) {
      const int64_t end = smaller(begin + 32 * N * C::kRun, p.in_features);
      float run[C::kRows] = {};
      for (int64_t k = begin; k < end; k += 32 * N) {
        float w[N];
        load_pack(w, weight + k);
#pragma unroll
        for (int r = 0; r < C::kRows; ++r) {
          float x[N], dot = 0.0f;
          load_pack(x, input[r] + k);
#pragma unroll
          for (int i = 0; i < N; ++i) dot += x[i] * w[i];
          run[r] += dot;
        }
      }
#pragma unroll
      for (int r = 0; r < C::kRows; ++r) sums[r] += run[r];
    }
#pragma unroll
    for (int r = 0; r < C::kRows; ++r) {
      for (int offset = 16; offset > 0; offset /= 2) sums[r] += __shfl_xor_sync(0xffffffffu, sums[r], offset);
      if (lane == 0 && first + r < p.input_rows.num_rows)
        static_cast<T*>(p.output)[p.output_rows.offset(first + r) + n] = from_float<T>(sums[r] + bias);
    }
  }
}

template <class T, int N>
void launch_linear_generic(const LinearParams& p, const Gpu& gpu) {
  using C = LinearGeneric;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.out_features, C::kWarps)),
                  static_cast<unsigned>(smaller(ceil_div(p.input_rows.num_rows, C::kRows), kMaxGridY)));
  launch(gpu, linear_generic_kernel<T, N>, grid, C::kWarps * 32, 0, /*overlap=*/true, p);
}

}  // namespace fi::cuda
