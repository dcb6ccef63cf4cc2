// Joins the parts of split blocks, row by row, in the order of the parts.
#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/finish.h"

namespace fi::cuda {
namespace {

constexpr int kWarps = 4;

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    combine_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Partials s) {
  const int lane = threadIdx.x % 32;
  const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= s.heads * s.num_rows) return;
  const int64_t head = at / s.num_rows, r = at % s.num_rows, group = p.num_qo_heads / p.num_kv_heads;
  const int64_t b = head / p.num_kv_heads, h = head % p.num_kv_heads * group + r % group, i = r / group;
  float top = -kInf, sum = 0.0f;
  for (int part = 0; part < s.parts; ++part) top = fmaxf(top, s.state[2 * s.row(part, head, r)]);
  for (int part = 0; part < s.parts; ++part) {
    const float* state = s.state + 2 * s.row(part, head, r);
    sum += state[1] * exp2f(state[0] - usable_max(top));
  }
  const RowResult result = finish_row(p, h, top, sum);
  T* out = static_cast<T*>(p.out) + b * p.o_stride_b + h * p.o_stride_h + i * p.o_stride_n;
  for (int64_t d = lane; d < p.head_dim_vo; d += 32) {
    float x = 0.0f;
    for (int part = 0; part < s.parts; ++part) {
      const int64_t row = s.row(part, head, r);
      x += s.out[row * s.width + d] * exp2f(s.state[2 * row] - usable_max(top));
    }
    out[d] = from_float<T>(x * result.factor);
  }
  if (p.lse && lane == 0) p.lse[(b * p.num_qo_heads + h) * p.qo_len + i] = result.lse;
}

}  // namespace

void combine(const AttentionParams& p, const Partials& partials, const Gpu& gpu) {
  const dim3 grid(static_cast<unsigned>((partials.heads * partials.num_rows + kWarps - 1) / kWarps));
  auto kernel = p.dtype == DType::f32    ? combine_kernel<float>
                : p.dtype == DType::bf16 ? combine_kernel<bf16>
                                         : combine_kernel<f16>;
  launch(gpu, kernel, grid, dim3(32 * kWarps), 0, p, partials);
}

}  // namespace fi::cuda
