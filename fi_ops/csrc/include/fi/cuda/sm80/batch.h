// Attention over a batch on sm_80 and later: the requests that the plan cut into tiles of queries.
#pragma once

#include "fi/cuda/batch/plan.h"
#include "fi/cuda/divisor.h"
#include "fi/cuda/gpu.h"

namespace fi::cuda {

// Distances in key or value, in 8 elements.
struct KeyUnits {
  uint32_t page, row;
};

struct BatchTilesArgs {
  BatchAttentionParams p;
  batch::PlanView plan;
  unsigned group;  // query heads of a KV head
  Divisor by_page_size;
  KeyUnits k_units, v_units;
  bool rope_has_packs;
  unsigned* next_item;  // zeroed: items beyond the first of each block that are taken

  // Where tiles may be too few for the GPU their keys are split, each part a thread block's; of each, the
  // block's rows of partial results. Null: nothing is split.
  float* partial = nullptr;     // [grid][block's rows][padded head_dim_vo]: not divided
  float* state = nullptr;       // [grid][block's rows][2]: maximum, sum
  int32_t* arrivals = nullptr;  // [grid], zeroed: parts done
};

// What lies between a product and its weight, beside a scale and what causal, window and length exclude.
enum class BatchFeatures { none, mask_rope, all };

inline BatchFeatures features_of(const BatchAttentionParams& p) {
  if (p.call.logits_soft_cap > 0.0f || p.call.alibi_slopes) return BatchFeatures::all;
  return p.custom_mask || p.call.rope.cos ? BatchFeatures::mask_rope : BatchFeatures::none;
}

// Launches the kernel for head dims padded to kDimQK and kDimVO; kFp8: of key and value.
template <class T, int kDimQK, int kDimVO, bool kFp8>
void run_batch_tiles(const BatchTilesArgs& args, const Gpu& gpu);

// fp16 and bf16 queries; keys of that type at 16-byte boundaries or fp8 at 8-byte ones; head dims in
// multiples of 8 up to 256. Every other feature.
bool sm80_batch_supports(const BatchAttentionParams& p);
// Computes the plan's tiles; what they don't cover is left as it is. `counters`: sm80_batch_counters() of
// them, zeroed by a kernel before.
void batch_tiles_sm80(const BatchAttentionParams& p, const batch::PlanView& plan, int32_t* counters,
                      const Gpu& gpu);
BatchTilesArgs batch_tiles_args(const BatchAttentionParams& p, const batch::PlanView& plan,
                                int32_t* counters);
int64_t sm80_batch_counters(const BatchAttentionParams& p, const Gpu& gpu);
// Whether it splits the keys of tiles that are too few for the GPU.
bool sm80_batch_splits(const BatchAttentionParams& p);

}  // namespace fi::cuda
