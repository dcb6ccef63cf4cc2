// 8-bit queries of the requests with few rows, for kernels that take them wide.
#pragma once

#include "fi/cuda/batch/plan.h"
#include "fi/fp8_batch_attention.h"

namespace fi::cuda::batch {

// Writes p's queries of the plan's segments to those of `wide`, times q_scale. Rows are at 8-byte boundaries,
// head_dim is a multiple of 8. It waits for the plan, and nothing else of it but that is read.
void widen_few_rows(const Fp8BatchAttentionParams& p, const BatchAttentionParams& wide, const PlanView& plan,
                    const Gpu& gpu);

}  // namespace fi::cuda::batch
