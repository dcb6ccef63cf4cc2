// Queries and keys rotated into scratch memory, for the attention kernels that take them rotated.
#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/block_rows.h"
#include "fi/cuda/sm80/prefill.h"

namespace fi::cuda {
namespace {

constexpr int kWarps = 4;

struct RotateArgs {
  const void* input;  // [batch, heads, len, head_dim] through strides
  int64_t stride_b, stride_h, stride_n;
  void* output;  // the same, contiguous
  int64_t batch, heads, len, head_dim;
  int64_t first_row;  // of the table: token 0's
  RopeTable table;
};

FI_DEVICE_INLINE float angle(const void* table, DType dtype, int64_t at) {
  return dtype == DType::f32    ? static_cast<const float*>(table)[at]
         : dtype == DType::bf16 ? to_float(static_cast<const bf16*>(table)[at])
                                : to_float(static_cast<const f16*>(table)[at]);
}

// A warp a row: products in fp32, one rounding.
template <class T>
__global__ void __launch_bounds__(32 * kWarps) rotate_kernel(const __grid_constant__ RotateArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.batch * a.heads * a.len) return;
  const int64_t n = row % a.len, h = row / a.len % a.heads, b = row / a.len / a.heads;
  const T* x = static_cast<const T*>(a.input) + b * a.stride_b + h * a.stride_h + n * a.stride_n;
  T* y = static_cast<T*>(a.output) + row * a.head_dim;
  const RopeTable& t = a.table;
  const int64_t half = t.rotary_dim / 2;
  const int64_t cos_row = b * t.cos_stride_b + (a.first_row + n) * t.cos_stride_row;
  const int64_t sin_row = b * t.sin_stride_b + (a.first_row + n) * t.sin_stride_row;
  const int64_t step = t.interleaved && t.width != half ? 2 : 1;  // each value twice, side by side
  for (int64_t i = lane; i < half; i += 32) {
    const float c = angle(t.cos, t.dtype, cos_row + i * step), s = angle(t.sin, t.dtype, sin_row + i * step);
    const int64_t first = t.interleaved ? 2 * i : i, second = t.interleaved ? 2 * i + 1 : half + i;
    const float u = to_float(x[first]), v = to_float(x[second]);
    y[first] = from_float<T>(fmaf(u, c, -(v * s)));
    y[second] = from_float<T>(fmaf(v, c, u * s));
  }
  for (int64_t d = t.rotary_dim + lane; d < a.head_dim; d += 32) y[d] = x[d];
}

void rotate(const RotateArgs& a, DType dtype, const Gpu& gpu) {
  const dim3 grid(static_cast<unsigned>((a.batch * a.heads * a.len + kWarps - 1) / kWarps));
  auto kernel = dtype == DType::f32    ? rotate_kernel<float>
                : dtype == DType::bf16 ? rotate_kernel<bf16>
                                       : rotate_kernel<f16>;
  launch(gpu, kernel, grid, dim3(32 * kWarps), 0, a);
}

}  // namespace

AttentionParams rotate_first(const AttentionParams& p, const Gpu& gpu) {
  AttentionParams r = p;
  auto allocate = [&](int64_t elements) {
    return p.scratch.allocate(p.scratch.context, elements * size_of(p.dtype));
  };
  void* query = allocate(p.batch * p.num_qo_heads * p.qo_len * p.head_dim_qk);
  rotate({p.query, p.q_stride_b, p.q_stride_h, p.q_stride_n, query, p.batch, p.num_qo_heads, p.qo_len,
          p.head_dim_qk, p.rope_q_offset, p.rope},
         p.dtype, gpu);
  r.query = query;
  r.q_stride_n = p.head_dim_qk;
  r.q_stride_h = p.qo_len * r.q_stride_n;
  r.q_stride_b = p.num_qo_heads * r.q_stride_h;
  if (p.rope_keys) {
    void* key = allocate(p.batch * p.num_kv_heads * p.kv_len * p.head_dim_qk);
    rotate({p.key, p.k_stride_b, p.k_stride_h, p.k_stride_n, key, p.batch, p.num_kv_heads, p.kv_len,
            p.head_dim_qk, 0, p.rope},
           p.dtype, gpu);
    r.key = key;
    r.k_stride_n = p.head_dim_qk;
    r.k_stride_h = p.kv_len * r.k_stride_n;
    r.k_stride_b = p.num_kv_heads * r.k_stride_h;
  }
  r.rope = {};
  r.rope_keys = false;
  return r;
}

}  // namespace fi::cuda
