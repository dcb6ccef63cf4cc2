// Merging of attention states. A state whose log-sum-exp is -inf has weight exactly 0 and its output does not
// count, whatever is there (NaN too); where all are -inf the result is 0 and -inf.
#include "fi/merge.h"

#include "fi/cuda/rowops.h"

namespace fi::cuda {
namespace {

constexpr float kInf = __builtin_huge_valf();
__device__ bool is_empty(float s) { return s == -kInf; }

// Threads along x go over a row's packs, along y over rows (a row: one head of one token).
template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) merge_state_kernel(const __grid_constant__ MergeParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t token = row / p.num_heads, head = row - token * p.num_heads;
  const bool live = token < p.seq_len && (p.mask == nullptr || p.mask[token * p.mask_stride]);
  float sa = 0.0f, sb = 0.0f;
  if (live) {
    sa = p.a.s[token * p.a.s_strides[0] + head * p.a.s_strides[1]];
    sb = p.b.s[token * p.b.s_strides[0] + head * p.b.s_strides[1]];
  }
  __syncthreads();  // s_out may be a.s: all of a row's threads have read it
  if (!live) return;
  const bool no_a = is_empty(sa), no_b = is_empty(sb);
  const float top = sa > sb || sa != sa ? sa : sb;  // a NaN stays
  const float a = no_a ? 0.0f : exp2f(sa - top), b = no_b ? 0.0f : exp2f(sb - top), total = a + b;
  if (threadIdx.x == 0)
    p.s_out[token * p.s_out_strides[0] + head * p.s_out_strides[1]] =
        no_a ? sb : (no_b ? sa : top + log2f(total));
  const float weight_a = no_a ? 0.0f : a / total, weight_b = no_b ? 0.0f : b / total;
  const T* va = static_cast<const T*>(p.a.v) + token * p.a.v_strides[0] + head * p.a.v_strides[1];
  const T* vb = static_cast<const T*>(p.b.v) + token * p.b.v_strides[0] + head * p.b.v_strides[1];
  T* y = static_cast<T*>(p.v_out) + token * p.v_out_strides[0] + head * p.v_out_strides[1];
  for (int64_t i = int64_t{threadIdx.x} * N; i < p.head_dim; i += int64_t{blockDim.x} * N) {
    float xa[N], xb[N];
    load_pack(xa, va + i);
    load_pack(xb, vb + i);
#pragma unroll
    for (int e = 0; e < N; ++e) xa[e] = fmaf(no_a ? 0.0f : xa[e], weight_a, (no_b ? 0.0f : xb[e]) * weight_b);
    store_pack(y + i, xa);
  }
}

// What a thread knows of some states: their sum, weighted relative to the largest log-sum-exp so far.
template <int N>
struct PartialSum {
  float top, total, sum[N];

  static __device__ PartialSum of_none() { return {-kInf, 0.0f, {}}; }

  __device__ void add(float s, float weight, const float (&x)[N]) {
    if (is_empty(s)) return;
    const float new_top = s > top || s != s ? s : top;  // a NaN stays
    const float old = is_empty(top) ? 0.0f : exp2f(top - new_top), fresh = exp2f(s - new_top);
    top = new_top;
    total = fmaf(total, old, fresh * weight);
#pragma unroll
    for (int e = 0; e < N; ++e) sum[e] = fmaf(sum[e], old, fresh * x[e]);
  }
};

// Threads along x go over a row's packs (more of them along y of the grid), along y over states, along z over
// rows.
template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) merge_states_kernel(const __grid_constant__ MergeParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int ahead = 4;  // states whose loads are in flight together
  const int64_t row = int64_t{blockIdx.x} * blockDim.z + threadIdx.z;
  const int64_t token = row / p.num_heads, head = row - token * p.num_heads;
  const int64_t i = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * N;
  const bool live = token < p.seq_len && i < p.head_dim;
  auto mine = PartialSum<N>::of_none();
  if (live) {
    const float* s = p.a.s + token * p.a.s_strides[0] + head * p.a.s_strides[1];
    const T* v = static_cast<const T*>(p.a.v) + token * p.a.v_strides[0] + head * p.a.v_strides[1] + i;
    for (int64_t first = threadIdx.y; first < p.num_states; first += int64_t{ahead} * blockDim.y) {
      float state_s[ahead], x[ahead][N];
#pragma unroll
      for (int a = 0; a < ahead; ++a) {
        const int64_t j = first + int64_t{a} * blockDim.y;
        state_s[a] = -kInf;
        if (j < p.num_states) {
          state_s[a] = s[j * p.s_state_stride];
          load_pack(x[a], v + j * p.v_state_stride);
        }
      }
#pragma unroll
      for (int a = 0; a < ahead; ++a) mine.add(state_s[a], 1.0f, x[a]);
    }
  }
  if (blockDim.y > 1) {
    // Lanes of y are merged two by two, the upper half's through shared memory.
    __shared__ PartialSum<N> others[kMaxThreads / 2];
    for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
      const unsigned slot = (threadIdx.z * half + threadIdx.y % half) * blockDim.x + threadIdx.x;
      if (threadIdx.y >= half && threadIdx.y < 2 * half) others[slot] = mine;
      __syncthreads();
      if (threadIdx.y < half) mine.add(others[slot].top, others[slot].total, others[slot].sum);
      __syncthreads();
    }
  }
  if (!live || threadIdx.y > 0) return;
  if (i == 0)
    p.s_out[token * p.s_out_strides[0] + head * p.s_out_strides[1]] =
        is_empty(mine.top) ? -kInf : mine.top + log2f(mine.total);
  const float scale = mine.total == 0.0f ? 0.0f : 1.0f / mine.total;
#pragma unroll
  for (int e = 0; e < N; ++e) mine.sum[e] *= scale;
  store_pack(static_cast<T*>(p.v_out) + token * p.v_out_strides[0] + head * p.v_out_strides[1] + i, mine.sum);
}

}  // namespace

void merge_state(const MergeParams& p, const Gpu& gpu) {
  const int64_t num_rows = p.seq_len * p.num_heads;
  if (num_rows == 0) return;
  const bool fit = p.head_dim * size_of(p.dtype) % 16 == 0 &&
                   packs_fit(p.a.v, p.dtype, {p.a.v_strides[0], p.a.v_strides[1]}) &&
                   packs_fit(p.b.v, p.dtype, {p.b.v_strides[0], p.b.v_strides[1]}) &&
                   packs_fit(p.v_out, p.dtype, {p.v_out_strides[0], p.v_out_strides[1]});
  dispatch_pack(p.dtype, fit, [&](auto t, auto size) {
    constexpr int N = decltype(size)::value;
    const int64_t packs = p.head_dim / N;
    const unsigned x = packs >= 64 ? 64 : power_of_2_at_least(packs), y = kMaxThreads / 2 / x;
    launch(gpu, merge_state_kernel<decltype(t), N>, dim3(static_cast<unsigned>(ceil_div(num_rows, y))),
           dim3(x, y), 0, /*overlap=*/true, p);
  });
}

void merge_states(const MergeParams& p, const Gpu& gpu) {
  const int64_t num_rows = p.seq_len * p.num_heads;
  if (num_rows == 0) return;
  const bool fit = p.head_dim * size_of(p.dtype) % 16 == 0 &&
                   packs_fit(p.a.v, p.dtype, {p.a.v_strides[0], p.a.v_strides[1], p.v_state_stride}) &&
                   packs_fit(p.v_out, p.dtype, {p.v_out_strides[0], p.v_out_strides[1]});
  dispatch_pack(p.dtype, fit, [&](auto t, auto size) {
    constexpr int N = decltype(size)::value;
    const int64_t packs = p.head_dim / N;
    const unsigned x = packs >= 64 ? 64 : power_of_2_at_least(packs);
    // At least four states a thread. A function of a row's size alone, so that a row's result doesn't depend
    // on how many others there are.
    unsigned y = 1;
    while (2 * x * y <= kMaxThreads && 8 * y <= p.num_states) y *= 2;
    const unsigned z =
        static_cast<unsigned>(smaller(kMaxThreads / 2 < x * y ? 1 : kMaxThreads / 2 / (x * y), 64));
    launch(gpu, merge_states_kernel<decltype(t), N>,
           dim3(static_cast<unsigned>(ceil_div(num_rows, z)), static_cast<unsigned>(ceil_div(packs, x))),
           dim3(x, y, z), 0, /*overlap=*/true, p);
  });
}

}  // namespace fi::cuda
