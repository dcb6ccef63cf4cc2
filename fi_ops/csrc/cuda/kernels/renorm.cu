// Filtered distributions of logits written out (fi/cuda/sampling_renorm.h).
#include "fi/cuda/sampling_renorm.h"
#include "fi/dispatch.h"

namespace fi::cuda {

void renorm_probs(const RenormParams& p, const Gpu& gpu) {
  if (softmax(p, gpu)) return;
  if (p.from_probs) return renorm_from_probs(p, gpu);
  dispatch_float(p.dtype, [&](auto t) { renorm_rows<Logits<decltype(t)>>(p, gpu); });
}

}  // namespace fi::cuda
