// Attention of 8-bit tensors on Hopper (sm_90a): what it takes, and its kernels.
#pragma once

#include "fi/cuda/sm90/attention.h"
#include "fi/fp8_attention.h"

namespace fi::cuda {

// Whether fp8_attention_sm90 computes this call: head_dim 64, 128 or 256, 64 query rows or more, causal,
// window or all keys, sinks; no other variant; rows where TMA can read them.
bool sm90_fp8_supports(const Fp8AttentionParams& p);
void fp8_attention_sm90(const Fp8AttentionParams& p, const Gpu& gpu);

namespace sm90 {

// Rows of 8-bit elements, seen as rows of half as many 16-bit ones.
inline HeadRows as_pairs(HeadRows x) {
  x.columns /= 2, x.stride_b /= 2, x.stride_h /= 2, x.stride_n /= 2;
  return x;
}

// Whether the copy engine can read them so: 16-byte steps, and no stride of 0 unless it is never taken.
inline bool pairs_map_takes(const HeadRows& x) {
  const auto fits = [](int64_t extent, int64_t stride) {
    return extent == 1 || (stride > 0 && stride % 16 == 0 && stride < (int64_t{1} << 39));
  };
  return reinterpret_cast<uintptr_t>(x.base) % 16 == 0 && fits(x.batch, x.stride_b) &&
         fits(x.heads, x.stride_h) && fits(x.rows, x.stride_n);
}

// One file each in cuda/kernels/sm90/.
template <Fp8 kFormat, int kHeadDim>
void fp8_prefill(const Fp8AttentionParams& p, const Gpu& gpu);

}  // namespace sm90

}  // namespace fi::cuda
