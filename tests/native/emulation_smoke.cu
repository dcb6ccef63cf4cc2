// What the emulator promises, asked of it: a GEMM by cp.async, ldmatrix and mma; shuffles and votes; a
// deadlock that is named; the last block's turn.
#include <cmath>
#include <cstdio>
#include <vector>

#include "fi/cuda/launch.h"
#include "fi/cuda/ptx.h"

namespace {

using namespace fi::cuda;
using fi::bf16;

constexpr int kM = 16, kN = 16, kK = 32;

// out [16, 16] = a [16, 32] * b [32, 16], b row-major (so ldmatrix transposes).
__global__ void gemm(const bf16* a, const bf16* b, float* out) {
  auto* sa = reinterpret_cast<bf16*>(dynamic_smem());
  auto* sb = sa + kM * kK;
  for (int i = threadIdx.x; i < kM * kK / 8; i += 32) cp_async_16(sa + 8 * i, a + 8 * i);
  for (int i = threadIdx.x; i < kN * kK / 8; i += 32) cp_async_16(sb + 8 * i, b + 8 * i);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  const int lane = threadIdx.x;
  for (int n = 0; n < kN; n += 8) {
    float d[4] = {};
    for (int k = 0; k < kK; k += 32) {
      uint32_t fb[4];
      ldmatrix_x4_trans(fb, sb + (k + lane) * kN + n);
      for (int half = 0; half < 2; ++half) {
        uint32_t fa[4];
        ldmatrix_x4(fa, sa + (lane % 16) * kK + k + 16 * half + lane / 16 * 8);
        mma_m16n8k16<bf16>(d, fa, fb[2 * half], fb[2 * half + 1]);
      }
    }
    for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * kN + n + lane % 4 * 2 + i % 2] = d[i];
  }
}

__global__ void reduce(const int* x, int n, unsigned* counter, int* partial, int* out) {
  __shared__ int warp_sums[4];
  __shared__ bool last;
  int sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = warp_sums[0] + warp_sums[1] + warp_sums[2] + warp_sums[3];
    __threadfence();
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  *out = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) *out += partial[i];
}

__global__ void stuck() {
  if (threadIdx.x == 0)
    __syncwarp();
  else
    __syncthreads();
  __syncwarp();
}

}  // namespace

extern "C" int smoke() {
  const Gpu gpu{nullptr, 4, 80, 163 * 1024};
  std::vector<bf16> a(kM * kK), b(kK * kN);
  std::vector<float> out(kM * kN);
  for (int i = 0; i < kM * kK; ++i) a[i] = fi::to_bf16(float(i * 37 % 19) - 9);
  for (int i = 0; i < kK * kN; ++i) b[i] = fi::to_bf16(float(i * 53 % 23) - 11);
  launch(gpu, gemm, dim3(1), dim3(32), (kM * kK + kK * kN) * 2, a.data(), b.data(), out.data());
  for (int i = 0; i < kM; ++i)
    for (int j = 0; j < kN; ++j) {
      float want = 0;
      for (int k = 0; k < kK; ++k) want += fi::to_float(a[i * kK + k]) * fi::to_float(b[k * kN + j]);
      if (out[i * kN + j] != want)
        return printf("gemm (%d, %d): %g, not %g\n", i, j, out[i * kN + j], want), 1;
    }
  std::vector<int> x(5000), partial(7);
  int sum = 0, got = -1;
  for (int i = 0; i < 5000; ++i) sum += x[i] = i % 13;
  unsigned counter = 0;
  launch(gpu, reduce, dim3(7), dim3(128), 0, x.data(), 5000, &counter, partial.data(), &got);
  if (got != sum) return printf("reduce: %d, not %d\n", got, sum), 1;
  try {
    launch(gpu, stuck, dim3(1), dim3(64), 0);
    return printf("a deadlock went unnoticed\n"), 1;
  } catch (const std::exception& e) {
    if (std::string(e.what()).find("deadlock") == std::string::npos) return printf("%s\n", e.what()), 1;
  }
  return 0;
}

int main() { return smoke(); }
