// Bindings of attention and attention with RoPE: check, params, dispatch.
#include "binding/attention.h"

#include "binding/indices.h"
#include "fi/batch_attention.h"
#include "fi/widen_fp8.h"

namespace fi::binding {
namespace {

struct Options {
  bool causal;
  std::optional<int64_t> q_offset;
  int64_t window_left;
  std::optional<double> scale;
  double logits_soft_cap;
  const MaybeTensor& alibi_slopes;
  const MaybeTensor& sinks;
};

struct Rope {
  const Tensor& cos;
  const Tensor& sin;
  bool interleaved;
  int64_t rotary_dim;
};

struct Outputs {
  Tensor output;
  MaybeTensor lse;
};

// Whether keys of 8 bits can be read as they are: by the kernels for batches, as pages of kv_len tokens.
// Those have rows evenly spaced, the last query at the last key, and LSE by token.
bool is_a_batch(const Tensor& query, const Tensor& key, const MaybeTensor& mask, int64_t q_offset,
                bool with_lse, const Options& o) {
  const int64_t batch = query.size(0), qo_len = query.size(2), kv_len = key.size(2);
  const bool by_position = o.causal || o.window_left >= 0 || o.alibi_slopes;
  return fp8_of(key) != Fp8::none && !mask && batch > 0 && qo_len > 0 && kv_len > 0 &&
         (!by_position || q_offset == kv_len - qo_len) && (!with_lse || qo_len == 1) &&
         (batch == 1 || qo_len == 1 || query.stride(0) == qo_len * query.stride(2));
}

BatchAttentionParams as_batch(const Tensor& query, const Tensor& key, const Tensor& value, Outputs& outputs,
                              const Options& o, ScratchArena& arena) {
  const int64_t batch = query.size(0), qo_len = query.size(2), kv_len = key.size(2);
  BatchAttentionParams p{};
  p.call = attention_params(query, key, value, outputs.output, std::nullopt, o.causal, o.window_left, o.scale,
                            o.logits_soft_cap, o.alibi_slopes, o.sinks, arena);
  p.call.qo_len = batch * qo_len;
  if (qo_len == 1) {
    p.call.q_stride_n = p.call.q_stride_b;
    p.call.o_stride_n = p.call.o_stride_b;
  }
  if (outputs.lse) p.call.lse = static_cast<float*>(outputs.lse->mutable_data_ptr());
  p.qo_indptr = equal_counts(qo_len);
  p.table = {equal_counts(1), equal_counts(1), batch, batch, batch, kv_len};
  p.k_stride_page = key.stride(0), p.v_stride_page = value.stride(0);
  p.kv_dtype = fp8_of(key);
  return p;
}

// Keys or values in query's dtype, exactly: a new tensor where they have 8 bits.
Tensor widened(const char* op, const char* name, const Tensor& t, const Tensor& query) {
  const Fp8 format = fp8_of(t);
  if (format == Fp8::none) return t;
  Tensor wide = empty({t.size(0), t.size(1), t.size(2), t.size(3)}, query.scalar_type(), query);
  const WidenFp8Params p{t.const_data_ptr(), rows_of(op, name, t),   t.size(3), format,
                         dtype_of(query),    wide.mutable_data_ptr()};
  run(FI_KERNEL_OF(widen_fp8), query, p);
  return wide;
}

Outputs attend(const char* op, bool with_lse, const Tensor& query, const Tensor& key, const Tensor& value,
               const Rope* rope, const MaybeTensor& mask, const Options& o) {
  check_no_grads(op, query, key, value, mask, o.alibi_slopes, o.sinks);
  if (rope) check_no_grads(op, rope->cos, rope->sin);
  check_query_key_value(op, query, key, value, "key", "value", /*takes_fp8=*/true);
  const int64_t qo_len = query.size(2), kv_len = key.size(2);
  check_mask(op, mask, query, kv_len);
  check_per_head(op, "alibi_slopes", o.alibi_slopes, query);
  check_per_head(op, "sinks", o.sinks, query);
  check_numbers(op, o.window_left, o.scale, o.logits_soft_cap);
  const int64_t q_offset = o.q_offset ? *o.q_offset : kv_len - qo_len;
  if (rope) {
    check_cos_sin(op, rope->cos, rope->sin, query, kv_len, rope->rotary_dim, "kv_len");
    FI_CHECK(op, q_offset >= 0 && q_offset + qo_len <= kv_len, "q_offset must place the ", qo_len,
             " query rows among the ", kv_len, " rows of cos and sin, got ", q_offset,
             "; pass longer keys or fewer queries");
  }
  Outputs outputs{empty_attention_output(query, value.size(3)), std::nullopt};
  if (with_lse) {
    outputs.lse = empty({query.size(0), query.size(1), qo_len}, ScalarType::Float, query);
  }
  ScratchArena arena(query);
  if (!rope && is_a_batch(query, key, mask, q_offset, with_lse, o)) {
    BatchAttentionParams p = as_batch(query, key, value, outputs, o, arena);
    run(FI_KERNEL_OF(batch_attention), query, p);
    return outputs;
  }
  const Tensor wide_key = widened(op, "key", key, query), wide_value = widened(op, "value", value, query);
  AttentionParams p =
      attention_params(query, wide_key, wide_value, outputs.output, mask, o.causal, o.window_left, o.scale,
                       o.logits_soft_cap, o.alibi_slopes, o.sinks, arena);
  p.q_offset = q_offset;
  if (rope) {
    p.rope = rope_table(rope->cos, rope->sin, query.size(3), rope->rotary_dim, rope->interleaved);
    p.rope_keys = true;
    p.rope_q_offset = q_offset;
  }
  if (with_lse) p.lse = static_cast<float*>(outputs.lse->mutable_data_ptr());
  run(FI_KERNEL_OF(attention), query, p);
  return outputs;
}

Tensor attention_op(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
                    bool causal, std::optional<int64_t> q_offset, int64_t window_left,
                    std::optional<double> scale, double logits_soft_cap, const MaybeTensor& alibi_slopes,
                    const MaybeTensor& sinks) {
  const Options options{causal, q_offset, window_left, scale, logits_soft_cap, alibi_slopes, sinks};
  return attend("attention", false, query, key, value, nullptr, mask, options).output;
}

std::tuple<Tensor, Tensor> attention_with_lse_op(const Tensor& query, const Tensor& key, const Tensor& value,
                                                 const MaybeTensor& mask, bool causal,
                                                 std::optional<int64_t> q_offset, int64_t window_left,
                                                 std::optional<double> scale, double logits_soft_cap,
                                                 const MaybeTensor& alibi_slopes, const MaybeTensor& sinks) {
  const Options options{causal, q_offset, window_left, scale, logits_soft_cap, alibi_slopes, sinks};
  Outputs r = attend("attention_with_lse", true, query, key, value, nullptr, mask, options);
  return {r.output, *r.lse};
}

Tensor rope_attention_op(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos,
                         const Tensor& sin, const MaybeTensor& mask, bool interleaved, int64_t rotary_dim,
                         bool causal, std::optional<int64_t> q_offset, int64_t window_left,
                         std::optional<double> scale, double logits_soft_cap, const MaybeTensor& alibi_slopes,
                         const MaybeTensor& sinks) {
  const Options options{causal, q_offset, window_left, scale, logits_soft_cap, alibi_slopes, sinks};
  const Rope rope{cos, sin, interleaved, rotary_dim};
  return attend("rope_attention", false, query, key, value, &rope, mask, options).output;
}

std::tuple<Tensor, Tensor> rope_attention_with_lse_op(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos, const Tensor& sin,
    const MaybeTensor& mask, bool interleaved, int64_t rotary_dim, bool causal,
    std::optional<int64_t> q_offset, int64_t window_left, std::optional<double> scale, double logits_soft_cap,
    const MaybeTensor& alibi_slopes, const MaybeTensor& sinks) {
  const Options options{causal, q_offset, window_left, scale, logits_soft_cap, alibi_slopes, sinks};
  const Rope rope{cos, sin, interleaved, rotary_dim};
  Outputs r = attend("rope_attention_with_lse", true, query, key, value, &rope, mask, options);
  return {r.output, *r.lse};
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("attention", TORCH_BOX(&fi::binding::attention_op));
  m.impl("attention_with_lse", TORCH_BOX(&fi::binding::attention_with_lse_op));
  m.impl("rope_attention", TORCH_BOX(&fi::binding::rope_attention_op));
  m.impl("rope_attention_with_lse", TORCH_BOX(&fi::binding::rope_attention_with_lse_op));
}
