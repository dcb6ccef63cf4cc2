// Latent attention over a paged cache of compressed keys: one KV head, whose keys are a row of ckv and one of
// kpe, and whose values are the row of ckv.
#pragma once

#include "fi/batch_attention.h"

namespace fi {

// batch.call: query is q_nope; key and value are both the cache of ckv, head_dim_qk and head_dim_vo its
// width; one KV head. batch.k_scale and v_scale are both kv_scale. There is no plan.
struct MlaParams {
  BatchAttentionParams batch;
  int64_t head_dim_kpe;
  const void* q_pe;  // [nnz_qo, num_qo_heads, head_dim_kpe]
  int64_t q_pe_stride_n, q_pe_stride_h;
  const void* kpe;  // [num_pages, page_size, head_dim_kpe], ckv's dtype
  int64_t kpe_stride_page, kpe_stride_n;
};

}  // namespace fi

FI_KERNEL(mla_paged_attention, fi::MlaParams)
