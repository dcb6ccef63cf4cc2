// Sampling from probabilities (fi/cuda/sampling_sampler.h).
#include "fi/cuda/sampling_sampler.h"

namespace fi::cuda {

void sample_from_probs(const SamplingParams& p, const Gpu& gpu) { sample_rows<Probs>(p, gpu); }

}  // namespace fi::cuda
