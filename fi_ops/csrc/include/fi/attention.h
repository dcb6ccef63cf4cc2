// The attention family: what the bindings hand to the kernels.
//
// Strides are in elements and free (also 0); the last dimension of query, key, value and out is contiguous.
#pragma once

#include <cstdint>

#include "fi/indices.h"
#include "fi/kernel.h"
#include "fi/scalar.h"

namespace fi {

// cos and sin of a rotary embedding: row r of batch b starts at b * stride_b + r * stride_row.
struct RopeTable {
  const void* cos = nullptr;  // [1 or batch, rows, width]; null: no rotation
  const void* sin = nullptr;  // as cos
  DType dtype = DType::f32;
  int64_t cos_stride_b = 0, cos_stride_row = 0;
  int64_t sin_stride_b = 0, sin_stride_row = 0;
  int64_t width = 0;         // rotary_dim / 2, or rotary_dim: a pair's two members have their own
  int64_t rotary_dim = 0;    // of the head's leading elements, even
  bool interleaved = false;  // pairs (2i, 2i + 1), else (i, i + rotary_dim / 2)
};

// Memory that lives until the op returns, from torch's allocator, 64-byte aligned.
struct Scratch {
  void* (*allocate)(void* context, int64_t bytes);
  void* context;
};

// One fp32 number for each query head.
struct PerHead {
  const float* data = nullptr;  // null: none given
  int64_t stride = 0;

  FI_HD explicit operator bool() const { return data != nullptr; }
  FI_HD float at(int64_t h) const { return data[h * stride]; }
};

struct AttentionParams {
  int64_t batch, num_qo_heads, num_kv_heads, qo_len, kv_len, head_dim_qk, head_dim_vo;
  DType dtype;  // of query, key, value and out

  const void* query;  // [batch, num_qo_heads, qo_len, head_dim_qk]
  int64_t q_stride_b, q_stride_h, q_stride_n;
  const void* key;  // [batch, num_kv_heads, kv_len, head_dim_qk]
  int64_t k_stride_b, k_stride_h, k_stride_n;
  const void* value;  // [batch, num_kv_heads, kv_len, head_dim_vo]
  int64_t v_stride_b, v_stride_h, v_stride_n;
  void* out;  // [batch, num_qo_heads, qo_len, head_dim_vo]
  int64_t o_stride_b, o_stride_h, o_stride_n;
  float* lse = nullptr;  // [batch, num_qo_heads, qo_len] contiguous, base 2; null: not wanted

  const void* mask =
      nullptr;  // [batch, num_qo_heads, qo_len, kv_len], strides 0 where it broadcasts; null: none
  DType mask_dtype = DType::boolean;
  int64_t mask_stride_b = 0, mask_stride_h = 0, mask_stride_q = 0, mask_stride_k = 0;

  bool causal = false;
  int64_t window_left = -1;   // -1: none
  int64_t q_offset = 0;       // row i stands at key position i + q_offset ...
  Positions query_positions;  // ... or, where given, at query_positions.at(b, i), anywhere
  float scale = 1.0f;
  float logits_soft_cap = 0.0f;  // 0: none
  PerHead alibi_slopes;
  PerHead sinks;

  RopeTable rope;             // rotates query rows, and key rows where rope_keys
  bool rope_keys = false;     // key j takes row j
  int64_t rope_q_offset = 0;  // query i takes row i + rope_q_offset

  Scratch scratch;
};

// Where query row i of batch entry b stands among the keys.
FI_INLINE int64_t query_position(const AttentionParams& p, int64_t b, int64_t i) {
  return p.query_positions ? p.query_positions.at(b, i) : i + p.q_offset;
}

// Whether causal and window leave different keys to different batch entries.
FI_INLINE bool keys_differ_by_batch(const AttentionParams& p) {
  return (p.causal || p.window_left >= 0) && p.query_positions && p.query_positions.stride_b != 0;
}

inline constexpr int64_t kMaxRotaryDim = 1024;

// Writes rows into a static cache: cache[b, h, positions.at(b, i)] = new[b, h, i], keys rotated where
// rope.cos is set.
struct AppendParams {
  int64_t batch, num_kv_heads, new_len, head_dim_qk, head_dim_vo;
  DType dtype;
  const void* key;  // [batch, num_kv_heads, new_len, head_dim_qk]
  int64_t k_stride_b, k_stride_h, k_stride_n;
  const void* value;  // [batch, num_kv_heads, new_len, head_dim_vo]
  int64_t v_stride_b, v_stride_h, v_stride_n;
  void* k_cache;  // [batch, num_kv_heads, max_len, head_dim_qk]
  int64_t kc_stride_b, kc_stride_h, kc_stride_n;
  void* v_cache;  // [batch, num_kv_heads, max_len, head_dim_vo]
  int64_t vc_stride_b, vc_stride_h, vc_stride_n;
  int64_t max_len;
  Positions positions;  // the slot of each row
  RopeTable rope;       // key i takes row i; rotary_dim at most kMaxRotaryDim
};

// The append, then attention to the cache that it writes: the same rope table (query i takes row i), as many
// new rows as query rows. Where these stand has nothing to do with the slots of the new rows: a query may not
// see what it brings.
struct AppendAttentionParams {
  AppendParams append;
  AttentionParams attention;
};

}  // namespace fi

FI_KERNEL(attention, fi::AttentionParams)
FI_KERNEL(append_kv, fi::AppendParams)
FI_KERNEL(append_attention, fi::AppendAttentionParams)
