// Attention over a batch: the plan, where the caller has none, and the choice of a path for each of its two
// lists. Each path has one predicate, which everyone asks.
#include "fi/batch_attention.h"

#include "fi/cuda/batch/few.h"
#include "fi/cuda/batch/generic.h"
#include "fi/cuda/batch/widen_few.h"
#include "fi/cuda/launch.h"
#include "fi/cuda/sm80/batch.h"
#include "fi/widen_fp8.h"
#ifdef FI_CUDA_SM90A
#  include "fi/cuda/sm90/batch.h"
#  include "fi/cuda/sm90/fp8_batch.h"
#endif

namespace fi::cuda {

const int32_t* plan_in_scratch(const BatchAttentionParams& p, int32_t* zeroed, int64_t num_zeroed,
                               const Gpu& gpu) {
  const AttentionParams& c = p.call;
  BatchPlanParams plan{};
  plan.qo_indptr = p.qo_indptr;
  plan.table = p.table;
  plan.kv_last_page_len = p.kv_last_page_len;
  plan.batch = c.batch, plan.nnz_qo = c.qo_len, plan.group_size = c.num_qo_heads / c.num_kv_heads;
  plan.causal = c.causal;
  plan.window_left = c.window_left, plan.fixed_split_size = p.fixed_split_size;
  plan.plan = static_cast<int32_t*>(
      c.scratch.allocate(c.scratch.context, 4 * PlanParts::size(plan.batch, plan.nnz_qo, plan.group_size)));
  make_plan(plan, zeroed, num_zeroed, gpu);
  return plan.plan;
}

namespace {

using batch::PlanView;

__global__ void zero_kernel(int32_t* data, int64_t count) {
  allow_next_kernel();
  wait_for_previous_kernel();
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x)
    data[i] = 0;
}

// Counters of the two paths' kernels, which find them zeroed.
struct Arrivals {
  int32_t* segments = nullptr;
  int32_t* tiles = nullptr;
};

// The plan, and the counters zeroed by the kernel that makes it or by one in its place.
PlanView begin(const BatchAttentionParams& p, int64_t num_segments, int64_t num_tiles, Arrivals& arrivals,
               const Gpu& gpu) {
  const Scratch& scratch = p.call.scratch;
  const int64_t count = num_segments + num_tiles;
  if (count > 0) {
    arrivals.segments = static_cast<int32_t*>(scratch.allocate(scratch.context, 4 * count));
    arrivals.tiles = arrivals.segments + num_segments;
  }
  if (!p.plan) return PlanView::of(p, plan_in_scratch(p, arrivals.segments, count, gpu));
  const int64_t blocks = (count + 1023) / 1024;
  launch(gpu, zero_kernel, dim3(static_cast<unsigned>(blocks < gpu.num_sms ? blocks : gpu.num_sms)),
         dim3(256), 0, /*overlap=*/true, arrivals.segments, count);
  return PlanView::of(p, p.plan);
}

enum class TilesPath { none, sm90_fp8, sm90, sm80, cuda_cores };

// Who computes the plan's tiles, requests with many rows. `fp8`: the call with its queries as they were
// given, of 8 bits; null: they have more.
TilesPath path_of_tiles(const BatchAttentionParams& p, const Fp8BatchAttentionParams* fp8, const Gpu& gpu) {
  const AttentionParams& c = p.call;
  // With so few rows in all no request has many.
  if (c.qo_len * (c.num_qo_heads / c.num_kv_heads) <= kFewRows) return TilesPath::none;
#ifdef FI_CUDA_SM90A
  // Few tiles over long keys leave most of the GPU to who doesn't split keys, as in dense attention; how many
  // tiles there are at least is the device's to know.
  const int64_t most_blocks = ((c.qo_len - 1) / kTileQueries + c.batch) * c.num_qo_heads;
  const bool splits = sm80_batch_supports(p) && sm80_batch_splits(p);
  const bool few = splits && 9 * most_blocks < 4 * gpu.num_sms;
  if (gpu.compute_capability == 90 && !few) {
    if (fp8 != nullptr && sm90_fp8_batch_supports(*fp8)) return TilesPath::sm90_fp8;
    if (sm90_batch_supports(p)) return TilesPath::sm90;
  }
#endif
  return sm80_batch_supports(p) ? TilesPath::sm80 : TilesPath::cuda_cores;
}

// `fp8`: as above. p's queries are then where they are to be widened to.
void attend(const BatchAttentionParams& p, const Fp8BatchAttentionParams* fp8, TilesPath path,
            const Gpu& gpu) {
  const AttentionParams& c = p.call;
  const bool few_is_fast = batch::few_rows_supports(p);
  const int64_t num_segments = few_is_fast ? PlanView::of(p, nullptr).max_segments * c.num_kv_heads : 0;
  const int64_t num_tiles = path == TilesPath::sm80 ? sm80_batch_counters(p, gpu) : 0;
  Arrivals arrivals;
  const PlanView plan = begin(p, num_segments, num_tiles, arrivals, gpu);
  if (path == TilesPath::sm90_fp8) batch::widen_few_rows(*fp8, p, plan, gpu);

  // The plan's segments, requests with few rows; and the tokens of no request.
  if (few_is_fast) {
    batch::few_rows(p, plan, arrivals.segments, gpu);
  } else {
    batch::on_cuda_cores(p, plan, /*segments=*/true, /*tiles=*/false, gpu);
  }
  switch (path) {
    case TilesPath::none:
      return;
    case TilesPath::sm90_fp8:
#ifdef FI_CUDA_SM90A
      return fp8_batch_tiles_sm90(*fp8, plan, gpu);
#endif
    case TilesPath::sm90:
#ifdef FI_CUDA_SM90A
      return batch_tiles_sm90(p, plan, gpu);
#endif
    case TilesPath::sm80:
      return batch_tiles_sm80(p, plan, arrivals.tiles, gpu);
    case TilesPath::cuda_cores:
      return batch::on_cuda_cores(p, plan, /*segments=*/false, /*tiles=*/true, gpu);
  }
}

}  // namespace

void batch_attention(const BatchAttentionParams& p, const Gpu& gpu) {
  if (p.call.qo_len == 0 || p.call.num_qo_heads == 0) return;
  attend(p, nullptr, path_of_tiles(p, nullptr, gpu), gpu);
}

// Products of 8 bits for requests with many rows, where they are to be had; all other queries are widened,
// for the kernels that read 8-bit keys.
void fp8_batch_attention(const Fp8BatchAttentionParams& p, const Gpu& gpu) {
  if (p.batch.call.qo_len == 0 || p.batch.call.num_qo_heads == 0) return;
  const BatchAttentionParams wide = with_wide_query(p);
  const TilesPath path = path_of_tiles(wide, &p, gpu);
  const WidenFp8Params queries = widening(p, wide);
  if (path != TilesPath::sm90_fp8 && queries.dim > 0) widen_fp8(queries, gpu);
  attend(wide, &p, path, gpu);
}

}  // namespace fi::cuda
