// POD-attention: in one launch where that is the faster way, else prefill and decode one after the other.
#include "fi/pod.h"

#include <algorithm>

#include "fi/cuda/batch/few_runs.h"
#include "fi/cuda/batch/pod.h"
#include "fi/cuda/sm80/batch.h"
#ifdef FI_CUDA_SM90A
#  include "fi/cuda/sm90/batch.h"
#endif

namespace fi::cuda {
namespace {

using batch::PlanView;

bool is_plain(const BatchAttentionParams& p) {
  const AttentionParams& c = p.call;
  return c.logits_soft_cap == 0.0f && c.scale > 0.0f && c.head_dim_qk <= 128 && c.head_dim_vo <= 128 &&
         p.kv_dtype == Fp8::none && c.num_qo_heads > 0 && c.qo_len > 0;
}

int64_t rows_of(const AttentionParams& c, int64_t queries) {
  return queries * (c.num_qo_heads / c.num_kv_heads);
}

// Side by side the prefill runs at the rate of mma.sync, about half of what Hopper's own kernel has, and both
// together take about 0.8 of the sum of their times: on Hopper that is worth it where the decode is the
// longer one, but not by so much that all there is to gain is the prefill's little time.
bool is_worth_it(const PodParams& p, const Gpu& gpu) {
#ifdef FI_CUDA_SM90A
  if (gpu.compute_capability == 90 && sm90_batch_supports(p.prefill)) {
    constexpr double kFlopsASecond = 600e12, kBytesASecond = 2.8e12;
    const AttentionParams &c = p.prefill.call, &d = p.decode.call;
    const double pairs = double(c.qo_len) * double(c.kv_len) - (c.causal ? 0.5 * c.qo_len * c.qo_len : 0.0);
    const double flops = 2.0 * c.num_qo_heads * pairs * (c.head_dim_qk + c.head_dim_vo);
    // No more than the table holds: what of it is live is the device's to know.
    const double bytes = 2.0 * d.kv_len * d.num_kv_heads * (d.head_dim_qk + d.head_dim_vo);
    const double decode = bytes / kBytesASecond, prefill = flops / kFlopsASecond;
    return decode > 2.6 * prefill && decode < 10.0 * prefill;
  }
#endif
  return true;
}

bool takes_one_launch(const PodParams& p, const Gpu& gpu) {
  const AttentionParams &c = p.prefill.call, &d = p.decode.call;
  return is_plain(p.prefill) && is_plain(p.decode) && (c.head_dim_qk > 64) == (d.head_dim_qk > 64) &&
         (c.head_dim_vo > 64) == (d.head_dim_vo > 64) && (c.head_dim_qk > 64) == (c.head_dim_vo > 64) &&
         rows_of(c, c.qo_len) > kFewRows && rows_of(d, 1) <= kFewRows && sm80_batch_supports(p.prefill) &&
         batch::few_rows_supports(p.decode) && is_worth_it(p, gpu);
}

bool in_one_launch(const PodParams& p, const Gpu& gpu) {
  const AttentionParams& d = p.decode.call;
  auto counters = [&](int64_t count) {
    return static_cast<int32_t*>(d.scratch.allocate(d.scratch.context, 4 * count));
  };
  const int64_t num_pairs = PlanView::of(p.decode, nullptr).max_segments * d.num_kv_heads;
  int32_t *arrivals = counters(num_pairs), *next_item = counters(1);
  const PlanView prefill = PlanView::of(p.prefill, plan_in_scratch(p.prefill, next_item, 1, gpu));
  const PlanView decode = PlanView::of(p.decode, plan_in_scratch(p.decode, arrivals, num_pairs, gpu));
  const batch::FewArgs few = batch::few_args(p.decode, decode, arrivals);
  BatchTilesArgs tiles = batch_tiles_args(p.prefill, prefill, next_item);
  tiles.arrivals = nullptr;  // no split: the decode is what fills the GPU
  const bool is_bf16 = d.dtype == DType::bf16;
  if (d.head_dim_qk <= 64)
    return is_bf16 ? batch::pod_bf16_64(few, tiles, gpu) : batch::pod_f16_64(few, tiles, gpu);
  return is_bf16 ? batch::pod_bf16_128(few, tiles, gpu) : batch::pod_f16_128(few, tiles, gpu);
}

}  // namespace

void pod_attention(const PodParams& p, const Gpu& gpu) {
  if (takes_one_launch(p, gpu) && in_one_launch(p, gpu)) return;
  batch_attention(p.prefill, gpu);
  batch_attention(p.decode, gpu);
}

}  // namespace fi::cuda
