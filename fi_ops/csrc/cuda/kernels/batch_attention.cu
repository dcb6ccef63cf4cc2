// Attention over a batch: the plan, where the caller has none, and the choice of a path for each of its two
// lists. Each path has one predicate, which everyone asks.
#include "fi/batch_attention.h"

#include "fi/cuda/batch/few.h"
#include "fi/cuda/batch/generic.h"
#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/batch.h"
#ifdef FI_CUDA_SM90A
#  include "fi/cuda/sm90/batch.h"
#endif

namespace fi::cuda {
namespace {

using batch::PlanView;

__global__ void zero_kernel(int32_t* data, int64_t count) {
  allow_next_kernel();
  wait_for_previous_kernel();
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x)
    data[i] = 0;
}

// The plan as the op makes it for itself, in scratch memory.
const int32_t* plan_of_call(const BatchAttentionParams& p, int32_t* zeroed, int64_t num_zeroed,
                            const Gpu& gpu) {
  const AttentionParams& c = p.call;
  BatchPlanParams plan{};
  plan.qo_indptr = p.qo_indptr;
  plan.table = p.table;
  plan.kv_last_page_len = p.kv_last_page_len;
  plan.batch = c.batch, plan.nnz_qo = c.qo_len, plan.group_size = c.num_qo_heads / c.num_kv_heads;
  plan.causal = c.causal;
  plan.window_left = c.window_left, plan.fixed_split_size = p.fixed_split_size;
  const PlanSizes sizes = plan_sizes(plan.batch, plan.nnz_qo, plan.group_size);
  plan.plan = static_cast<int32_t*>(c.scratch.allocate(
      c.scratch.context, int64_t(sizeof(PlanHeader)) + sizes.max_segments * int64_t(sizeof(PlanSegment)) +
                             sizes.max_tiles * int64_t(sizeof(PlanTile))));
  make_plan(plan, zeroed, num_zeroed, gpu);
  return plan.plan;
}

// The segments of the plan, requests with few rows; and the tokens of no request.
PlanView few_rows(const BatchAttentionParams& p, const Gpu& gpu) {
  const AttentionParams& c = p.call;
  const bool fast = batch::few_rows_supports(p), has_plan = p.plan != nullptr;
  int32_t* arrivals = nullptr;
  int64_t num_arrivals = 0;
  if (fast) {
    num_arrivals = PlanView::of(p, nullptr).max_segments * c.num_kv_heads;
    arrivals = static_cast<int32_t*>(c.scratch.allocate(c.scratch.context, 4 * num_arrivals));
  }
  const PlanView plan = PlanView::of(p, has_plan ? p.plan : plan_of_call(p, arrivals, num_arrivals, gpu));
  if (!fast) {
    batch::on_cuda_cores(p, plan, /*segments=*/true, /*tiles=*/false, gpu);
    return plan;
  }
  if (has_plan) {
    const int64_t blocks = (num_arrivals + 1023) / 1024;
    launch(gpu, zero_kernel, dim3(static_cast<unsigned>(blocks < gpu.num_sms ? blocks : gpu.num_sms)),
           dim3(256), 0, /*overlap=*/true, arrivals, num_arrivals);
  }
  batch::few_rows(p, plan, arrivals, gpu);
  return plan;
}

// The tiles of the plan, requests with many rows.
void many_rows(const BatchAttentionParams& p, const PlanView& plan, const Gpu& gpu) {
#ifdef FI_CUDA_SM90A
  if (gpu.compute_capability == 90 && sm90_batch_supports(p)) return batch_tiles_sm90(p, plan, gpu);
#endif
  if (sm80_batch_supports(p)) return batch_tiles_sm80(p, plan, gpu);
  batch::on_cuda_cores(p, plan, /*segments=*/false, /*tiles=*/true, gpu);
}

}  // namespace

void batch_attention(const BatchAttentionParams& p, const Gpu& gpu) {
  const AttentionParams& c = p.call;
  if (c.qo_len == 0 || c.num_qo_heads == 0) return;
  const PlanView plan = few_rows(p, gpu);
  // With so few rows in all no request has many.
  if (c.qo_len * (c.num_qo_heads / c.num_kv_heads) > kFewRows) many_rows(p, plan, gpu);
}

}  // namespace fi::cuda
