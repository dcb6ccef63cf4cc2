// Merging of attention states: partial outputs over parts of the keys, each with the base-2 log-sum-exp of
// its logits.
#pragma once

#include "fi/kernel.h"
#include "fi/scalar.h"

namespace fi {

// seq_len x num_heads states: v rows of head_dim elements, s single floats. Strides in elements.
struct AttentionStates {
  const void* v;
  const float* s;
  int64_t v_strides[2];  // token, head
  int64_t s_strides[2];
};

struct MergeParams {
  AttentionStates a;
  AttentionStates b;   // merge_state: the second state; merge_states: unused
  int64_t num_states;  // merge_states: states of `a`, `v_state_stride`, `s_state_stride` apart
  int64_t v_state_stride, s_state_stride;
  void* v_out;   // of `dtype`; may be a.v
  float* s_out;  // may be a.s
  int64_t v_out_strides[2], s_out_strides[2];
  const bool* mask;  // [seq_len] or null: tokens to merge; the others are left as they are
  int64_t mask_stride;
  int64_t seq_len, num_heads, head_dim;
  DType dtype;
};

}  // namespace fi

FI_KERNEL(merge_state, fi::MergeParams)
FI_KERNEL(merge_states, fi::MergeParams)
