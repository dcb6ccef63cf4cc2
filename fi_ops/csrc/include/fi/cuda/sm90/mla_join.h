// Joins the partial results of row tiles whose keys several blocks had.
#pragma once

#include "fi/cuda/batch/plan.h"
#include "fi/cuda/sm90/mla_config.h"

namespace fi::cuda::sm90 {

inline constexpr int kMlaJoinRows = 4;  // of a block, a warp's each

// grid: (blocks of the kernel before, kMlaRows / kMlaJoinRows). The parts of a row tile are in the second
// slot of the block that began it and in the first ones of those that follow.
template <class T>
__global__ void __launch_bounds__(32 * kMlaJoinRows) mla_join_kernel(const __grid_constant__ MlaArgs args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const BatchAttentionParams& p = args.p.batch;
  const AttentionParams& c = p.call;
  if (batch::has_padding(p))
    batch::write_padding<T>(p, (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x,
                            int64_t{gridDim.x} * gridDim.y * blockDim.x);
  const MlaJoinTask task = args.tasks[blockIdx.x];
  const int row = blockIdx.y * kMlaJoinRows + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (task.parts == 0 || row >= task.num_rows) return;
  const auto part = [&](int i) {
    const int64_t slot =
        i == 0 ? 2 * int64_t{blockIdx.x} + 1 : 2 * (int64_t{blockIdx.x} + int64_t{i} * args.ranks);
    return args.partials + slot * kMlaPartialFloats;
  };
  const auto base = [&](int i) { return part(i)[kMlaRows * kCkvDim + row]; };
  float top = -kInf;
  for (int i = lane; i < task.parts; i += 32) top = fmaxf(top, base(i));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
  const float finite = usable_max(top);

  constexpr int kPacks = kCkvDim / 4 / 32;
  float4 sum[kPacks] = {};
  float total = 0.0f;
#pragma unroll 4
  for (int i = 0; i < task.parts; ++i) {
    const float* const from = part(i);
    const float weight = exp2_approx(base(i) - finite);
    total += weight * from[kMlaRows * (kCkvDim + 1) + row];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const float4 x = reinterpret_cast<const float4*>(from + row * kCkvDim)[lane + 32 * j];
      sum[j].x += weight * x.x, sum[j].y += weight * x.y, sum[j].z += weight * x.z, sum[j].w += weight * x.w;
    }
  }
  const float kv_scale = p.k_scale ? p.k_scale.at(0) : 1.0f;
  const float factor = total == 0.0f ? 0.0f : kv_scale / total;
  const int packed = task.row_begin + row, query = packed / args.num_heads,
            head = packed - query * args.num_heads;
  const int64_t n = task.q_begin + query;
  T* const out = static_cast<T*>(c.out) + n * c.o_stride_n + head * c.o_stride_h;
#pragma unroll
  for (int j = 0; j < kPacks; ++j)
    reinterpret_cast<uint2*>(out)[lane + 32 * j] = {pack2<T>(sum[j].x * factor, sum[j].y * factor),
                                                    pack2<T>(sum[j].z * factor, sum[j].w * factor)};
  if (lane == 0 && c.lse != nullptr)
    c.lse[n * args.num_heads + head] = total == 0.0f ? -kInf : finite + log2f(total);
}

}  // namespace fi::cuda::sm90
