// Latent attention on CUDA cores: the kernel for whatever others don't take (cuda/kernels/mla_generic*.cu).
#pragma once

#include "fi/cuda/gpu.h"
#include "fi/mla.h"

namespace fi::cuda::mla {

// One a dtype (host).
template <class T>
void run_generic(const MlaParams& p, const Gpu& gpu);

}  // namespace fi::cuda::mla
