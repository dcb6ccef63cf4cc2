// Joins the parts of split blocks, row by row, in the order of the parts.
#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/partials.h"

namespace fi::cuda {
namespace {

constexpr int kWarps = 4;

template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    combine_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Partials s) {
  const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= s.heads * s.num_rows) return;
  const int64_t head = at / s.num_rows, r = at % s.num_rows, group = p.num_qo_heads / p.num_kv_heads;
  const int64_t b = head / p.num_kv_heads, h = head % p.num_kv_heads * group + r % group, i = r / group;
  const float* state = s.state + 2 * s.row(0, head, r);
  const float* partial = s.out + s.row(0, head, r) * s.width;
  T* out = static_cast<T*>(p.out) + b * p.o_stride_b + h * p.o_stride_h + i * p.o_stride_n;
  join_row(partial, state, s.parts, s.heads * s.num_rows, s.width, out, p.head_dim_vo,
           [&](float row_max, float row_sum) {
             const RowResult result = finish_row(p, h, row_max, row_sum);
             if (p.lse && threadIdx.x % 32 == 0) p.lse[(b * p.num_qo_heads + h) * p.qo_len + i] = result.lse;
             return result.factor;
           });
}

}  // namespace

void combine(const AttentionParams& p, const Partials& partials, const Gpu& gpu) {
  const dim3 grid(static_cast<unsigned>((partials.heads * partials.num_rows + kWarps - 1) / kWarps));
  launch(gpu, p.dtype == DType::bf16 ? combine_kernel<bf16> : combine_kernel<f16>, grid, dim3(32 * kWarps), 0,
         p, partials);
}

}  // namespace fi::cuda
