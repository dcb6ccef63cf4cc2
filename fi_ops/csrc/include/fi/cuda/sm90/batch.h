// Attention over a batch, many query rows a request, on Hopper (sm_90a): what it takes, and its kernels.
#pragma once

#include "fi/batch_attention.h"
#include "fi/cuda/batch/plan.h"
#include "fi/cuda/gpu.h"

namespace fi::cuda {

// Whether batch_tiles_sm90 computes the tiles of this call: bf16 or fp16, keys too, with head dims up to 256
// that are multiples of 8; causal, window or all keys, soft cap, sinks, scales of KV heads (of keys: head
// dims up to 128), custom masks of up to 4 GB; no other variant; rows at 16-byte boundaries.
bool sm90_batch_supports(const BatchAttentionParams& p);

// The requests that `plan` cut into tiles. Rows of other requests and of
// none are not touched.
void batch_tiles_sm90(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu);

namespace sm90 {

// One file each in cuda/kernels/sm90/.
template <class T, int kDimQK, int kDimVO>
void batch_tiles(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu);
template <class T, int kDimQK, int kDimVO>
void masked_batch_tiles(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu);

}  // namespace sm90

}  // namespace fi::cuda
