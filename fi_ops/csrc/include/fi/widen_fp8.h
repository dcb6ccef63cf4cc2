// Queries, keys and values of 8 bits in another dtype, times their scales, for the kernels over dense
// tensors.
#pragma once

#include "fi/fp8_attention.h"
#include "fi/fp8_batch_attention.h"
#include "fi/rows.h"

namespace fi {

// Rounded once, or exact where there is no scale.
struct WidenFp8Params {
  const void* input;
  Rows rows;    // [batch, heads, len]
  int64_t dim;  // elements of a row
  Fp8 format;
  DType dtype;   // of output
  void* output;  // [rows.num_rows, dim]

  PerHead scale;  // none: 1
  int64_t heads = 1, len = 1;

  FI_HD float scale_of_row(int64_t row) const { return scale ? scale.at(row / len % heads) : 1.0f; }
};

// [batch, heads, len, dim] of 8 bits, and where it goes, in `dtype`.
inline WidenFp8Params widen_heads(const void* input, int64_t batch, int64_t heads, int64_t len, int64_t dim,
                                  int64_t stride_b, int64_t stride_h, int64_t stride_n, Fp8 format,
                                  DType dtype, const PerHead& scale, void* output) {
  WidenFp8Params p{input, {}, dim, format, dtype, output, scale, heads, len};
  p.rows.num_rows = batch * heads * len;
  p.rows.ndim = 3;
  p.rows.sizes[0] = batch, p.rows.sizes[1] = heads, p.rows.sizes[2] = len;
  p.rows.strides[0] = stride_b, p.rows.strides[1] = stride_h, p.rows.strides[2] = stride_n;
  return p;
}

// The same call over tensors in its dtype, in scratch memory. `widen(params)` runs widen_fp8.
template <class Widen>
AttentionParams widened(const Fp8AttentionParams& p, const Widen& widen) {
  AttentionParams c = p.call;
  const auto move = [&](const void*& data, int64_t heads, int64_t len, int64_t dim, int64_t& stride_b,
                        int64_t& stride_h, int64_t& stride_n, const PerHead& scale) {
    const int64_t rows = c.batch * heads * len;
    void* output = c.scratch.allocate(c.scratch.context, rows * dim * size_of(c.dtype));
    if (rows * dim > 0)
      widen(widen_heads(data, c.batch, heads, len, dim, stride_b, stride_h, stride_n, p.format, c.dtype,
                        scale, output));
    data = output;
    stride_b = heads * len * dim, stride_h = len * dim, stride_n = dim;
  };
  move(c.query, c.num_qo_heads, c.qo_len, c.head_dim_qk, c.q_stride_b, c.q_stride_h, c.q_stride_n, p.q_scale);
  move(c.key, c.num_kv_heads, c.kv_len, c.head_dim_qk, c.k_stride_b, c.k_stride_h, c.k_stride_n, p.k_scale);
  move(c.value, c.num_kv_heads, c.kv_len, c.head_dim_vo, c.v_stride_b, c.v_stride_h, c.v_stride_n, p.v_scale);
  return c;
}

// The same batch with queries in its dtype, in scratch memory that nothing is written to yet; what has keys
// stays as it is.
inline BatchAttentionParams with_wide_query(const Fp8BatchAttentionParams& p) {
  BatchAttentionParams wide = p.batch;
  AttentionParams& c = wide.call;
  c.q_stride_h = c.head_dim_qk, c.q_stride_n = c.num_qo_heads * c.head_dim_qk;
  c.query = c.scratch.allocate(c.scratch.context, c.qo_len * c.q_stride_n * size_of(c.dtype));
  return wide;
}
// What is written there.
inline WidenFp8Params widening(const Fp8BatchAttentionParams& p, const BatchAttentionParams& wide) {
  const AttentionParams& c = p.batch.call;
  return widen_heads(c.query, c.qo_len, c.num_qo_heads, 1, c.head_dim_qk, c.q_stride_n, c.q_stride_h, 0,
                     p.batch.kv_dtype, c.dtype, p.q_scale, const_cast<void*>(wide.call.query));
}

}  // namespace fi

FI_KERNEL(widen_fp8, fi::WidenFp8Params)
