// Attention of few query rows over a batch on tensor cores (docs/kernels/batch_cuda.md).
#pragma once

#include "fi/cuda/batch/plan.h"

namespace fi::cuda::batch {

struct FewArgs;

// With wider heads there are no registers for the rotation of keys.
inline constexpr int64_t kMostRopeDim = 128;

// Whether few_rows() takes the call. Everything that attention over a batch
// can do, but RoPE of fp8 keys and of wide heads.
bool few_rows_supports(const BatchAttentionParams& p);

// The plan's segments, and the tokens of no request. `arrivals`: one for each segment and KV head, zeroed.
void few_rows(const BatchAttentionParams& p, const PlanView& plan, int32_t* arrivals, const Gpu& gpu);
FewArgs few_args(const BatchAttentionParams& p, const PlanView& plan, int32_t* arrivals);

// The instantiations (cuda/kernels/batch_few_*.cu): head_dim up to the number.
void few_bf16_64(const FewArgs& args, const Gpu& gpu);
void few_bf16_128(const FewArgs& args, const Gpu& gpu);
void few_bf16_256(const FewArgs& args, const Gpu& gpu);
void few_f16_64(const FewArgs& args, const Gpu& gpu);
void few_f16_128(const FewArgs& args, const Gpu& gpu);
void few_f16_256(const FewArgs& args, const Gpu& gpu);

}  // namespace fi::cuda::batch
