// Prefill and decode of a batch in one launch (pod_kernel.h).
#pragma once

#include "fi/cuda/batch/few.h"
#include "fi/cuda/sm80/batch.h"

namespace fi::cuda::batch {

// The instantiations (cuda/kernels/pod_*.cu): head_dim up to the number. False: nothing is launched, since
// the two don't fit side by side on this GPU.
bool pod_bf16_64(const FewArgs& decode, const BatchTilesArgs& prefill, const Gpu& gpu);
bool pod_bf16_128(const FewArgs& decode, const BatchTilesArgs& prefill, const Gpu& gpu);
bool pod_f16_64(const FewArgs& decode, const BatchTilesArgs& prefill, const Gpu& gpu);
bool pod_f16_128(const FewArgs& decode, const BatchTilesArgs& prefill, const Gpu& gpu);

}  // namespace fi::cuda::batch
