// Bindings of attention over a batch, paged and ragged, and of its plan.
#include "binding/batch_attention.h"

#include "fi/fp8_batch_attention.h"

namespace fi::binding {
namespace {

struct Outputs {
  Tensor output;
  MaybeTensor lse;
};

Tensor empty_output(const Tensor& query, int64_t head_dim_vo, const BatchOptions& o) {
  return empty({query.size(0), query.size(1), head_dim_vo}, output_dtype(query, o.out_dtype), query);
}

Outputs launch(const Tensor& query, Tensor output, BatchAttentionParams& p, const BatchOptions& o,
               bool with_lse) {
  Outputs outputs{std::move(output), std::nullopt};
  if (with_lse) {
    outputs.lse = empty({query.size(0), query.size(1)}, ScalarType::Float, query);
    p.call.lse = static_cast<float*>(outputs.lse->mutable_data_ptr());
  }
  if (fp8_of(query) == Fp8::none) {
    run(FI_KERNEL_OF(batch_attention), query, p);
  } else {
    run(FI_KERNEL_OF(fp8_batch_attention), query, Fp8BatchAttentionParams{p, scale_of_heads(o.q_scale)});
  }
  return outputs;
}

void check_grads(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                 const BatchOptions& o) {
  check_no_grads(op, query, key, value, o.k_scale, o.v_scale, o.alibi_slopes, o.sinks, o.cos_sin_cache,
                 o.q_scale);
}

Outputs paged(const char* op, bool with_lse, const Tensor& query, const Tensor& k_cache,
              const Tensor& v_cache, const Tensor& qo_indptr, const Tensor& kv_indices,
              const Tensor& kv_indptr, const Tensor& kv_last_page_len, const BatchOptions& o) {
  check_grads(op, query, k_cache, v_cache, o);
  check_cache(op, query, k_cache, v_cache, /*takes_fp8_query=*/true);
  check_same_device(op, "qo_indptr", qo_indptr, "query", query);
  check_lengths(op, qo_indptr, kv_indptr, kv_last_page_len, k_cache.size(1));
  check_indices(op, "kv_indices", kv_indices, "query", query);
  check_ndim(op, "kv_indices", kv_indices, 1, "[nnz_pages]");
  check_options(op, o, query, k_cache.size(2), qo_indptr);

  ScratchArena arena(query);
  Tensor output = empty_output(query, v_cache.size(3), o);
  BatchAttentionParams p =
      batch_params(query, k_cache, v_cache, indices_of(qo_indptr), qo_indptr.size(0) - 1, output, o, arena);
  set_pages(p, k_cache, v_cache, kv_indices, kv_indptr, kv_last_page_len);
  check_paged_values(op, o, p, query, qo_indptr, kv_indices, kv_indptr, kv_last_page_len);
  return launch(query, output, p, o, with_lse);
}

Outputs ragged(const char* op, bool with_lse, const Tensor& query, const Tensor& key, const Tensor& value,
               const Tensor& qo_indptr, const Tensor& kv_indptr, const BatchOptions& o) {
  check_grads(op, query, key, value, o);
  KeysAndValues kv{"key", key, "value", value};
  kv.takes_fp8_query = true;
  check_keys(op, kv, query, 3, "[nnz_kv, num_kv_heads, head_dim]", "[nnz_kv, num_kv_heads, head_dim_vo]");
  check_same_device(op, "qo_indptr", qo_indptr, "query", query);
  check_lengths(op, qo_indptr, kv_indptr, std::nullopt, 1);
  check_options(op, o, query, key.size(1), qo_indptr);

  ScratchArena arena(query);
  Tensor output = empty_output(query, value.size(2), o);
  BatchAttentionParams p =
      batch_params(query, key, value, indices_of(qo_indptr), qo_indptr.size(0) - 1, output, o, arena);
  p.call.kv_len = key.size(0);
  p.table = ragged_table(kv_indptr, key.size(0));
  if (checks_values()) {
    const Tensor queries = *values_to_check(qo_indptr), indptr = *values_to_check(kv_indptr);
    check_indptr_values(op, "qo_indptr", queries);
    check_indptr_end(op, "qo_indptr", queries, "query", query.size(0));
    check_indptr_values(op, "kv_indptr", indptr);
    check_indptr_end(op, "kv_indptr", indptr, "key", key.size(0));
    BatchAttentionParams host = p;
    host.qo_indptr = indices_of(queries), host.table.kv_indptr = indices_of(indptr);
    check_option_values(op, o, host);
  }
  return launch(query, output, p, o, with_lse);
}

// The options of the four schemas, as TORCH_BOX wants them.
#define FI_OPTIONS                                                                                     \
  const MaybeTensor &custom_mask, const MaybeTensor &mask_indptr, const MaybeTensor &k_scale,          \
      const MaybeTensor &v_scale, const MaybeTensor &alibi_slopes, const MaybeTensor &sinks,           \
      const MaybeTensor &cos_sin_cache, const MaybeTensor &plan, bool causal, int64_t window_left,     \
      std::optional<double> scale, double logits_soft_cap, bool interleaved, int64_t fixed_split_size, \
      const MaybeTensor &q_scale, std::optional<ScalarType> out_dtype
#define FI_OPTIONS_GIVEN                                                                          \
  BatchOptions {                                                                                  \
    custom_mask, mask_indptr, k_scale, v_scale, alibi_slopes, sinks, cos_sin_cache, plan, causal, \
        window_left, scale, logits_soft_cap, interleaved, fixed_split_size, q_scale, out_dtype    \
  }

Tensor paged_attention_op(const Tensor& query, const Tensor& k_cache, const Tensor& v_cache,
                          const Tensor& qo_indptr, const Tensor& kv_indices, const Tensor& kv_indptr,
                          const Tensor& kv_last_page_len, FI_OPTIONS) {
  return paged("paged_attention", false, query, k_cache, v_cache, qo_indptr, kv_indices, kv_indptr,
               kv_last_page_len, FI_OPTIONS_GIVEN)
      .output;
}

std::tuple<Tensor, Tensor> paged_attention_with_lse_op(const Tensor& query, const Tensor& k_cache,
                                                       const Tensor& v_cache, const Tensor& qo_indptr,
                                                       const Tensor& kv_indices, const Tensor& kv_indptr,
                                                       const Tensor& kv_last_page_len, FI_OPTIONS) {
  Outputs r = paged("paged_attention_with_lse", true, query, k_cache, v_cache, qo_indptr, kv_indices,
                    kv_indptr, kv_last_page_len, FI_OPTIONS_GIVEN);
  return {r.output, *r.lse};
}

Tensor ragged_attention_op(const Tensor& query, const Tensor& key, const Tensor& value,
                           const Tensor& qo_indptr, const Tensor& kv_indptr, FI_OPTIONS) {
  return ragged("ragged_attention", false, query, key, value, qo_indptr, kv_indptr, FI_OPTIONS_GIVEN).output;
}

std::tuple<Tensor, Tensor> ragged_attention_with_lse_op(const Tensor& query, const Tensor& key,
                                                        const Tensor& value, const Tensor& qo_indptr,
                                                        const Tensor& kv_indptr, FI_OPTIONS) {
  Outputs r =
      ragged("ragged_attention_with_lse", true, query, key, value, qo_indptr, kv_indptr, FI_OPTIONS_GIVEN);
  return {r.output, *r.lse};
}

#undef FI_OPTIONS
#undef FI_OPTIONS_GIVEN

Tensor batch_attention_plan_op(const Tensor& qo_indptr, const Tensor& kv_indptr,
                               const MaybeTensor& kv_last_page_len, int64_t nnz_qo, int64_t group_size,
                               int64_t page_size, bool causal, int64_t window_left,
                               int64_t fixed_split_size) {
  constexpr const char* op = "batch_attention_plan";
  check_lengths(op, qo_indptr, kv_indptr, kv_last_page_len, page_size);
  FI_CHECK(op, nnz_qo >= 0, "nnz_qo must be 0 or more, got ", nnz_qo, "; pass the number of query tokens");
  FI_CHECK(op, group_size >= 1, "group_size must be 1 or more, got ", group_size,
           "; pass num_qo_heads / num_kv_heads");
  FI_CHECK(op, window_left >= -1, "window_left must be -1 (no window) or more, got ", window_left,
           "; pass -1 for none");
  check_fixed_split(op, fixed_split_size);
  if (checks_values()) {
    const Tensor queries = *values_to_check(qo_indptr), indptr = *values_to_check(kv_indptr);
    check_indptr_values(op, "qo_indptr", queries);
    const int64_t end = indices_of(queries).at(queries.size(0) - 1);
    FI_CHECK(op, end <= nnz_qo, "nnz_qo is ", nnz_qo, " but qo_indptr[-1] is ", end,
             "; pass the number of rows of query");
    check_indptr_values(op, "kv_indptr", indptr);
    if (kv_last_page_len)
      check_last_page_len_values(op, indptr, *values_to_check(*kv_last_page_len), page_size);
  }
  const int64_t batch = qo_indptr.size(0) - 1;
  Tensor plan = empty({PlanParts::size(batch, nnz_qo, group_size)}, ScalarType::Int, qo_indptr);
  BatchPlanParams p{};
  p.qo_indptr = indices_of(qo_indptr);
  p.table = ragged_table(kv_indptr, INT_MAX);  // kv_indices' length is not known here
  p.table.page_size = page_size;
  if (kv_last_page_len) p.kv_last_page_len = indices_of(*kv_last_page_len);
  p.batch = batch, p.nnz_qo = nnz_qo, p.group_size = group_size;
  p.causal = causal;
  p.window_left = window_left, p.fixed_split_size = fixed_split_size;
  p.plan = static_cast<int32_t*>(plan.mutable_data_ptr());
  run(FI_KERNEL_OF(batch_attention_plan), qo_indptr, p);
  return plan;
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("paged_attention", TORCH_BOX(&fi::binding::paged_attention_op));
  m.impl("paged_attention_with_lse", TORCH_BOX(&fi::binding::paged_attention_with_lse_op));
  m.impl("ragged_attention", TORCH_BOX(&fi::binding::ragged_attention_op));
  m.impl("ragged_attention_with_lse", TORCH_BOX(&fi::binding::ragged_attention_with_lse_op));
  m.impl("batch_attention_plan", TORCH_BOX(&fi::binding::batch_attention_plan_op));
}
