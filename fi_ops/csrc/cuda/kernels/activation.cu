// Gated activations, one pass over memory: a thread takes one pack of a row's gate and of its other half.
#include "fi/activation.h"

#include "fi/cuda/rowops.h"

namespace fi::cuda {
namespace {

struct Silu {
  static __device__ float of(float x) { return x / (1.0f + expf(-x)); }
};

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)): no cancellation for negative x.
struct GeluTanh {
  static __device__ float of(float x) {
    const float u = 0.7978845608028654f * x * fmaf(0.044715f, x * x, 1.0f);  // sqrt(2 / pi)
    return x / (1.0f + expf(-2.0f * u));
  }
};

// x * (standard normal distribution function), through erfc(z) = e^(-z^2) t q(t), t = 1 / (1 + 0.3275911 z),
// z >= 0: the small tail is computed by itself, so that large negative x keeps its digits. q is a Chebyshev
// fit of degree 9, error below 3e-9. Branch-free, unlike erff.
struct Gelu {
  static __device__ float of(float x) {
    const float t = 1.0f / fmaf(fabsf(x), 0.7071067811865476f * 0.3275911f, 1.0f);
    float q = 0.05965271011f;
    q = fmaf(q, t, -0.3332805835f);
    q = fmaf(q, t, 0.6653278460f);
    q = fmaf(q, t, -0.6107219778f);
    q = fmaf(q, t, 0.5435790095f);
    q = fmaf(q, t, -0.07310125341f);
    q = fmaf(q, t, 0.2138408130f);
    q = fmaf(q, t, 0.1639340626f);
    q = fmaf(q, t, 0.1860011060f);
    q = fmaf(q, t, 0.1847682677f);
    const float tail = 0.5f * t * q * expf(-0.5f * x * x);
    return x * (x > 0.0f ? 1.0f - tail : tail);
  }
};

template <class T, int N, class Act>
__global__ void __launch_bounds__(kMaxThreads) gated_kernel(const __grid_constant__ ActivationParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t n = p.hidden_size, column = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (column >= n) return;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < p.input_rows.num_rows;
       row += int64_t{gridDim.y} * blockDim.y) {
    const T* x = static_cast<const T*>(p.input) + p.input_rows.offset(row) + column;
    float gate[N], up[N];
    load_pack(gate, x);
    load_pack(up, x + n);
#pragma unroll
    for (int i = 0; i < N; ++i) gate[i] = Act::of(gate[i]) * up[i];
    store_pack(static_cast<T*>(p.output) + row * n + column, gate);
  }
}

template <class Act>
void gated(const ActivationParams& p, const Gpu& gpu) {
  const int64_t n = p.hidden_size, num_rows = p.input_rows.num_rows;
  if (n == 0 || num_rows == 0) return;
  const bool fit = packs_fit(p.input, p.dtype, p.input_rows) && packs_fit(p.output, p.dtype, {n});
  dispatch_pack(p.dtype, fit, [&](auto t, auto size) {
    using T = decltype(t);
    constexpr int N = decltype(size)::value;
    const int64_t packs = n / N;
    const unsigned x = packs >= kMaxThreads ? kMaxThreads : power_of_2_at_least(packs), y = kMaxThreads / x;
    const dim3 grid(static_cast<unsigned>(ceil_div(packs, x)),
                    static_cast<unsigned>(smaller(ceil_div(num_rows, y), kMaxGridY)));
    launch(gpu, gated_kernel<T, N, Act>, grid, dim3(x, y), 0, /*overlap=*/true, p);
  });
}

}  // namespace

void silu_and_mul(const ActivationParams& p, const Gpu& gpu) { gated<Silu>(p, gpu); }
void gelu_and_mul(const ActivationParams& p, const Gpu& gpu) { gated<Gelu>(p, gpu); }
void gelu_tanh_and_mul(const ActivationParams& p, const Gpu& gpu) { gated<GeluTanh>(p, gpu); }

}  // namespace fi::cuda
