// 8-bit floats widened: a thread takes 8 of a row, or one where rows don't start at multiples of 8.
#include "fi/widen_fp8.h"

#include "fi/cuda/rowops.h"

namespace fi::cuda {
namespace {

FI_DEVICE_INLINE float widen(uint32_t x, Fp8 format) {
  const auto bits = static_cast<uint8_t>(x);
  return format == Fp8::e4m3 ? from_e4m3(bits) : from_e5m2(bits);
}

template <class T, int N>
__global__ void __launch_bounds__(256) widen_fp8_kernel(const __grid_constant__ WidenFp8Params p) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const int64_t packs = p.dim / N, total = p.rows.num_rows * packs;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < total;
       at += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = at / packs, i = (at - row * packs) * N;
    const auto* x = static_cast<const uint8_t*>(p.input) + p.rows.offset(row) + i;
    T* y = static_cast<T*>(p.output) + row * p.dim + i;
    const float scale = p.scale_of_row(row);
    if constexpr (N == 1) {
      *y = from_float<T>(widen(*x, p.format) * scale);
    } else {
      const uint2 bytes = *reinterpret_cast<const uint2*>(x);
#pragma unroll
      for (int half = 0; half < N; half += kPackSize<T>) {
        float values[kPackSize<T>];
#pragma unroll
        for (int e = 0; e < kPackSize<T>; ++e)
          values[e] =
              widen((half + e < 4 ? bytes.x : bytes.y) >> (half + e) % 4 * 8 & 0xff, p.format) * scale;
        store_pack(y + half, values);
      }
    }
  }
}

template <int N>
void widen(const WidenFp8Params& p, const Gpu& gpu) {
  constexpr int64_t kThreads = 256;
  const int64_t blocks = ceil_div(p.rows.num_rows * (p.dim / N), kThreads), most = int64_t{16} * gpu.num_sms;
  dispatch_float(p.dtype, [&](auto t) {
    launch(gpu, widen_fp8_kernel<decltype(t), N>, dim3(static_cast<unsigned>(blocks < most ? blocks : most)),
           dim3(kThreads), 0, /*overlap=*/true, p);
  });
}

}  // namespace

void widen_fp8(const WidenFp8Params& p, const Gpu& gpu) {
  bool packs_fit = reinterpret_cast<uintptr_t>(p.input) % 8 == 0 && p.dim % 8 == 0;
  for (int d = 0; d < p.rows.ndim; ++d) packs_fit = packs_fit && p.rows.strides[d] % 8 == 0;
  packs_fit ? widen<8>(p, gpu) : widen<1>(p, gpu);
}

}  // namespace fi::cuda
