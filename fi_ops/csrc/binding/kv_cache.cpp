// Bindings of the static KV cache: append, and attention that appends first.
#include "binding/attention.h"
#include "binding/indices.h"

namespace fi::binding {
namespace {

// [qo_len] or [batch, qo_len] (_check_positions in library/kv_cache.py).
void check_positions(const char* op, const char* name, const Tensor& positions, const Tensor& k_cache,
                     int64_t qo_len, const char* meaning) {
  check_same_device(op, name, positions, "k_cache", k_cache);
  check_dtype(op, name, positions, index_types);
  const int64_t batch = k_cache.size(0), ndim = positions.dim();
  const bool ok = (ndim == 1 || ndim == 2) && positions.size(ndim - 1) == qo_len &&
                  (ndim == 1 || positions.size(0) == batch);
  FI_CHECK(op, ok, name, " must be [qo_len] or [batch, qo_len] = [", qo_len, "] or [", batch, ", ", qo_len,
           "], got ", shape_of(positions), "; pass ", meaning);
}

// The new tokens and their slots, against caches that are checked already (_check_new_tokens in
// library/kv_cache.py).
void check_new_tokens(const char* op, const Tensor& k_cache, const Tensor& v_cache, const Tensor& key,
                      const Tensor& value, const Tensor& positions, int64_t qo_len) {
  const int64_t batch = k_cache.size(0), kv_heads = k_cache.size(1);
  auto check = [&](const char* name, const Tensor& t, const char* cache_name, const Tensor& cache) {
    check_same_device(op, name, t, cache_name, cache);
    check_same_dtype(op, name, t, cache_name, cache);
    check_shape(op, name, t, {batch, kv_heads, qo_len, cache.size(3)},
                "[batch, num_kv_heads, qo_len, head_dim]");
    check_last_dim_contiguous(op, name, t);
  };
  check("key", key, "k_cache", k_cache);
  check("value", value, "v_cache", v_cache);
  check_positions(op, "positions", positions, k_cache, qo_len, "the cache slot of each new token");
}

// The positions as the kernels read them; where values are checked, all of them before anything is written.
Positions read_positions(const char* op, const Tensor& positions, int64_t batch, int64_t qo_len,
                         int64_t max_len) {
  if (const auto values = values_to_check(positions)) {
    const Positions p = positions_of(*values);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < qo_len; ++i) {
        const int64_t slot = p.at(b, i);
        FI_CHECK(op, slot >= 0 && slot < max_len, "positions must be in [0, ", max_len,
                 "), the cache's slots, got ", slot, "; grow the cache or fix the positions");
      }
    }
  }
  return positions_of(positions);
}

AppendParams append_params(Tensor& k_cache, Tensor& v_cache, const Tensor& key, const Tensor& value,
                           Positions positions) {
  AppendParams p{};
  p.batch = key.size(0);
  p.num_kv_heads = key.size(1);
  p.new_len = key.size(2);
  p.head_dim_qk = key.size(3);
  p.head_dim_vo = value.size(3);
  p.dtype = dtype_of(key);
  p.key = key.const_data_ptr();
  p.k_stride_b = key.stride(0), p.k_stride_h = key.stride(1), p.k_stride_n = key.stride(2);
  p.value = value.const_data_ptr();
  p.v_stride_b = value.stride(0), p.v_stride_h = value.stride(1), p.v_stride_n = value.stride(2);
  p.k_cache = k_cache.mutable_data_ptr();
  p.kc_stride_b = k_cache.stride(0), p.kc_stride_h = k_cache.stride(1), p.kc_stride_n = k_cache.stride(2);
  p.v_cache = v_cache.mutable_data_ptr();
  p.vc_stride_b = v_cache.stride(0), p.vc_stride_h = v_cache.stride(1), p.vc_stride_n = v_cache.stride(2);
  p.max_len = k_cache.size(2);
  p.positions = positions;
  return p;
}

void append_kv_op(Tensor k_cache, Tensor v_cache, const Tensor& key, const Tensor& value,
                  const Tensor& positions) {
  const char* op = "append_kv";
  const char* cache_layout = "[batch, num_kv_heads, max_len, head_dim]";
  check_no_grads(op, k_cache, v_cache, key, value);
  check_dtype(op, "k_cache", k_cache, floats);
  check_ndim(op, "k_cache", k_cache, 4, cache_layout);
  check_last_dim_contiguous(op, "k_cache", k_cache);
  check_same_device(op, "v_cache", v_cache, "k_cache", k_cache);
  check_same_dtype(op, "v_cache", v_cache, "k_cache", k_cache);
  check_ndim(op, "v_cache", v_cache, 4, cache_layout);
  check_last_dim_contiguous(op, "v_cache", v_cache);
  check_shape(op, "v_cache", v_cache, {k_cache.size(0), k_cache.size(1), k_cache.size(2), v_cache.size(3)},
              "[batch, num_kv_heads, max_len, head_dim_vo]");
  check_ndim(op, "key", key, 4, "[batch, num_kv_heads, qo_len, head_dim]");
  check_new_tokens(op, k_cache, v_cache, key, value, positions, key.size(2));
  const Positions slots = read_positions(op, positions, key.size(0), key.size(2), k_cache.size(2));
  run(FI_KERNEL_OF(append_kv), key, append_params(k_cache, v_cache, key, value, slots));
}

struct Rope {
  const Tensor& cos;
  const Tensor& sin;
  bool interleaved;
  int64_t rotary_dim;
};

Tensor append_and_attend(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                         const Rope* rope, Tensor& k_cache, Tensor& v_cache, const Tensor& positions,
                         const MaybeTensor& mask, bool causal, int64_t window_left,
                         const std::optional<double>& scale, double logits_soft_cap,
                         const MaybeTensor& alibi_slopes, const MaybeTensor& sinks,
                         const MaybeTensor& query_positions) {
  check_no_grads(op, query, key, value, k_cache, v_cache, mask, alibi_slopes, sinks);
  if (rope) check_no_grads(op, rope->cos, rope->sin);
  check_query_key_value(op, query, k_cache, v_cache, "k_cache", "v_cache");
  const int64_t batch = query.size(0), qo_len = query.size(2), max_len = k_cache.size(2);
  check_new_tokens(op, k_cache, v_cache, key, value, positions, qo_len);
  if (query_positions)
    check_positions(op, "query_positions", *query_positions, k_cache, qo_len,
                    "the position of each query row");
  check_mask(op, mask, query, max_len, query.scalar_type());
  check_per_head(op, "alibi_slopes", alibi_slopes, query);
  check_per_head(op, "sinks", sinks, query);
  check_numbers(op, window_left, scale, logits_soft_cap);
  if (rope) check_cos_sin(op, rope->cos, rope->sin, query, qo_len, rope->rotary_dim, "qo_len");

  ScratchArena arena(query);
  const Positions slots = read_positions(op, positions, batch, qo_len, max_len);
  AppendParams append = append_params(k_cache, v_cache, key, value, slots);
  Tensor output = empty_attention_output(query, value.size(3), query.scalar_type());
  AttentionParams attention = attention_params(query, k_cache, v_cache, output, mask, causal, window_left,
                                               scale, logits_soft_cap, alibi_slopes, sinks, arena);
  attention.query_positions = query_positions ? positions_of(*query_positions) : slots;
  if (rope)
    append.rope = attention.rope =
        rope_table(rope->cos, rope->sin, query.size(3), rope->rotary_dim, rope->interleaved);
  run(FI_KERNEL_OF(append_attention), query, AppendAttentionParams{append, attention});
  return output;
}

Tensor append_attention_op(const Tensor& query, const Tensor& key, const Tensor& value, Tensor k_cache,
                           Tensor v_cache, const Tensor& positions, const MaybeTensor& mask, bool causal,
                           int64_t window_left, std::optional<double> scale, double logits_soft_cap,
                           const MaybeTensor& alibi_slopes, const MaybeTensor& sinks,
                           const MaybeTensor& query_positions) {
  return append_and_attend("append_attention", query, key, value, nullptr, k_cache, v_cache, positions, mask,
                           causal, window_left, scale, logits_soft_cap, alibi_slopes, sinks, query_positions);
}

Tensor rope_append_attention_op(const Tensor& query, const Tensor& key, const Tensor& value,
                                const Tensor& cos, const Tensor& sin, Tensor k_cache, Tensor v_cache,
                                const Tensor& positions, const MaybeTensor& mask, bool interleaved,
                                int64_t rotary_dim, bool causal, int64_t window_left,
                                std::optional<double> scale, double logits_soft_cap, const MaybeTensor& sinks,
                                const MaybeTensor& query_positions) {
  const Rope rope{cos, sin, interleaved, rotary_dim};
  return append_and_attend("rope_append_attention", query, key, value, &rope, k_cache, v_cache, positions,
                           mask, causal, window_left, scale, logits_soft_cap, std::nullopt, sinks,
                           query_positions);
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("append_kv", TORCH_BOX(&fi::binding::append_kv_op));
  m.impl("append_attention", TORCH_BOX(&fi::binding::append_attention_op));
  m.impl("rope_append_attention", TORCH_BOX(&fi::binding::rope_append_attention_op));
}
