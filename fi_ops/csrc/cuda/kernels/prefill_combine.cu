// Joins the parts of split blocks, row by row, in the order of the parts.
#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/partials.h"

namespace fi::cuda {
namespace {

constexpr int kWarps = 4;

// A warp a row, a lane four columns at a time (head_dim_vo and the output's rows are multiples of 8).
template <class T>
__global__ void __launch_bounds__(32 * kWarps)
    combine_kernel(const __grid_constant__ AttentionParams p, const __grid_constant__ Partials s) {
  const int lane = threadIdx.x % 32;
  const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= s.heads * s.num_rows) return;
  const int64_t head = at / s.num_rows, r = at % s.num_rows, group = p.num_qo_heads / p.num_kv_heads;
  const int64_t b = head / p.num_kv_heads, h = head % p.num_kv_heads * group + r % group, i = r / group;
  const float* state = s.state + 2 * s.row(0, head, r);
  const float* partial = s.out + s.row(0, head, r) * s.width;
  const int64_t part_rows = s.heads * s.num_rows;
  float top = -kInf, sum = 0.0f;
  for (int part = lane; part < s.parts; part += 32) top = fmaxf(top, state[2 * part * part_rows]);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
  const float shift = usable_max(top);
  for (int part = lane; part < s.parts; part += 32)
    sum += state[2 * part * part_rows + 1] * exp2f(state[2 * part * part_rows] - shift);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);

  const RowResult result = finish_row(p, h, top, sum);
  T* out = static_cast<T*>(p.out) + b * p.o_stride_b + h * p.o_stride_h + i * p.o_stride_n;
  for (int64_t d = 4 * lane; d < p.head_dim_vo; d += 4 * 32) {
    float4 x{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int part = 0; part < s.parts; ++part) {
      const float weight = exp2f(state[2 * part * part_rows] - shift);
      const float4 y = *reinterpret_cast<const float4*>(partial + part * part_rows * s.width + d);
      x.x = fmaf(y.x, weight, x.x);
      x.y = fmaf(y.y, weight, x.y);
      x.z = fmaf(y.z, weight, x.z);
      x.w = fmaf(y.w, weight, x.w);
    }
    *reinterpret_cast<uint2*>(out + d) = {pack2<T>(x.x * result.factor, x.y * result.factor),
                                          pack2<T>(x.z * result.factor, x.w * result.factor)};
  }
  if (p.lse && lane == 0) p.lse[(b * p.num_qo_heads + h) * p.qo_len + i] = result.lse;
}

}  // namespace

void combine(const AttentionParams& p, const Partials& partials, const Gpu& gpu) {
  const dim3 grid(static_cast<unsigned>((partials.heads * partials.num_rows + kWarps - 1) / kWarps));
  launch(gpu, p.dtype == DType::bf16 ? combine_kernel<bf16> : combine_kernel<f16>, grid, dim3(32 * kWarps), 0,
         p, partials);
}

}  // namespace fi::cuda
