// Attention over a batch of 8-bit queries, keys and values, many query rows a request, on Hopper (sm_90a):
// what it takes, and its kernels.
#pragma once

#include "fi/cuda/batch/plan.h"
#include "fi/cuda/gpu.h"
#include "fi/fp8_batch_attention.h"

namespace fi::cuda {

// Whether fp8_batch_tiles_sm90 computes the tiles of this call: head_dim 64 or 128; causal, window or all
// keys, sinks; no other variant; ragged keys, or pages of a multiple of 16; rows at 16-byte boundaries.
bool sm90_fp8_batch_supports(const Fp8BatchAttentionParams& p);

// The requests that `plan` cut into tiles. Rows of other requests and of none are not touched.
void fp8_batch_tiles_sm90(const Fp8BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu);

namespace sm90 {

// One file each in cuda/kernels/sm90/.
template <Fp8 kFormat, int kHeadDim>
void fp8_batch_tiles(const Fp8BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu);

}  // namespace sm90

}  // namespace fi::cuda
