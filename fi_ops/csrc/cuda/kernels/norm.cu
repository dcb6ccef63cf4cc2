#include "fi/cuda/norm.h"

namespace fi::cuda {

void rmsnorm(const NormParams& p, const Gpu& gpu) {
  if (p.residual != nullptr) return norm<NormKind::add_rms>(p, gpu);
  norm<NormKind::rms>(p, gpu);
}

void layernorm(const NormParams& p, const Gpu& gpu) { norm<NormKind::layer>(p, gpu); }

}  // namespace fi::cuda
