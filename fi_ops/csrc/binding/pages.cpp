// Bindings of the paged cache: append, page copies, and the index tensors of a batch.
#include "fi/pages.h"

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "binding/page_table.h"

namespace fi::binding {
namespace {

constexpr const char* cache_layout = "[num_pages, page_size, num_kv_heads, head_dim]";

void check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache) {
  check_dtype(op, "paged_k_cache", k_cache,
              std::array{ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Float8_e4m3fn,
                         ScalarType::Float8_e5m2});
  check_ndim(op, "paged_k_cache", k_cache, 4, cache_layout);
  check_last_dim_contiguous(op, "paged_k_cache", k_cache);
  check_writable(op, "paged_k_cache", k_cache);
  check_same_device(op, "paged_v_cache", v_cache, "paged_k_cache", k_cache);
  check_same_dtype(op, "paged_v_cache", v_cache, "paged_k_cache", k_cache);
  check_ndim(op, "paged_v_cache", v_cache, 4, cache_layout);
  check_last_dim_contiguous(op, "paged_v_cache", v_cache);
  check_writable(op, "paged_v_cache", v_cache);
  check_shape(op, "paged_v_cache", v_cache,
              {k_cache.size(0), k_cache.size(1), k_cache.size(2), v_cache.size(3)},
              "[num_pages, page_size, num_kv_heads, head_dim_vo]");
  FI_CHECK(op, k_cache.size(1) >= 1, "paged_k_cache must have pages of at least 1 token, got ",
           shape_of(k_cache), "; allocate it with a page_size");
}

void check_rows(const char* op, const char* name, const Tensor& t, const char* cache_name,
                const Tensor& cache, int64_t nnz) {
  check_same_device(op, name, t, cache_name, cache);
  if (fp8_of(cache) != Fp8::none) {
    check_dtype(op, name, t, floats);
  } else {
    check_same_dtype(op, name, t, cache_name, cache);
  }
  check_shape(op, name, t, {nnz, cache.size(2), cache.size(3)}, "[nnz, num_kv_heads, head_dim]");
  check_last_dim_contiguous(op, name, t);
}

PagedRows paged_rows(const Tensor& t, Tensor& cache) {
  return {t.const_data_ptr(), t.stride(0),     t.stride(1),     cache.mutable_data_ptr(),
          cache.stride(0),    cache.stride(1), cache.stride(2), cache.size(3)};
}

// What the two appends share: checks of metadata, and everything but query and rope.
AppendPagesParams check_append(const char* op, const Tensor& append_key, const Tensor& append_value,
                               const Tensor& batch_indices, const Tensor& positions, Tensor& k_cache,
                               Tensor& v_cache, const Tensor& kv_indices, const Tensor& kv_indptr,
                               const Tensor& kv_last_page_len) {
  check_no_grads(op, append_key, append_value, k_cache, v_cache);
  check_caches(op, k_cache, v_cache);
  check_ndim(op, "append_key", append_key, 3, "[nnz, num_kv_heads, head_dim]");
  const int64_t nnz = append_key.size(0);
  check_rows(op, "append_key", append_key, "paged_k_cache", k_cache, nnz);
  check_rows(op, "append_value", append_value, "paged_v_cache", v_cache, nnz);
  check_same_dtype(op, "append_value", append_value, "append_key", append_key);
  check_indices(op, "batch_indices", batch_indices, "paged_k_cache", k_cache);
  check_shape(op, "batch_indices", batch_indices, {nnz}, "[nnz]");
  check_indices(op, "positions", positions, "paged_k_cache", k_cache);
  check_shape(op, "positions", positions, {nnz}, "[nnz]");
  check_indices(op, "kv_indices", kv_indices, "paged_k_cache", k_cache);
  check_ndim(op, "kv_indices", kv_indices, 1, "[nnz_pages]");
  check_indices(op, "kv_indptr", kv_indptr, "paged_k_cache", k_cache);
  check_indptr(op, "kv_indptr", kv_indptr);
  check_indices(op, "kv_last_page_len", kv_last_page_len, "paged_k_cache", k_cache);
  check_shape(op, "kv_last_page_len", kv_last_page_len, {kv_indptr.size(0) - 1}, "[batch]");

  AppendPagesParams p{};
  p.nnz = nnz;
  p.num_kv_heads = k_cache.size(2);
  p.dtype = dtype_of(append_key);
  p.cache_dtype = fp8_of(k_cache);
  p.key = paged_rows(append_key, k_cache);
  p.value = paged_rows(append_value, v_cache);
  p.batch_indices = indices_of(batch_indices);
  p.positions = indices_of(positions);
  p.table = {indices_of(kv_indices), indices_of(kv_indptr), kv_indices.size(0),
             kv_indptr.size(0) - 1,  k_cache.size(0),       k_cache.size(1)};
  return p;
}

// Where values are checked: the table, that every token has a place of its own, and its position a row of
// cos_sin_cache (max_len of them; without RoPE any).
void check_append_values(const char* op, const Tensor& batch_indices, const Tensor& positions,
                         const Tensor& kv_indices, const Tensor& kv_indptr, const Tensor& kv_last_page_len,
                         PageTable table, int64_t max_len) {
  if (!checks_values()) return;
  const Tensor indices = *values_to_check(kv_indices), indptr = *values_to_check(kv_indptr);
  check_page_table_values(op, indices, indptr, *values_to_check(kv_last_page_len), table.num_pages,
                          table.page_size);
  const Tensor host_batch = *values_to_check(batch_indices), host_positions = *values_to_check(positions);
  const Indices requests = indices_of(host_batch), places = indices_of(host_positions);
  table.kv_indices = indices_of(indices);
  table.kv_indptr = indices_of(indptr);
  std::vector<std::pair<int64_t, int64_t>>
      runs;  // of tokens side by side: page * page_size + entry, and its end
  for (int64_t n = 0; n < positions.size(0); ++n) {
    const int64_t b = requests.at(n), position = places.at(n);
    FI_CHECK(op, b >= -1 && b < table.batch, "batch_indices must be -1 (padding) or a request, less than ",
             table.batch, ", got ", b, "; fix them or lengthen kv_indptr");
    if (b == -1 || position == -1) continue;
    const PageEntry at = page_entry(table, b, position);
    FI_CHECK(op, at.page >= 0, "positions must be -1 (padding) or within the request's pages, got ", position,
             " for request ", b, " with ", table.kv_indptr.at(b + 1) - table.kv_indptr.at(b), " pages of ",
             table.page_size, "; give it pages for what is appended first");
    FI_CHECK(op, position < max_len, "positions must be rows of cos_sin_cache, less than ", max_len, ", got ",
             position, "; make it longer");
    const int64_t place = at.page * table.page_size + at.entry;
    if (!runs.empty() && runs.back().second == place) {
      ++runs.back().second;
    } else {
      runs.emplace_back(place, place + 1);
    }
  }
  std::sort(runs.begin(), runs.end());
  const auto twice = std::adjacent_find(runs.begin(), runs.end(),
                                        [](const auto& a, const auto& b) { return b.first < a.second; });
  if (twice == runs.end()) return;
  const int64_t place = twice[1].first;
  fail(op, "batch_indices and positions must give each token a place of its own, got page ",
       place / table.page_size, ", entry ", place % table.page_size,
       " twice; copy a page that requests share before they append to it");
}

void append_paged_kv_cache_op(const Tensor& append_key, const Tensor& append_value,
                              const Tensor& batch_indices, const Tensor& positions, Tensor k_cache,
                              Tensor v_cache, const Tensor& kv_indices, const Tensor& kv_indptr,
                              const Tensor& kv_last_page_len) {
  const char* op = "append_paged_kv_cache";
  const AppendPagesParams p = check_append(op, append_key, append_value, batch_indices, positions, k_cache,
                                           v_cache, kv_indices, kv_indptr, kv_last_page_len);
  check_append_values(op, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len, p.table,
                      std::numeric_limits<int64_t>::max());
  run(FI_KERNEL_OF(append_paged_kv_cache), k_cache, p);
}

Tensor rope_append_paged_kv_cache_op(const Tensor& query, const Tensor& append_key,
                                     const Tensor& append_value, const Tensor& cos_sin_cache,
                                     const Tensor& batch_indices, const Tensor& positions, Tensor k_cache,
                                     Tensor v_cache, const Tensor& kv_indices, const Tensor& kv_indptr,
                                     const Tensor& kv_last_page_len, bool interleaved) {
  const char* op = "rope_append_paged_kv_cache";
  check_no_grads(op, query, cos_sin_cache);
  AppendPagesParams p = check_append(op, append_key, append_value, batch_indices, positions, k_cache, v_cache,
                                     kv_indices, kv_indptr, kv_last_page_len);
  check_same_device(op, "query", query, "append_key", append_key);
  check_same_dtype(op, "query", query, "append_key", append_key);
  check_ndim(op, "query", query, 3, "[nnz, num_qo_heads, head_dim]");
  check_shape(op, "query", query, {p.nnz, query.size(1), p.key.head_dim}, "[nnz, num_qo_heads, head_dim]");
  check_last_dim_contiguous(op, "query", query);
  check_same_device(op, "cos_sin_cache", cos_sin_cache, "append_key", append_key);
  check_dtype(op, "cos_sin_cache", cos_sin_cache, std::array{ScalarType::Float});
  check_ndim(op, "cos_sin_cache", cos_sin_cache, 2, "[max_len, rotary_dim]");
  check_last_dim_contiguous(op, "cos_sin_cache", cos_sin_cache);
  const int64_t rotary_dim = cos_sin_cache.size(1);
  FI_CHECK(op, rotary_dim > 0 && rotary_dim % 2 == 0 && rotary_dim <= p.key.head_dim,
           "cos_sin_cache must be [max_len, rotary_dim] with an even rotary_dim of at most head_dim ",
           p.key.head_dim, ", got ", shape_of(cos_sin_cache), "; cat cos and sin along the last dimension");
  check_append_values(op, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len, p.table,
                      cos_sin_cache.size(0));
  const auto* cos = static_cast<const float*>(cos_sin_cache.const_data_ptr());
  p.rope.cos = cos;
  p.rope.sin = cos + rotary_dim / 2;
  p.rope.cos_stride_row = p.rope.sin_stride_row = cos_sin_cache.stride(0);
  p.rope.width = rotary_dim / 2;
  p.rope.rotary_dim = rotary_dim;
  p.rope.interleaved = interleaved;
  p.rope_len = cos_sin_cache.size(0);
  Tensor rotated = empty({p.nnz, query.size(1), query.size(2)}, query.scalar_type(), query);
  p.query = {query.const_data_ptr(), query.stride(0),   query.stride(1), rotated.mutable_data_ptr(),
             rotated.stride(0),      rotated.stride(1), query.size(1)};
  run(FI_KERNEL_OF(append_paged_kv_cache), k_cache, p);
  return rotated;
}

// ---- index tensors ----

// `indptr` [batch + 1], and something of each request [batch]; the batch.
int64_t check_requests(const char* op, const char* indptr_name, const Tensor& indptr, const char* name,
                       const Tensor& of_requests) {
  check_dtype(op, indptr_name, indptr, index_types);
  check_indptr(op, indptr_name, indptr);
  check_indices(op, name, of_requests, indptr_name, indptr);
  const int64_t batch = indptr.size(0) - 1;
  check_shape(op, name, of_requests, {batch}, "[batch]");
  return batch;
}

std::tuple<Tensor, Tensor> get_batch_indices_positions_op(const Tensor& append_indptr, const Tensor& seq_lens,
                                                          int64_t nnz) {
  const char* op = "get_batch_indices_positions";
  const int64_t batch = check_requests(op, "append_indptr", append_indptr, "seq_lens", seq_lens);
  FI_CHECK(op, nnz >= 0, "nnz must be 0 or more, got ", nnz, "; pass the number of appended tokens");
  if (checks_values()) {
    const Tensor host_indptr = *values_to_check(append_indptr), host_lens = *values_to_check(seq_lens);
    check_indptr_values(op, "append_indptr", host_indptr);
    const Indices indptr = indices_of(host_indptr), lens = indices_of(host_lens);
    FI_CHECK(op, indptr.at(batch) <= nnz, "nnz must be at least append_indptr[-1] ", indptr.at(batch),
             ", got ", nnz, "; pass the number of appended tokens");
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t appended = indptr.at(b + 1) - indptr.at(b);
      FI_CHECK(op, lens.at(b) >= appended && lens.at(b) <= 2147483648,
               "seq_lens must count the appended tokens and be at most 2^31, got ", lens.at(b),
               " for request ", b, " that appends ", appended, "; pass the lengths after the append");
    }
  }
  Tensor batch_indices = empty({nnz}, ScalarType::Int, append_indptr);
  Tensor positions = empty({nnz}, ScalarType::Int, append_indptr);
  const BatchPositionsParams p{indices_of(append_indptr),
                               indices_of(seq_lens),
                               batch,
                               nnz,
                               static_cast<int32_t*>(batch_indices.mutable_data_ptr()),
                               static_cast<int32_t*>(positions.mutable_data_ptr())};
  run(FI_KERNEL_OF(get_batch_indices_positions), append_indptr, p);
  return {batch_indices, positions};
}

Tensor get_seq_lens_op(const Tensor& kv_indptr, const Tensor& kv_last_page_len, int64_t page_size) {
  const char* op = "get_seq_lens";
  const int64_t batch = check_requests(op, "kv_indptr", kv_indptr, "kv_last_page_len", kv_last_page_len);
  FI_CHECK(op, page_size >= 1, "page_size must be 1 or more, got ", page_size, "; pass the cache's");
  if (checks_values()) {
    const Tensor host_indptr = *values_to_check(kv_indptr);
    check_indptr_values(op, "kv_indptr", host_indptr);
    check_last_page_len_values(op, host_indptr, *values_to_check(kv_last_page_len), page_size);
  }
  const bool wide =
      kv_indptr.scalar_type() == ScalarType::Long || kv_last_page_len.scalar_type() == ScalarType::Long;
  Tensor seq_lens = empty({batch}, wide ? ScalarType::Long : ScalarType::Int, kv_indptr);
  const SeqLensParams p{indices_of(kv_indptr),
                        indices_of(kv_last_page_len),
                        batch,
                        page_size,
                        seq_lens.mutable_data_ptr(),
                        wide};
  run(FI_KERNEL_OF(get_seq_lens), kv_indptr, p);
  return seq_lens;
}

// ---- copies of pages ----

void check_pages(const char* op, const char* name, const Tensor& cache) {
  FI_CHECK(op, cache.dim() >= 1 && cache.dim() <= 8, name,
           " must be [num_pages, ...] of 1 to 8 dimensions, got ", shape_of(cache), "; reshape it");
  check_writable(op, name, cache);
}

// The cache as runs of neighbouring bytes, whatever the order of its dimensions in memory.
Pages pages_of(Tensor& cache) {
  const int64_t size = static_cast<int64_t>(cache.element_size());
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride in bytes, size) of a page, innermost first
  int64_t elements = 1;
  for (int64_t d = 1; d < cache.dim(); ++d) {
    elements *= cache.size(d);
    if (cache.size(d) != 1) dims.emplace_back(cache.stride(d) * size, cache.size(d));
  }
  std::sort(dims.begin(), dims.end());
  Pages pages{cache.mutable_data_ptr(), cache.stride(0) * size, {}, size};
  if (elements == 0) {
    pages.run_bytes = 0;
    return pages;
  }
  size_t d = 0;
  for (; d < dims.size() && dims[d].first == pages.run_bytes; ++d) pages.run_bytes *= dims[d].second;
  for (size_t outer = dims.size(); outer > d; --outer) {
    Rows& parts = pages.parts;
    parts.num_rows *= dims[outer - 1].second;
    parts.sizes[parts.ndim] = dims[outer - 1].second;
    parts.strides[parts.ndim++] = dims[outer - 1].first;
  }
  return pages;
}

void check_copy_values(const char* op, const Tensor& src_pages, const Tensor& dst_pages, int64_t num_pages) {
  if (!checks_values()) return;
  const Tensor host_src = *values_to_check(src_pages), host_dst = *values_to_check(dst_pages);
  const Indices src = indices_of(host_src), dst = indices_of(host_dst);
  std::vector<int64_t> read, written;
  for (int64_t i = 0; i < src_pages.size(0); ++i) {
    const int64_t from = src.at(i), to = dst.at(i);
    for (const auto& [name, page] : {std::pair{"src_pages", from}, std::pair{"dst_pages", to}})
      FI_CHECK(op, page >= -1 && page < num_pages, name,
               " must be -1 (padding) or pages of the cache, less than ", num_pages, ", got ", page,
               "; fix it or allocate a longer cache");
    if (from == -1 || to == -1) continue;
    read.push_back(from);
    written.push_back(to);
  }
  std::sort(read.begin(), read.end());
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  FI_CHECK(op, twice == written.end(), "dst_pages must differ, got page ", *twice, " twice; copy to it once");
  for (const int64_t page : written)
    FI_CHECK(op, !std::binary_search(read.begin(), read.end(), page),
             "src_pages and dst_pages must not overlap, got page ", page,
             " in both; copy in two calls, or to pages that are free");
}

void copy_pages_op(Tensor k_cache, Tensor v_cache, const Tensor& src_pages, const Tensor& dst_pages) {
  const char* op = "copy_pages";
  check_no_grads(op, k_cache, v_cache);
  check_pages(op, "paged_k_cache", k_cache);
  check_same_device(op, "paged_v_cache", v_cache, "paged_k_cache", k_cache);
  check_pages(op, "paged_v_cache", v_cache);
  FI_CHECK(op, v_cache.size(0) == k_cache.size(0), "paged_v_cache must have paged_k_cache's ",
           k_cache.size(0), " pages, got ", shape_of(v_cache), "; pass the two caches of one table");
  check_indices(op, "src_pages", src_pages, "paged_k_cache", k_cache);
  check_ndim(op, "src_pages", src_pages, 1, "[num_copies]");
  check_indices(op, "dst_pages", dst_pages, "paged_k_cache", k_cache);
  check_shape(op, "dst_pages", dst_pages, {src_pages.size(0)}, "[num_copies]");
  check_copy_values(op, src_pages, dst_pages, k_cache.size(0));
  const CopyPagesParams p{{pages_of(k_cache), pages_of(v_cache)},
                          indices_of(src_pages),
                          indices_of(dst_pages),
                          src_pages.size(0),
                          k_cache.size(0)};
  run(FI_KERNEL_OF(copy_pages), k_cache, p);
}

}  // namespace
}  // namespace fi::binding

STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m) {
  m.impl("append_paged_kv_cache", TORCH_BOX(&fi::binding::append_paged_kv_cache_op));
  m.impl("rope_append_paged_kv_cache", TORCH_BOX(&fi::binding::rope_append_paged_kv_cache_op));
  m.impl("get_batch_indices_positions", TORCH_BOX(&fi::binding::get_batch_indices_positions_op));
  m.impl("get_seq_lens", TORCH_BOX(&fi::binding::get_seq_lens_op));
  m.impl("copy_pages", TORCH_BOX(&fi::binding::copy_pages_op));
}
