// Attention of many query rows on Hopper (sm_90a): what it takes, and its kernels.
#pragma once

#include <algorithm>

#include "fi/attention.h"
#include "fi/cuda/gpu.h"
#include "fi/cuda/sm90/tensor_map.h"

namespace fi::cuda {

// Whether attention_sm90 computes this call: bf16 or fp16 with head dims up to 256 that are multiples of 8;
// causal, window or all keys, query rows at any positions, boolean masks, additive ones of a prompt, soft
// cap, sinks; no other variant, and RoPE applied already; rows where TMA can read them.
bool sm90_prefill_supports(const AttentionParams& p);
void attention_sm90(const AttentionParams& p, const Gpu& gpu);

namespace sm90 {

inline HeadRows query_rows(const AttentionParams& p) {
  return {p.query,       p.batch,      p.num_qo_heads, p.qo_len,
          p.head_dim_qk, p.q_stride_b, p.q_stride_h,   p.q_stride_n};
}
// Keys from here on are seen by no row, as far as the host knows; TMA brings zeros in their place.
inline int64_t seen_len(const AttentionParams& p) {
  if (!p.causal || p.query_positions) return p.kv_len;
  return std::clamp<int64_t>(std::clamp(p.q_offset, -p.qo_len, p.kv_len) + p.qo_len, 1, p.kv_len);
}
inline HeadRows key_rows(const AttentionParams& p) {
  return {p.key,         p.batch,      p.num_kv_heads, seen_len(p),
          p.head_dim_qk, p.k_stride_b, p.k_stride_h,   p.k_stride_n};
}
inline HeadRows value_rows(const AttentionParams& p) {
  return {p.value,       p.batch,      p.num_kv_heads, seen_len(p),
          p.head_dim_vo, p.v_stride_b, p.v_stride_h,   p.v_stride_n};
}
inline HeadRows out_rows(const AttentionParams& p) {
  return {p.out, p.batch, p.num_qo_heads, p.qo_len, p.head_dim_vo, p.o_stride_b, p.o_stride_h, p.o_stride_n};
}

// One file each in cuda/kernels/sm90/.
template <class T, int kDimQK, int kDimVO>
void prefill(const AttentionParams& p, const Gpu& gpu);

}  // namespace sm90

}  // namespace fi::cuda
