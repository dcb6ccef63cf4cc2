// Checks of attention over a batch (fi_ops/library/_batch_checks.py has the same for fakes) and filling
// BatchAttentionParams.
#pragma once

#include <climits>

#include "binding/attention.h"
#include "binding/page_table.h"
#include "fi/batch_attention.h"

namespace fi::binding {

inline void check_fixed_split(const char* op, int64_t fixed_split_size) {
  FI_CHECK(op, fixed_split_size >= 0 && fixed_split_size % kUnitKeys == 0,
           "fixed_split_size must be 0 (none) or a multiple of ", kUnitKeys, ", got ", fixed_split_size,
           "; round it up to one");
}

// The index tensors that say how long requests are. No kv_last_page_len: kv_indptr counts tokens.
inline void check_lengths(const char* op, const Tensor& qo_indptr, const Tensor& kv_indptr,
                          const MaybeTensor& kv_last_page_len, int64_t page_size) {
  check_dtype(op, "qo_indptr", qo_indptr, index_types);
  FI_CHECK(op, qo_indptr.dim() == 1 && qo_indptr.size(0) >= 1, "qo_indptr must be [batch + 1], got ",
           shape_of(qo_indptr), "; start it with 0");
  check_indices(op, "kv_indptr", kv_indptr, "qo_indptr", qo_indptr);
  check_shape(op, "kv_indptr", kv_indptr, {qo_indptr.size(0)}, "[batch + 1]");
  if (kv_last_page_len) {
    check_indices(op, "kv_last_page_len", *kv_last_page_len, "qo_indptr", qo_indptr);
    check_shape(op, "kv_last_page_len", *kv_last_page_len, {qo_indptr.size(0) - 1}, "[batch]");
  }
  FI_CHECK(op, page_size >= 1, "page_size must be 1 or more, got ", page_size, "; pass the cache's");
}

// Keys and values [..., num_kv_heads, head_dim], by their names.
struct KeysAndValues {
  const char* key_name;
  const Tensor& key;
  const char* value_name;
  const Tensor& value;
  const char* query_name = "query";
  const char* query_layout = "[nnz_qo, num_qo_heads, head_dim]";
  bool takes_fp8_query = false;
};

inline void check_shape_but_last(const char* op, const char* name, const Tensor& t, const Tensor& like,
                                 int64_t last, const char* layout) {
  std::vector<int64_t> want(like.sizes().begin(), like.sizes().end());
  want.back() = last;
  check_shape_of(op, name, t, want, layout);
}

inline void check_keys(const char* op, const KeysAndValues& kv, const Tensor& query, int64_t ndim,
                       const char* layout, const char* value_layout) {
  kv.takes_fp8_query ? check_dtype(op, kv.query_name, query, floats_and_fp8)
                     : check_dtype(op, kv.query_name, query, floats);
  check_ndim(op, kv.query_name, query, 3, kv.query_layout);
  check_last_dim_contiguous(op, kv.query_name, query);
  const std::array dtypes{query.scalar_type(), ScalarType::Float8_e4m3fn, ScalarType::Float8_e5m2};
  auto check_one = [&](const char* name, const Tensor& t) {
    check_same_device(op, name, t, kv.query_name, query);
    if (fp8_of(query) != Fp8::none) {
      check_same_dtype(op, name, t, kv.query_name, query);
    } else {
      check_dtype(op, name, t, dtypes);
    }
    check_ndim(op, name, t, ndim, layout);
    check_last_dim_contiguous(op, name, t);
  };
  check_one(kv.key_name, kv.key);
  check_one(kv.value_name, kv.value);
  check_same_dtype(op, kv.value_name, kv.value, kv.key_name, kv.key);
  check_shape_but_last(op, kv.key_name, kv.key, kv.key, query.size(2), layout);
  check_shape_but_last(op, kv.value_name, kv.value, kv.key, kv.value.size(ndim - 1), value_layout);
  const int64_t heads = query.size(1), kv_heads = kv.key.size(ndim - 2);
  FI_CHECK(op, kv_heads ? heads % kv_heads == 0 : heads == 0, kv.query_name, " must have a multiple of ",
           kv.key_name, "'s ", kv_heads, " heads, got ", heads, "; repeat or drop heads so that they divide");
}

inline void check_cache(const char* op, const Tensor& query, const Tensor& k_cache, const Tensor& v_cache,
                        bool takes_fp8_query = false) {
  KeysAndValues kv{"paged_k_cache", k_cache, "paged_v_cache", v_cache};
  kv.takes_fp8_query = takes_fp8_query;
  check_keys(op, kv, query, 4, "[num_pages, page_size, num_kv_heads, head_dim]",
             "[num_pages, page_size, num_kv_heads, head_dim_vo]");
  FI_CHECK(op, k_cache.size(1) >= 1, "paged_k_cache must have pages of at least 1 token, got ",
           shape_of(k_cache), "; allocate it with a page_size");
}

// What follows the index tensors in the schemas.
struct BatchOptions {
  const MaybeTensor &custom_mask, &mask_indptr, &k_scale, &v_scale, &alibi_slopes, &sinks, &cos_sin_cache,
      &plan;
  bool causal;
  int64_t window_left;
  std::optional<double> scale;
  double logits_soft_cap;
  bool interleaved;
  int64_t fixed_split_size;
  MaybeTensor q_scale = std::nullopt;
  std::optional<ScalarType> out_dtype = std::nullopt;
};

inline void check_plan(const char* op, const MaybeTensor& plan, const Tensor& query, int64_t group_size,
                       const Tensor& qo_indptr) {
  if (!plan) return;
  check_same_device(op, "plan", *plan, "query", query);
  check_dtype(op, "plan", *plan, std::array{ScalarType::Int});
  check_shape(op, "plan", *plan, {PlanParts::size(qo_indptr.size(0) - 1, query.size(0), group_size)},
              "what batch_attention_plan returns for these sizes");
  check_last_dim_contiguous(op, "plan", *plan);
}

inline void check_options(const char* op, const BatchOptions& o, const Tensor& query, int64_t kv_heads,
                          const Tensor& qo_indptr) {
  check_query_options(op, query, o.q_scale, o.out_dtype);
  FI_CHECK(op, o.custom_mask.has_value() == o.mask_indptr.has_value(),
           "custom_mask and mask_indptr must be given together, got one of them; pass both or none");
  if (o.custom_mask) {
    check_same_device(op, "custom_mask", *o.custom_mask, "query", query);
    check_dtype(op, "custom_mask", *o.custom_mask, std::array{ScalarType::Byte});
    check_ndim(op, "custom_mask", *o.custom_mask, 1, "[bytes]");
    check_last_dim_contiguous(op, "custom_mask", *o.custom_mask);
    check_indices(op, "mask_indptr", *o.mask_indptr, "query", query);
    check_shape(op, "mask_indptr", *o.mask_indptr, {qo_indptr.size(0)}, "[batch + 1]");
  }
  check_scale(op, "k_scale", o.k_scale, query, kv_heads);
  check_scale(op, "v_scale", o.v_scale, query, kv_heads);
  check_per_head(op, "alibi_slopes", o.alibi_slopes, query);
  check_per_head(op, "sinks", o.sinks, query);
  if (o.cos_sin_cache) {
    const Tensor& table = *o.cos_sin_cache;
    check_same_device(op, "cos_sin_cache", table, "query", query);
    check_dtype(op, "cos_sin_cache", table, std::array{ScalarType::Float});
    check_ndim(op, "cos_sin_cache", table, 2, "[max_len, rotary_dim]");
    check_last_dim_contiguous(op, "cos_sin_cache", table);
    const int64_t width = table.size(1), head_dim = query.size(2);
    FI_CHECK(op, width >= 2 && width <= head_dim && width % 2 == 0,
             "cos_sin_cache must be [max_len, rotary_dim] with an even rotary_dim, at least 2 and at most "
             "head_dim ",
             head_dim, ", got ", shape_of(table), "; check its width");
  }
  check_plan(op, o.plan, query, kv_heads ? query.size(1) / kv_heads : 1, qo_indptr);
  check_numbers(op, o.window_left, o.scale, o.logits_soft_cap);
  check_fixed_split(op, o.fixed_split_size);
}

// Everything but where keys and values lie. kv_heads: a dimension of both.
inline BatchAttentionParams batch_params(const Tensor& query, const Tensor& key, const Tensor& value,
                                         const Indices& qo_indptr, int64_t batch, const Tensor& out,
                                         const BatchOptions& o, ScratchArena& arena) {
  const int64_t heads_dim = key.dim() - 2;
  BatchAttentionParams p{};
  AttentionParams& c = p.call;
  c.dtype = dtype_of(out);
  c.batch = batch;
  c.num_qo_heads = query.size(1);
  c.num_kv_heads = key.size(heads_dim);
  c.qo_len = query.size(0);
  c.head_dim_qk = query.size(2);
  c.head_dim_vo = value.size(heads_dim + 1);
  c.query = query.const_data_ptr();
  c.q_stride_n = query.stride(0), c.q_stride_h = query.stride(1);
  c.key = key.const_data_ptr();
  c.k_stride_n = key.stride(heads_dim - 1), c.k_stride_h = key.stride(heads_dim);
  c.value = value.const_data_ptr();
  c.v_stride_n = value.stride(heads_dim - 1), c.v_stride_h = value.stride(heads_dim);
  c.out = const_cast<void*>(out.const_data_ptr());
  c.o_stride_n = out.stride(0), c.o_stride_h = out.stride(1);
  c.causal = o.causal;
  c.window_left = o.window_left;
  c.scale = scale_or_default(o.scale, c.head_dim_qk);
  c.logits_soft_cap = static_cast<float>(o.logits_soft_cap);
  c.alibi_slopes = per_head(o.alibi_slopes);
  c.sinks = per_head(o.sinks);
  if (o.cos_sin_cache) {
    const Tensor& table = *o.cos_sin_cache;
    c.rope.cos = table.const_data_ptr();
    c.rope.sin = static_cast<const float*>(table.const_data_ptr()) + table.size(1) / 2;
    c.rope.cos_stride_row = c.rope.sin_stride_row = table.stride(0);
    c.rope.width = table.size(1) / 2;
    c.rope.rotary_dim = table.size(1);
    c.rope.interleaved = o.interleaved;
    c.rope_keys = true;
    p.rope_len = table.size(0);
  }
  c.scratch = arena.handle();
  p.qo_indptr = qo_indptr;
  p.kv_dtype = fp8_of(key);
  p.k_scale = scale_of_heads(o.k_scale);
  p.v_scale = scale_of_heads(o.v_scale);
  if (o.custom_mask) {
    p.custom_mask = static_cast<const uint8_t*>(o.custom_mask->const_data_ptr());
    p.mask_indptr = indices_of(*o.mask_indptr);
    p.mask_bytes = o.custom_mask->size(0);
  }
  p.fixed_split_size = o.fixed_split_size;
  p.plan = o.plan ? static_cast<const int32_t*>(o.plan->const_data_ptr()) : nullptr;
  return p;
}

inline PageTable ragged_table(const Tensor& kv_indptr, int64_t nnz_kv) {
  return {{}, indices_of(kv_indptr), nnz_kv, kv_indptr.size(0) - 1, 0, 1};
}

// ---- values, where they are checked ----

inline void check_indptr_end(const char* op, const char* name, const Tensor& indptr, const char* of,
                             int64_t count) {
  const int64_t end = indices_of(indptr).at(indptr.size(0) - 1);
  FI_CHECK(op, end <= count, of, " has ", count, " tokens but ", name, "[-1] is ", end,
           "; pass indptr built from the same batch");
}

// Against the lengths of the requests, which are checked already: p's index tensors are on the host.
inline void check_option_values(const char* op, const BatchOptions& o, BatchAttentionParams p) {
  if (o.mask_indptr) {
    const Tensor indptr = *values_to_check(*o.mask_indptr);
    check_indptr_values(op, "mask_indptr", indptr);
    p.mask_indptr = indices_of(indptr);
    p.mask_bytes = INT64_MAX;  // not clamped to what is there
    for (int64_t b = 0; b < p.call.batch; ++b) {
      const Request r = request_of(p, b);
      const int64_t end = r.mask_begin + (r.qo_len * r.kv_len + 7) / 8;
      FI_CHECK(op, end <= o.custom_mask->size(0), "custom_mask has ", o.custom_mask->size(0),
               " bytes but request ", b, "'s bits end at byte ", end,
               "; pass the mask and indptr of segment_packbits");
    }
  }
  if (o.cos_sin_cache) {
    p.custom_mask = nullptr;
    for (int64_t b = 0; b < p.call.batch; ++b) {
      const Request r = request_of(p, b);
      FI_CHECK(op, r.kv_len <= p.rope_len, "cos_sin_cache has ", p.rope_len, " rows but request ", b, " has ",
               r.kv_len, " keys; pass a longer table");
      // (Queries of a request without keys meet nothing: they are not rotated.)
      FI_CHECK(op, r.kv_len == 0 || r.qo_len <= r.kv_len,
               "cos_sin_cache has no row for a query before the first key, got ", r.qo_len, " queries and ",
               r.kv_len, " keys of request ", b, "; append their keys first");
    }
  }
  if (o.plan) {
    const Tensor plan = *values_to_check(*o.plan);
    const auto& h = *static_cast<const PlanHeader*>(plan.const_data_ptr());
    const int64_t group_size = p.call.num_kv_heads ? p.call.num_qo_heads / p.call.num_kv_heads : 1;
    const int64_t unit_keys = unit_keys_of(p.fixed_split_size);
    FI_CHECK(op,
             h.batch == p.call.batch && h.nnz_qo == p.call.qo_len && h.group_size == group_size &&
                 h.page_size == p.table.page_size && h.causal == int(p.call.causal) &&
                 h.window_left == p.call.window_left && h.unit_keys == unit_keys,
             "plan must be made for these arguments, got one for another batch, group, page_size, causal, "
             "window_left or fixed_split_size; call batch_attention_plan with the same");
  }
}

inline void set_pages(BatchAttentionParams& p, const Tensor& k_cache, const Tensor& v_cache,
                      const Tensor& kv_indices, const Tensor& kv_indptr, const Tensor& kv_last_page_len) {
  p.call.kv_len = kv_indices.size(0) * k_cache.size(1);
  p.table = {indices_of(kv_indices), indices_of(kv_indptr), kv_indices.size(0),
             kv_indptr.size(0) - 1,  k_cache.size(0),       k_cache.size(1)};
  p.kv_last_page_len = indices_of(kv_last_page_len);
  p.k_stride_page = k_cache.stride(0), p.v_stride_page = v_cache.stride(0);
}

inline void check_paged_values(const char* op, const BatchOptions& o, const BatchAttentionParams& p,
                               const Tensor& query, const Tensor& qo_indptr, const Tensor& kv_indices,
                               const Tensor& kv_indptr, const Tensor& kv_last_page_len,
                               const char* query_name = "query") {
  if (!checks_values()) return;
  const Tensor queries = *values_to_check(qo_indptr), pages = *values_to_check(kv_indices);
  const Tensor indptr = *values_to_check(kv_indptr), last = *values_to_check(kv_last_page_len);
  check_indptr_values(op, "qo_indptr", queries);
  check_indptr_end(op, "qo_indptr", queries, query_name, query.size(0));
  check_page_table_values(op, pages, indptr, last, p.table.num_pages, p.table.page_size);
  BatchAttentionParams host = p;
  host.qo_indptr = indices_of(queries);
  host.table.kv_indices = indices_of(pages), host.table.kv_indptr = indices_of(indptr);
  host.kv_last_page_len = indices_of(last);
  check_option_values(op, o, host);
}

}  // namespace fi::binding
