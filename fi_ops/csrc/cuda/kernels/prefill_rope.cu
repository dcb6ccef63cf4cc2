// Queries and keys rotated into scratch memory, for the attention kernels that take them rotated.
#include "fi/cuda/sm80/prefill.h"
#include "fi/rope.h"

namespace fi::cuda {
namespace {

// Rows of `heads` to contiguous scratch memory; strides as in RopeHeads.
RopeHeads to_scratch(const AttentionParams& p, const void* input, int64_t num_heads, int64_t len,
                     int64_t stride_b, int64_t stride_h, int64_t stride_n) {
  const int64_t row = p.head_dim_qk, bytes = p.batch * num_heads * len * row * size_of(p.dtype);
  return {input,
          p.scratch.allocate(p.scratch.context, bytes),
          num_heads,
          {stride_b, stride_h, stride_n},
          {num_heads * len * row, len * row, row}};
}

}  // namespace

AttentionParams rotate_first(const AttentionParams& p, const Gpu& gpu) {
  const RopeTable& t = p.rope;
  AttentionParams rotated = p;
  rotated.rope = {};
  rotated.rope_keys = false;
  const RopeHeads query =
      to_scratch(p, p.query, p.num_qo_heads, p.qo_len, p.q_stride_b, p.q_stride_h, p.q_stride_n);
  rotated.query = query.output;
  rotated.q_stride_b = query.output_strides[0];
  rotated.q_stride_h = query.output_strides[1];
  rotated.q_stride_n = query.output_strides[2];
  RopeHeads key{};
  if (p.rope_keys) {
    key = to_scratch(p, p.key, p.num_kv_heads, p.kv_len, p.k_stride_b, p.k_stride_h, p.k_stride_n);
    rotated.key = key.output;
    rotated.k_stride_b = key.output_strides[0];
    rotated.k_stride_h = key.output_strides[1];
    rotated.k_stride_n = key.output_strides[2];
  }
  auto rotate = [&](const RopeHeads& queries, const RopeHeads& keys, int64_t first_row, int64_t len) {
    const int64_t size = size_of(t.dtype);
    RopeParams r{};
    r.query = queries;
    r.key = keys;
    r.cos = static_cast<const char*>(t.cos) + first_row * t.cos_stride_row * size;
    r.sin = static_cast<const char*>(t.sin) + first_row * t.sin_stride_row * size;
    r.cos_strides[0] = t.cos_stride_b, r.cos_strides[1] = t.cos_stride_row;
    r.sin_strides[0] = t.sin_stride_b, r.sin_strides[1] = t.sin_stride_row;
    r.num_rows = len;
    r.batch = p.batch;
    r.len = len;
    r.head_dim = p.head_dim_qk;
    r.rotary_dim = t.rotary_dim;
    r.width = t.width;
    r.dtype = p.dtype;
    r.angle_dtype = t.dtype;
    r.interleaved = t.interleaved;
    rope(r, gpu);
  };
  if (p.rope_keys && p.rope_q_offset == 0 && p.qo_len == p.kv_len) {
    rotate(query, key, 0, p.kv_len);
  } else {
    rotate(query, {}, p.rope_q_offset, p.qo_len);
    if (p.rope_keys) rotate({}, key, 0, p.kv_len);
  }
  return rotated;
}

}  // namespace fi::cuda
