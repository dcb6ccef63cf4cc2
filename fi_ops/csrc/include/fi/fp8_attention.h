// Attention of queries, keys and values of 8 bits.
#pragma once

#include "fi/attention.h"
#include "fi/fp8.h"

namespace fi {

// `call` is attention to what the stored values times their scales are; its dtype is that of out. query, key
// and value lie there in `format`. No RoPE.
struct Fp8AttentionParams {
  AttentionParams call;
  Fp8 format;
  PerHead q_scale;           // of query heads (stride 0: one for all); none: 1
  PerHead k_scale, v_scale;  // of KV heads, likewise
};

}  // namespace fi

FI_KERNEL(fp8_attention, fi::Fp8AttentionParams)
