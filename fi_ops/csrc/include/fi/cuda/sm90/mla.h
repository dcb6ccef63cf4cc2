// Latent attention over a paged compressed cache on Hopper (sm_90a): what it takes, and its kernels.
#pragma once

#include "fi/cuda/gpu.h"
#include "fi/mla.h"

namespace fi::cuda {

// Whether sm90_mla computes this call: bf16 and fp16, ckv 512 and kpe 64 wide, a cache of the queries' dtype
// or of fp8; rows at 16-byte boundaries.
bool sm90_mla_supports(const MlaParams& p);

// The whole call: every request, and zeros and -inf for the tokens of none.
void sm90_mla(const MlaParams& p, const Gpu& gpu);

namespace sm90 {

// One file each in cuda/kernels/sm90/.
template <class T>
void mla(const MlaParams& p, const Gpu& gpu);

}  // namespace sm90

}  // namespace fi::cuda
