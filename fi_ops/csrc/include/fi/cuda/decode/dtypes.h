// The instantiations of decode attention, each in a file of its own (cuda/kernels/decode_*.cu).
#pragma once

#include "fi/attention.h"

namespace fi::cuda::decode {

// 16-bit, on tensor cores, head_dim up to the number; 192_128: up to 192, of values 128. `append`: what goes
// into the cache first, or null.
void bf16_64(const AttentionParams& p, const AppendParams* append, const Gpu& gpu);
void bf16_128(const AttentionParams& p, const AppendParams* append, const Gpu& gpu);
void bf16_192_128(const AttentionParams& p, const AppendParams* append, const Gpu& gpu);
void bf16_256(const AttentionParams& p, const AppendParams* append, const Gpu& gpu);
void f16_64(const AttentionParams& p, const AppendParams* append, const Gpu& gpu);
void f16_128(const AttentionParams& p, const AppendParams* append, const Gpu& gpu);
void f16_192_128(const AttentionParams& p, const AppendParams* append, const Gpu& gpu);
void f16_256(const AttentionParams& p, const AppendParams* append, const Gpu& gpu);
// Everything else.
void on_cuda_cores(const AttentionParams& p, const Gpu& gpu);

}  // namespace fi::cuda::decode
