// Attention of few query rows over a batch: what the tensor cores take, and the choice of an instantiation.
#include "fi/cuda/batch/few.h"

#include "fi/cuda/batch/few_runs.h"
#include "fi/cuda/decode/rope.h"

namespace fi::cuda::batch {

bool few_rows_supports(const BatchAttentionParams& p) {
  const AttentionParams& c = p.call;
  const int64_t dims[] = {c.head_dim_qk, c.head_dim_vo};
  const int64_t kv_bytes = p.kv_dtype == Fp8::none ? 2 : 1;
  auto whole = [](const void* data, int64_t bytes, const auto&... strides) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (strides | ... | 0) * bytes % 16 == 0;
  };
  for (const int64_t dim : dims) {
    if (dim == 0 || dim > 256 || dim * kv_bytes % 16 != 0) return false;
  }
  const bool rope_fits =
      c.rope.cos == nullptr || (p.kv_dtype == Fp8::none && p.rope_len > 0 && c.head_dim_qk <= kMostRopeDim &&
                                c.head_dim_vo <= kMostRopeDim && decode::rope_takes_chunks(c.rope));
  return c.dtype != DType::f32 && rope_fits && c.kv_len < int64_t{1} << 30 &&
         p.table.page_size < int64_t{1} << 30 && whole(c.query, 2, c.q_stride_n, c.q_stride_h) &&
         whole(c.key, kv_bytes, c.k_stride_n, c.k_stride_h, p.k_stride_page) &&
         whole(c.value, kv_bytes, c.v_stride_n, c.v_stride_h, p.v_stride_page);
}

FewArgs few_args(const BatchAttentionParams& p, const PlanView& plan, int32_t* arrivals) {
  FewArgs args{};
  args.p = p;
  args.plan = plan;
  args.group = static_cast<int>(p.call.num_qo_heads / p.call.num_kv_heads);
  args.arrivals = arrivals;
  return args;
}

void few_rows(const BatchAttentionParams& p, const PlanView& plan, int32_t* arrivals, const Gpu& gpu) {
  const AttentionParams& c = p.call;
  const FewArgs args = few_args(p, plan, arrivals);
  const int64_t dim = c.head_dim_qk > c.head_dim_vo ? c.head_dim_qk : c.head_dim_vo;
  const bool is_bf16 = c.dtype == DType::bf16;
  if (dim <= 64) return is_bf16 ? few_bf16_64(args, gpu) : few_f16_64(args, gpu);
  if (dim <= 128) return is_bf16 ? few_bf16_128(args, gpu) : few_f16_128(args, gpu);
  is_bf16 ? few_bf16_256(args, gpu) : few_f16_256(args, gpu);
}

}  // namespace fi::cuda::batch
