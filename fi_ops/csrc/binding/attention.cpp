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
  MaybeTensor q_scale, k_scale, v_scale;
  std::optional<ScalarType> out_dtype;
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

void check_fp8_options(const char* op, const Tensor& query, const Tensor& key, const Options& o) {
  check_query_options(op, query, o.q_scale, o.out_dtype);
  check_scale(op, "k_scale", o.k_scale, query, key.size(1));
  check_scale(op, "v_scale", o.v_scale, query, key.size(1));
  FI_CHECK(op, !(o.k_scale || o.v_scale) || fp8_of(key) != Fp8::none,
           "k_scale and v_scale must be left out where key is not of 8 bits, got key in ",
           dtype_name(key.scalar_type()), "; fold them into scale and the output");
}

BatchAttentionParams as_batch(const Tensor& query, const Tensor& key, const Tensor& value, Outputs& outputs,
                              const Options& o, ScratchArena& arena) {
  const int64_t batch = query.size(0), qo_len = query.size(2), kv_len = key.size(2);
  BatchAttentionParams p{};
  p.call = attention_params(query, key, value, outputs.output, std::nullopt, o.causal, o.window_left, o.scale,
                            o.logits_soft_cap, o.alibi_slopes, o.sinks, arena);
  p.call.qo_len = batch * qo_len;
  p.call.kv_len = batch * kv_len;  // of all requests: what scratch memory is sized by
  if (qo_len == 1) {
    p.call.q_stride_n = p.call.q_stride_b;
    p.call.o_stride_n = p.call.o_stride_b;
  }
  if (outputs.lse) p.call.lse = static_cast<float*>(outputs.lse->mutable_data_ptr());
  p.qo_indptr = equal_counts(qo_len);
  p.table = {equal_counts(1), equal_counts(1), batch, batch, batch, kv_len};
  p.k_stride_page = key.stride(0), p.v_stride_page = value.stride(0);
  p.kv_dtype = fp8_of(key);
  p.k_scale = scale_of_heads(o.k_scale);
  p.v_scale = scale_of_heads(o.v_scale);
  return p;
}

// Queries, keys or values times their scale: a new tensor where they have 8 bits.
Tensor widened(const Tensor& t, ScalarType dtype, const MaybeTensor& scale) {
  const Fp8 format = fp8_of(t);
  if (format == Fp8::none) return t;
  Tensor wide = empty({t.size(0), t.size(1), t.size(2), t.size(3)}, dtype, t);
  if (t.numel() == 0) return wide;
  const WidenFp8Params p =
      widen_heads(t.const_data_ptr(), t.size(0), t.size(1), t.size(2), t.size(3), t.stride(0), t.stride(1),
                  t.stride(2), format, dtype_of(wide), scale_of_heads(scale), wide.mutable_data_ptr());
  run(FI_KERNEL_OF(widen_fp8), t, p);
  return wide;
}

// From this many rows on, tensors of 8 bits are multiplied as such where a device can, or all of them
// widened; below, keys and values are what there is to read, and stay as they are.
constexpr int64_t kManyRows = 64;

Outputs attend(const char* op, bool with_lse, const Tensor& given_query, const Tensor& key,
               const Tensor& value, const Rope* rope, const MaybeTensor& mask, const Options& o) {
  check_no_grads(op, given_query, key, value, mask, o.alibi_slopes, o.sinks, o.q_scale, o.k_scale, o.v_scale);
  if (rope) check_no_grads(op, rope->cos, rope->sin);
  check_query_key_value(op, given_query, key, value, "key", "value", /*takes_fp8=*/true,
                        /*takes_fp8_query=*/rope == nullptr);
  const bool fp8_query = fp8_of(given_query) != Fp8::none;
  const int64_t qo_len = given_query.size(2), kv_len = key.size(2);
  check_fp8_options(op, given_query, key, o);
  const ScalarType dtype = output_dtype(given_query, o.out_dtype);
  check_mask(op, mask, given_query, kv_len, dtype);
  check_per_head(op, "alibi_slopes", o.alibi_slopes, given_query);
  check_per_head(op, "sinks", o.sinks, given_query);
  check_numbers(op, o.window_left, o.scale, o.logits_soft_cap);
  const int64_t q_offset = o.q_offset ? *o.q_offset : kv_len - qo_len;
  if (rope) {
    check_cos_sin(op, rope->cos, rope->sin, given_query, kv_len, rope->rotary_dim, "kv_len");
    FI_CHECK(op, q_offset >= 0 && q_offset + qo_len <= kv_len, "q_offset must place the ", qo_len,
             " query rows among the ", kv_len, " rows of cos and sin, got ", q_offset,
             "; pass longer keys or fewer queries");
  }
  Outputs outputs{empty_attention_output(given_query, value.size(3), dtype), std::nullopt};
  if (with_lse) {
    outputs.lse = empty({given_query.size(0), given_query.size(1), qo_len}, ScalarType::Float, given_query);
  }
  ScratchArena arena(given_query);
  const auto params = [&](const Tensor& q, const Tensor& k, const Tensor& v) {
    AttentionParams p = attention_params(q, k, v, outputs.output, mask, o.causal, o.window_left, o.scale,
                                         o.logits_soft_cap, o.alibi_slopes, o.sinks, arena);
    p.q_offset = q_offset;
    if (with_lse) p.lse = static_cast<float*>(outputs.lse->mutable_data_ptr());
    return p;
  };
  if (fp8_query && qo_len >= kManyRows) {
    Fp8AttentionParams p{params(given_query, key, value), fp8_of(given_query), scale_of_heads(o.q_scale),
                         scale_of_heads(o.k_scale), scale_of_heads(o.v_scale)};
    run(FI_KERNEL_OF(fp8_attention), given_query, p);
    return outputs;
  }
  const Tensor query = widened(given_query, dtype, o.q_scale);
  if (!rope && is_a_batch(query, key, mask, q_offset, with_lse, o)) {
    BatchAttentionParams p = as_batch(query, key, value, outputs, o, arena);
    run(FI_KERNEL_OF(batch_attention), query, p);
    return outputs;
  }
  const Tensor wide_key = widened(key, dtype, o.k_scale), wide_value = widened(value, dtype, o.v_scale);
  AttentionParams p = params(query, wide_key, wide_value);
  if (rope) {
    p.rope = rope_table(rope->cos, rope->sin, query.size(3), rope->rotary_dim, rope->interleaved);
    p.rope_keys = true;
    p.rope_q_offset = q_offset;
  }
  run(FI_KERNEL_OF(attention), query, p);
  return outputs;
}

Tensor attention_op(const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask,
                    bool causal, std::optional<int64_t> q_offset, int64_t window_left,
                    std::optional<double> scale, double logits_soft_cap, const MaybeTensor& alibi_slopes,
                    const MaybeTensor& sinks, const MaybeTensor& q_scale, const MaybeTensor& k_scale,
                    const MaybeTensor& v_scale, std::optional<ScalarType> out_dtype) {
  const Options options{causal, q_offset, window_left, scale,   logits_soft_cap, alibi_slopes,
                        sinks,  q_scale,  k_scale,     v_scale, out_dtype};
  return attend("attention", false, query, key, value, nullptr, mask, options).output;
}

std::tuple<Tensor, Tensor> attention_with_lse_op(
    const Tensor& query, const Tensor& key, const Tensor& value, const MaybeTensor& mask, bool causal,
    std::optional<int64_t> q_offset, int64_t window_left, std::optional<double> scale, double logits_soft_cap,
    const MaybeTensor& alibi_slopes, const MaybeTensor& sinks, const MaybeTensor& q_scale,
    const MaybeTensor& k_scale, const MaybeTensor& v_scale, std::optional<ScalarType> out_dtype) {
  const Options options{causal, q_offset, window_left, scale,   logits_soft_cap, alibi_slopes,
                        sinks,  q_scale,  k_scale,     v_scale, out_dtype};
  Outputs r = attend("attention_with_lse", true, query, key, value, nullptr, mask, options);
  return {r.output, *r.lse};
}

Tensor rope_attention_op(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos,
                         const Tensor& sin, const MaybeTensor& mask, bool interleaved, int64_t rotary_dim,
                         bool causal, std::optional<int64_t> q_offset, int64_t window_left,
                         std::optional<double> scale, double logits_soft_cap, const MaybeTensor& alibi_slopes,
                         const MaybeTensor& sinks) {
  const Options options{causal, q_offset, window_left, scale, logits_soft_cap, alibi_slopes, sinks,
                        {},     {},       {},          {}};
  const Rope rope{cos, sin, interleaved, rotary_dim};
  return attend("rope_attention", false, query, key, value, &rope, mask, options).output;
}

std::tuple<Tensor, Tensor> rope_attention_with_lse_op(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cos, const Tensor& sin,
    const MaybeTensor& mask, bool interleaved, int64_t rotary_dim, bool causal,
    std::optional<int64_t> q_offset, int64_t window_left, std::optional<double> scale, double logits_soft_cap,
    const MaybeTensor& alibi_slopes, const MaybeTensor& sinks) {
  const Options options{causal, q_offset, window_left, scale, logits_soft_cap, alibi_slopes, sinks,
                        {},     {},       {},          {}};
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
