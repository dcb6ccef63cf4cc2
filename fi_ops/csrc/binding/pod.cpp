// Binding of POD-attention.
#include "fi/pod.h"

#include "binding/batch_attention.h"

namespace fi::binding {
namespace {

BatchOptions options_of(const MaybeTensor& none, bool causal, int64_t window_left,
                        const std::optional<double>& scale, double logits_soft_cap) {
  return {none,  none, none, none, none, none, none, none, causal, window_left, scale, logits_soft_cap,
          false, 0};
}

Tensor lse_of(const Tensor& query, BatchAttentionParams& p) {
  Tensor lse = empty({query.size(0), query.size(1)}, ScalarType::Float, query);
  p.call.lse = static_cast<float*>(lse.mutable_data_ptr());
  return lse;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pod_attention_op(
    const Tensor& query_p, const Tensor& key_p, const Tensor& value_p, const Tensor& query,
    const Tensor& k_cache, const Tensor& v_cache, const Tensor& kv_indices, const Tensor& kv_indptr,
    const Tensor& kv_last_page_len, bool causal_p, int64_t window_left_p, std::optional<double> scale_p,
    double logits_soft_cap_p, int64_t window_left, std::optional<double> scale, double logits_soft_cap) {
  constexpr const char* op = "pod_attention";
  check_no_grads(op, query_p, key_p, value_p, query, k_cache, v_cache);
  check_keys(op, {"key_p", key_p, "value_p", value_p, "query_p", "[qo_len, num_qo_heads, head_dim]"}, query_p,
             3, "[kv_len, num_kv_heads, head_dim]", "[kv_len, num_kv_heads, head_dim_vo]");
  check_same_device(op, "query", query, "query_p", query_p);
  check_same_dtype(op, "query", query, "query_p", query_p);
  check_cache(op, query, k_cache, v_cache);
  const int64_t batch = query.size(0);
  check_indices(op, "kv_indices", kv_indices, "query", query);
  check_ndim(op, "kv_indices", kv_indices, 1, "[nnz_pages]");
  check_indices(op, "kv_indptr", kv_indptr, "query", query);
  check_shape(op, "kv_indptr", kv_indptr, {batch + 1}, "[batch + 1]");
  check_indices(op, "kv_last_page_len", kv_last_page_len, "query", query);
  check_shape(op, "kv_last_page_len", kv_last_page_len, {batch}, "[batch]");
  check_numbers(op, window_left_p, scale_p, logits_soft_cap_p, "_p");
  check_numbers(op, window_left, scale, logits_soft_cap);
  if (checks_values()) {
    check_page_table_values(op, *values_to_check(kv_indices), *values_to_check(kv_indptr),
                            *values_to_check(kv_last_page_len), k_cache.size(0), k_cache.size(1));
  }

  const MaybeTensor none;
  ScratchArena arena(query);
  Tensor out_p = empty({query_p.size(0), query_p.size(1), value_p.size(2)}, query_p.scalar_type(), query_p);
  Tensor out = empty({batch, query.size(1), v_cache.size(3)}, query.scalar_type(), query);
  PodParams p{};
  p.prefill = batch_params(query_p, key_p, value_p, equal_counts(query_p.size(0)), 1, out_p,
                           options_of(none, causal_p, window_left_p, scale_p, logits_soft_cap_p), arena);
  p.prefill.call.kv_len = key_p.size(0);
  p.prefill.table = {{}, equal_counts(key_p.size(0)), key_p.size(0), 1, 0, 1};
  p.decode = batch_params(query, k_cache, v_cache, equal_counts(1), batch, out,
                          options_of(none, false, window_left, scale, logits_soft_cap), arena);
  set_pages(p.decode, k_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len);
  Tensor lse_p = lse_of(query_p, p.prefill), lse = lse_of(query, p.decode);
  run(FI_KERNEL_OF(pod_attention), query, p);
  return {out_p, lse_p, out, lse};
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("pod_attention", TORCH_BOX(&fi::binding::pod_attention_op));
}
