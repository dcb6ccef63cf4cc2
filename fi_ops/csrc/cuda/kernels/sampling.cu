// Sampling from logits (fi/cuda/sampling_sampler.h).
#include "fi/cuda/sampling_sampler.h"
#include "fi/dispatch.h"

namespace fi::cuda {

void top_k_top_p_sample(const SamplingParams& p, const Gpu& gpu) {
  if (p.from_probs) return sample_from_probs(p, gpu);
  dispatch_float(p.dtype, [&](auto t) { sample_rows<Logits<decltype(t)>>(p, gpu); });
}

}  // namespace fi::cuda
