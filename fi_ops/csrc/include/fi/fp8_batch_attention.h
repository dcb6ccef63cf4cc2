// Attention over a batch of 8-bit queries, keys and values.
#pragma once

#include "fi/batch_attention.h"

namespace fi {

// `batch` is attention to what the stored values times their scales are; call.dtype is that of out. query
// lies there in the keys' format, kv_dtype.
struct Fp8BatchAttentionParams {
  BatchAttentionParams batch;
  PerHead q_scale;  // of query heads (stride 0: one for all); none: 1
};

}  // namespace fi

FI_KERNEL(fp8_batch_attention, fi::Fp8BatchAttentionParams)
