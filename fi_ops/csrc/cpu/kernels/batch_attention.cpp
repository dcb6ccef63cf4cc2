// Attention over a batch on the CPU: each request's keys and values are gathered, then attended to as one
// call.
#include "fi/batch_attention.h"

#include <vector>

#include "fi/cpu/rope_table.h"

namespace fi::FI_ISA {
namespace {

template <class T>
void gather(const BatchAttentionParams& p, const Request& r, const Parallel& parallel, bool keys, T* out) {
  const AttentionParams& c = p.call;
  const void* data = keys ? c.key : c.value;
  const int64_t stride_page = keys ? p.k_stride_page : p.v_stride_page;
  const int64_t stride_n = keys ? c.k_stride_n : c.v_stride_n, stride_h = keys ? c.k_stride_h : c.v_stride_h;
  const int64_t dim = keys ? c.head_dim_qk : c.head_dim_vo;
  const PerHead scale = keys ? PerHead{} : p.v_scale;
  for_each_block(parallel, r.kv_len, 64, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const PageEntry at = key_entry(p, r, j);
      for (int64_t h = 0; h < c.num_kv_heads; ++h) {
        const int64_t offset = at.page * stride_page + at.entry * stride_n + h * stride_h;
        T* dst = out + (j * c.num_kv_heads + h) * dim;
        const float s = scale ? scale.at(h) : 1.0f;
        for (int64_t d = 0; d < dim; ++d) {
          const float x = p.kv_dtype == Fp8::none ? to_float(static_cast<const T*>(data)[offset + d])
                          : p.kv_dtype == Fp8::e4m3
                              ? from_e4m3(static_cast<const uint8_t*>(data)[offset + d])
                              : from_e5m2(static_cast<const uint8_t*>(data)[offset + d]);
          dst[d] = from_float<T>(x * s);
        }
      }
    }
  });
}

template <class T>
void attend(const BatchAttentionParams& p, const Parallel& parallel) {
  const AttentionParams& c = p.call;
  T* out = static_cast<T*>(c.out);
  __builtin_memset(out, 0, c.qo_len * c.num_qo_heads * c.head_dim_vo * sizeof(T));
  for (int64_t n = 0; c.lse && n < c.qo_len * c.num_qo_heads; ++n) c.lse[n] = -kInf;
  for (int64_t b = 0; b < c.batch; ++b) {
    const Request r = request_of(p, b);
    if (r.qo_len == 0 || c.num_qo_heads == 0) continue;
    std::vector<T> k(r.kv_len * c.num_kv_heads * c.head_dim_qk + 1),
        v(r.kv_len * c.num_kv_heads * c.head_dim_vo + 1);
    gather(p, r, parallel, true, k.data());
    gather(p, r, parallel, false, v.data());
    std::vector<float> lse(r.qo_len * c.num_qo_heads);
    std::vector<uint8_t> mask;
    AttentionParams one = c;
    one.batch = 1;
    one.qo_len = r.qo_len, one.kv_len = r.kv_len;
    one.query = static_cast<const T*>(c.query) + r.q_begin * c.q_stride_n;
    one.key = k.data(), one.k_stride_n = c.num_kv_heads * c.head_dim_qk, one.k_stride_h = c.head_dim_qk;
    one.value = v.data(), one.v_stride_n = c.num_kv_heads * c.head_dim_vo, one.v_stride_h = c.head_dim_vo;
    one.out = out + r.q_begin * c.o_stride_n;
    one.lse = c.lse ? lse.data() : nullptr;
    one.q_offset = one.rope_q_offset = r.kv_len - r.qo_len;
    if (p.custom_mask) {
      mask.resize(r.qo_len * r.kv_len + 1);
      for (int64_t i = 0; i < r.qo_len; ++i) {
        for (int64_t j = 0; j < r.kv_len; ++j) mask[i * r.kv_len + j] = custom_mask_bit(p, r, i, j);
      }
      one.mask = mask.data();
      one.mask_stride_q = r.kv_len, one.mask_stride_k = 1;
    }
    const int64_t group = c.num_qo_heads / c.num_kv_heads, calls = p.k_scale ? c.num_kv_heads : 1;
    for (int64_t h = 0; h < calls; ++h) {
      AttentionParams part = one;
      if (p.k_scale) {
        part.scale *= p.k_scale.at(h);
        part.num_kv_heads = 1, part.num_qo_heads = group;
        part.query = static_cast<const T*>(one.query) + h * group * one.q_stride_h;
        part.key = k.data() + h * one.k_stride_h, part.value = v.data() + h * one.v_stride_h;
        part.out = static_cast<T*>(one.out) + h * group * one.o_stride_h;
        if (one.lse) part.lse = one.lse + h * group * r.qo_len;
        if (c.alibi_slopes) part.alibi_slopes.data += h * group * c.alibi_slopes.stride;
        if (c.sinks) part.sinks.data += h * group * c.sinks.stride;
      }
      attention(part, parallel);
    }
    for (int64_t i = 0; c.lse && i < r.qo_len; ++i) {
      for (int64_t h = 0; h < c.num_qo_heads; ++h)
        c.lse[(r.q_begin + i) * c.num_qo_heads + h] = lse[h * r.qo_len + i];
    }
  }
}

}  // namespace

void batch_attention(const BatchAttentionParams& p, const Parallel& parallel) {
  p.call.dtype == DType::f32    ? attend<float>(p, parallel)
  : p.call.dtype == DType::bf16 ? attend<bf16>(p, parallel)
                                : attend<f16>(p, parallel);
}

}  // namespace fi::FI_ISA
