// Attention over a batch on sm_80 and later: the requests that the plan cut into tiles of queries.
#pragma once

#include "fi/cuda/batch/plan.h"
#include "fi/cuda/gpu.h"

namespace fi::cuda {

struct BatchTilesArgs {
  BatchAttentionParams p;
  batch::PlanView plan;
  unsigned group;  // query heads of a KV head
};

// Whether more than a scale lies between a product and its logit, or a rotation before it.
inline bool needs_variants(const BatchAttentionParams& p) {
  return p.custom_mask != nullptr || p.call.logits_soft_cap > 0.0f || p.call.alibi_slopes ||
         p.call.rope.cos != nullptr;
}

// Launches the kernel for head dims padded to kDimQK and kDimVO; kFp8: of key and value.
template <class T, int kDimQK, int kDimVO, bool kFp8>
void run_batch_tiles(const BatchTilesArgs& args, const Gpu& gpu);

// fp16 and bf16 queries; keys of that type at 16-byte boundaries or fp8 at 8-byte ones; head dims in
// multiples of 8 up to 256. Every other feature.
bool sm80_batch_supports(const BatchAttentionParams& p);
// Computes the plan's tiles. What they don't cover is left as it is.
void batch_tiles_sm80(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu);

}  // namespace fi::cuda
