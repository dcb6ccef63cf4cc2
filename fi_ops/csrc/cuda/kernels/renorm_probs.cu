// Filtered probabilities written out (fi/cuda/sampling_renorm.h).
#include "fi/cuda/sampling_renorm.h"

namespace fi::cuda {

void renorm_from_probs(const RenormParams& p, const Gpu& gpu) { renorm_rows<Probs>(p, gpu); }

}  // namespace fi::cuda
