// The tensors of a batch as those who copy them see them.
#pragma once

#include "fi/batch_attention.h"
#include "fi/cuda/sm90/tensor_map.h"

namespace fi::cuda::sm90 {

inline HeadRows query_rows(const BatchAttentionParams& p) {
  const AttentionParams& c = p.call;
  return {c.query, 1, c.num_qo_heads, c.qo_len, c.head_dim_qk, 0, c.q_stride_h, c.q_stride_n};
}
inline HeadRows out_rows(const BatchAttentionParams& p) {
  const AttentionParams& c = p.call;
  return {c.out, 1, c.num_qo_heads, c.qo_len, c.head_dim_vo, 0, c.o_stride_h, c.o_stride_n};
}

// Pages, or ragged rows as one page.
inline HeadRows cache_rows(const BatchAttentionParams& p, const void* base, int64_t head_dim,
                           int64_t stride_page, int64_t stride_h, int64_t stride_n) {
  const int64_t heads = p.call.num_kv_heads;
  if (!p.is_paged()) return {base, 1, heads, p.call.kv_len, head_dim, 0, stride_h, stride_n};
  return {base, p.table.num_pages, heads, p.table.page_size, head_dim, stride_page, stride_h, stride_n};
}
inline HeadRows key_rows(const BatchAttentionParams& p) {
  const AttentionParams& c = p.call;
  return cache_rows(p, c.key, c.head_dim_qk, p.k_stride_page, c.k_stride_h, c.k_stride_n);
}
inline HeadRows value_rows(const BatchAttentionParams& p) {
  const AttentionParams& c = p.call;
  return cache_rows(p, c.value, c.head_dim_vo, p.v_stride_page, c.v_stride_h, c.v_stride_n);
}

// Keys or values, as the copies of rows find them, in chunks of 16 bytes.
struct CacheRows {
  const uint4* base;
  uint32_t page_step, row_step, head_step;
  int row_chunks;
};

// Steps of 16 bytes, which the copy engine needs too; counted in 32 bits where cache_rows_fit.
inline CacheRows cache_rows_of(const HeadRows& x) {
  const auto steps = [](int64_t extent, int64_t stride) {
    return extent == 1 ? 0u : static_cast<uint32_t>(stride / 8);
  };
  return {static_cast<const uint4*>(x.base), steps(x.batch, x.stride_b), steps(x.rows, x.stride_n),
          steps(x.heads, x.stride_h), static_cast<int>(x.columns / 8)};
}
inline bool cache_rows_fit(const HeadRows& x) {
  return ((x.batch - 1) * x.stride_b + (x.rows - 1) * x.stride_n) / 8 < 0xffffffff;
}

}  // namespace fi::cuda::sm90
