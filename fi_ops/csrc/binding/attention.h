// What the bindings of the attention ops share: the checks of fi_ops/library/_attention_checks.py, with the
// same texts in the same order, and filling AttentionParams.
#pragma once

#include <cmath>
#include <vector>

#include "binding/device.h"
#include "binding/rope.h"
#include "fi/attention.h"

namespace fi::binding {

using MaybeTensor = std::optional<Tensor>;

inline constexpr std::initializer_list<ScalarType> floats_and_fp8 = {
    ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Float8_e4m3fn,
    ScalarType::Float8_e5m2};

// float32 and, where it is another one, `dtype`.
inline std::vector<ScalarType> float32_or(ScalarType dtype) {
  if (dtype == ScalarType::Float) return {ScalarType::Float};
  return {ScalarType::Float, dtype};
}

// Keys and values: query's dtype or, where the op takes it and query has more, one of 8 bits.
inline void check_operand(const char* op, const char* name, const Tensor& t, const Tensor& query,
                          bool takes_fp8) {
  check_same_device(op, name, t, "query", query);
  if (!takes_fp8 || fp8_of(query) != Fp8::none || fp8_of(t) == Fp8::none)
    check_same_dtype(op, name, t, "query", query);
  check_ndim(op, name, t, 4, "[batch, num_kv_heads, kv_len, head_dim]");
  check_last_dim_contiguous(op, name, t);
}

inline void check_query_key_value(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                  const char* key_name = "key", const char* value_name = "value",
                                  bool takes_fp8 = false, bool takes_fp8_query = false) {
  takes_fp8_query ? check_dtype(op, "query", query, floats_and_fp8) : check_dtype(op, "query", query, floats);
  check_ndim(op, "query", query, 4, "[batch, num_qo_heads, qo_len, head_dim]");
  check_last_dim_contiguous(op, "query", query);
  check_operand(op, key_name, key, query, takes_fp8);
  check_operand(op, value_name, value, query, takes_fp8);
  if (takes_fp8) check_same_dtype(op, value_name, value, key_name, key);
  const int64_t heads = query.size(1), kv_heads = key.size(1), kv_len = key.size(2);
  check_shape(op, key_name, key, {query.size(0), kv_heads, kv_len, query.size(3)},
              "[batch, num_kv_heads, kv_len, head_dim]");
  check_shape(op, value_name, value, {query.size(0), kv_heads, kv_len, value.size(3)},
              "[batch, num_kv_heads, kv_len, head_dim_vo]");
  FI_CHECK(op, kv_heads ? heads % kv_heads == 0 : heads == 0, "query must have a multiple of ", key_name,
           "'s ", kv_heads, " heads, got ", heads, "; repeat or drop heads so that they divide");
}

// `dtype`: of additive masks besides float32.
inline void check_mask(const char* op, const MaybeTensor& mask, const Tensor& query, int64_t kv_len,
                       ScalarType dtype) {
  if (!mask) return;
  check_same_device(op, "mask", *mask, "query", query);
  std::vector<ScalarType> allowed = float32_or(dtype);
  allowed.insert(allowed.begin(), ScalarType::Bool);
  check_dtype(op, "mask", *mask, allowed);
  const std::array<int64_t, 4> want{query.size(0), query.size(1), query.size(2), kv_len};
  bool ok = mask->dim() == 4;
  for (int64_t d = 0; ok && d < 4; ++d) ok = mask->size(d) == 1 || mask->size(d) == want[d];
  FI_CHECK(op, ok, "mask must broadcast to [batch, num_qo_heads, qo_len, kv_len] = ", list_text(want),
           ", got ", shape_of(*mask), "; check the sizes against the other arguments");
}

inline void check_per_head(const char* op, const char* name, const MaybeTensor& t, const Tensor& query) {
  if (!t) return;
  check_same_device(op, name, *t, "query", query);
  check_dtype(op, name, *t, std::array{ScalarType::Float});
  check_shape(op, name, *t, {query.size(1)}, "[num_qo_heads]");
}

// What 8-bit values are to be multiplied by: one or one a head.
inline void check_scale(const char* op, const char* name, const MaybeTensor& t, const Tensor& query,
                        int64_t heads, const char* heads_name = "num_kv_heads",
                        const char* head = "KV head") {
  if (!t) return;
  check_same_device(op, name, *t, "query", query);
  check_dtype(op, name, *t, std::array{ScalarType::Float});
  FI_CHECK(op, t->dim() == 1 && (t->size(0) == 1 || t->size(0) == heads), name, " must be [1 or ", heads_name,
           " ", heads, "], got ", shape_of(*t), "; pass one scale, or one a ", head);
}

// The scale of 8-bit queries [batch or tokens, num_qo_heads, ...], and the dtype that their output has.
inline void check_query_options(const char* op, const Tensor& query, const MaybeTensor& q_scale,
                                const std::optional<ScalarType>& out_dtype) {
  check_scale(op, "q_scale", q_scale, query, query.size(1), "num_qo_heads", "head");
  const bool fp8 = fp8_of(query) != Fp8::none;
  FI_CHECK(op, !q_scale || fp8, "q_scale must be left out where query is not of 8 bits, got query in ",
           dtype_name(query.scalar_type()), "; fold them into scale and the output");
  if (!out_dtype) return;
  if (fp8) {
    FI_CHECK(op,
             *out_dtype == ScalarType::Float || *out_dtype == ScalarType::BFloat16 ||
                 *out_dtype == ScalarType::Half,
             "out_dtype must be float32, bfloat16 or float16, got ", dtype_name(*out_dtype),
             "; leave it out for bfloat16");
  } else {
    FI_CHECK(op, *out_dtype == query.scalar_type(), "out_dtype must be query's dtype ",
             dtype_name(query.scalar_type()), ", got ", dtype_name(*out_dtype),
             "; leave it out and convert the output");
  }
}

// What attention of `query` returns.
inline ScalarType output_dtype(const Tensor& query, const std::optional<ScalarType>& out_dtype) {
  return fp8_of(query) == Fp8::none ? query.scalar_type() : out_dtype.value_or(ScalarType::BFloat16);
}

// `suffix`: of the arguments' names.
inline void check_numbers(const char* op, int64_t window_left, const std::optional<double>& scale,
                          double soft_cap, const char* suffix = "") {
  FI_CHECK(op, window_left >= -1, "window_left", suffix, " must be -1 (no window) or more, got ", window_left,
           "; pass -1 for none");
  FI_CHECK(op, !scale || !std::isnan(*scale), "scale", suffix,
           " must be a number, got nan; leave it out for 1/sqrt(head_dim)");
  FI_CHECK(op, soft_cap >= 0, "logits_soft_cap", suffix, " must be 0 (none) or more, got ", soft_cap,
           "; pass 0 for none");
}

// ---- filling params ----

// Memory for one call from torch's allocator, small pieces cut from shared blocks.
class ScratchArena {
 public:
  explicit ScratchArena(const Tensor& like) : like_(like) {}
  ScratchArena(const ScratchArena&) = delete;

  void* allocate(int64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left_) {
      const int64_t size = bytes > kBlock ? bytes : kBlock;
      blocks_.push_back(empty({size}, ScalarType::Byte, like_));
      next_ = static_cast<char*>(blocks_.back().mutable_data_ptr());
      left_ = size;
    }
    void* p = next_;
    next_ += bytes;
    left_ -= bytes;
    return p;
  }

  Scratch handle() {
    return {[](void* self, int64_t bytes) { return static_cast<ScratchArena*>(self)->allocate(bytes); },
            this};
  }

 private:
  static constexpr int64_t kBlock = 65536;
  const Tensor& like_;
  std::vector<Tensor> blocks_;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

inline PerHead per_head(const MaybeTensor& t) {
  return t ? PerHead{static_cast<const float*>(t->const_data_ptr()), t->stride(0)} : PerHead{};
}

inline PerHead scale_of_heads(const MaybeTensor& t) {
  if (!t) return {};
  return {static_cast<const float*>(t->const_data_ptr()), t->size(0) == 1 ? 0 : t->stride(0)};
}

inline float scale_or_default(const std::optional<double>& scale, int64_t head_dim) {
  return static_cast<float>(scale ? *scale : head_dim ? 1.0 / std::sqrt(double(head_dim)) : 1.0);
}

// Stride of a dimension that may be broadcast.
inline int64_t broadcast_stride(const Tensor& t, int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); }

// [batch, qo_len, num_qo_heads, head_dim_vo] in memory, seen as [batch, num_qo_heads, qo_len, head_dim_vo].
inline Tensor empty_attention_output(const Tensor& query, int64_t head_dim_vo, ScalarType dtype) {
  Tensor out = empty({query.size(0), query.size(2), query.size(1), head_dim_vo}, dtype, query);
  return torch::stable::transpose(out, 1, 2);
}

inline AttentionParams attention_params(const Tensor& query, const Tensor& key, const Tensor& value,
                                        const Tensor& out, const MaybeTensor& mask, bool causal,
                                        int64_t window_left, const std::optional<double>& scale,
                                        double soft_cap, const MaybeTensor& alibi_slopes,
                                        const MaybeTensor& sinks, ScratchArena& arena) {
  AttentionParams p{};
  p.dtype = dtype_of(out);
  p.batch = query.size(0);
  p.num_qo_heads = query.size(1);
  p.num_kv_heads = key.size(1);
  p.qo_len = query.size(2);
  p.kv_len = key.size(2);
  p.head_dim_qk = query.size(3);
  p.head_dim_vo = value.size(3);
  p.query = query.const_data_ptr();
  p.q_stride_b = query.stride(0), p.q_stride_h = query.stride(1), p.q_stride_n = query.stride(2);
  p.key = key.const_data_ptr();
  p.k_stride_b = key.stride(0), p.k_stride_h = key.stride(1), p.k_stride_n = key.stride(2);
  p.value = value.const_data_ptr();
  p.v_stride_b = value.stride(0), p.v_stride_h = value.stride(1), p.v_stride_n = value.stride(2);
  p.out = const_cast<void*>(out.const_data_ptr());
  p.o_stride_b = out.stride(0), p.o_stride_h = out.stride(1), p.o_stride_n = out.stride(2);
  if (mask) {
    p.mask = mask->const_data_ptr();
    p.mask_dtype = dtype_of(*mask);
    p.mask_stride_b = broadcast_stride(*mask, 0), p.mask_stride_h = broadcast_stride(*mask, 1);
    p.mask_stride_q = broadcast_stride(*mask, 2), p.mask_stride_k = broadcast_stride(*mask, 3);
  }
  p.causal = causal;
  p.window_left = window_left;
  p.scale = scale_or_default(scale, p.head_dim_qk);
  p.logits_soft_cap = static_cast<float>(soft_cap);
  p.alibi_slopes = per_head(alibi_slopes);
  p.sinks = per_head(sinks);
  p.scratch = arena.handle();
  return p;
}

inline RopeTable rope_table(const Tensor& cos, const Tensor& sin, int64_t head_dim, int64_t rotary_dim,
                            bool interleaved) {
  RopeTable t;
  t.cos = cos.const_data_ptr();
  t.sin = sin.const_data_ptr();
  t.dtype = dtype_of(cos);
  t.cos_stride_b = broadcast_stride(cos, 0), t.cos_stride_row = cos.stride(1);
  t.sin_stride_b = broadcast_stride(sin, 0), t.sin_stride_row = sin.stride(1);
  t.width = cos.size(2);
  t.rotary_dim = rotary_dim ? rotary_dim : head_dim;
  t.interleaved = interleaved;
  return t;
}

}  // namespace fi::binding
