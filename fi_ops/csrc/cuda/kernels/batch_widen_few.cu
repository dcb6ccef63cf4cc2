// 8-bit queries of the requests with few rows, widened: a block takes segments of the plan, a thread 8
// elements of a row.
#include "fi/cuda/batch/widen_few.h"
#include "fi/cuda/rowops.h"

namespace fi::cuda::batch {
namespace {

struct WidenFewArgs {
  Fp8BatchAttentionParams p;
  PlanView plan;
  void* query;  // [nnz_qo, num_qo_heads, head_dim]
};

template <class T>
__global__ void __launch_bounds__(256) widen_few_kernel(const __grid_constant__ WidenFewArgs args) {
  allow_next_kernel();
  wait_for_previous_kernel();
  const BatchAttentionParams& batch = args.p.batch;
  const AttentionParams& c = batch.call;
  const int64_t group = c.num_qo_heads / c.num_kv_heads, packs = c.head_dim_qk / 8;
  for (int segment = blockIdx.x; segment < args.plan.num_segments(); segment += gridDim.x) {
    const RowsOfRequest rows = segment_rows(batch, args.plan, segment, group);
    if (rows.request < 0) continue;
    const int64_t q_begin = request_of(batch, rows.request).q_begin, count = rows.end - rows.begin;
    for (int64_t at = threadIdx.x; at < count * c.num_kv_heads * packs; at += blockDim.x) {
      const int64_t place = at / packs, kv_head = place / count, row = rows.begin + place - kv_head * count;
      const int64_t token = q_begin + row / group, head = kv_head * group + row % group, i = at % packs * 8;
      const auto* x = static_cast<const uint8_t*>(c.query) + token * c.q_stride_n + head * c.q_stride_h + i;
      T* y = static_cast<T*>(args.query) + (token * c.num_qo_heads + head) * c.head_dim_qk + i;
      const uint2 bytes = *reinterpret_cast<const uint2*>(x);
      const float scale = args.p.q_scale ? args.p.q_scale.at(head) : 1.0f;
#pragma unroll
      for (int first = 0; first < 8; first += kPackSize<T>) {
        float values[kPackSize<T>];
#pragma unroll
        for (int n = 0; n < kPackSize<T>; ++n) {
          const int e = first + n;
          const auto bits = static_cast<uint8_t>((e < 4 ? bytes.x : bytes.y) >> e % 4 * 8);
          values[n] = scale * (batch.kv_dtype == Fp8::e4m3 ? from_e4m3(bits) : from_e5m2(bits));
        }
        store_pack(y + first, values);
      }
    }
  }
}

}  // namespace

void widen_few_rows(const Fp8BatchAttentionParams& p, const BatchAttentionParams& wide, const PlanView& plan,
                    const Gpu& gpu) {
  const int blocks = plan.max_segments < 2 * gpu.num_sms ? plan.max_segments : 2 * gpu.num_sms;
  if (blocks == 0) return;
  dispatch_float(wide.call.dtype, [&](auto t) {
    launch(gpu, widen_few_kernel<decltype(t)>, dim3(static_cast<unsigned>(blocks)), dim3(256), 0,
           /*overlap=*/true, WidenFewArgs{p, plan, const_cast<void*>(wide.call.query)});
  });
}

}  // namespace fi::cuda::batch
