// Checks of page tables: their metadata (fi_ops/library/pages.py has the same for fakes) and, on the host,
// their values.
#pragma once

#include <utility>

#include "binding/device.h"
#include "binding/indices.h"
#include "fi/pages.h"

namespace fi::binding {

inline void check_indices(const char* op, const char* name, const Tensor& t, const char* ref_name,
                          const Tensor& ref) {
  check_same_device(op, name, t, ref_name, ref);
  check_dtype(op, name, t, index_types);
}

// [batch + 1].
inline void check_indptr(const char* op, const char* name, const Tensor& t) {
  check_ndim(op, name, t, 1, "[batch + 1]");
  FI_CHECK(op, t.size(0) >= 1, name, " must be [batch + 1], got [0]; start it with 0");
}

inline void check_indptr_values(const char* op, const char* name, const Tensor& t) {
  const Indices values = indices_of(t);
  FI_CHECK(op, values.at(0) >= 0, name, " must not be negative, got ", values.at(0), "; start it with 0");
  for (int64_t b = 0; b + 1 < t.size(0); ++b)
    FI_CHECK(op, values.at(b) <= values.at(b + 1), name, " must not decrease, got ", values.at(b), " before ",
             values.at(b + 1), "; make it the running sum of the requests' counts");
}

// kv_indptr's pages and kv_last_page_len against each other.
inline void check_last_page_len_values(const char* op, const Tensor& kv_indptr,
                                       const Tensor& kv_last_page_len, int64_t page_size) {
  const Indices indptr = indices_of(kv_indptr), last = indices_of(kv_last_page_len);
  for (int64_t b = 0; b < kv_last_page_len.size(0); ++b) {
    const bool empty = indptr.at(b) == indptr.at(b + 1);
    const int64_t len = last.at(b);
    FI_CHECK(op, empty ? len == 0 : len >= 1 && len <= page_size, "kv_last_page_len must be 1 to page_size ",
             page_size, ", or 0 for a request without pages, got ", len, " for request ", b,
             "; pass the number of tokens in its last page");
  }
}

// Whether entries begin .. end are all in [0, num_pages), and one that isn't. Tables are long: first all at
// once, without a branch an entry.
inline std::pair<bool, int64_t> pages_within(const Indices& t, int64_t begin, int64_t end,
                                             int64_t num_pages) {
  auto all_within = [&](const auto* data) {
    bool ok = true;
    for (int64_t i = begin; i < end; ++i)
      ok &= static_cast<uint64_t>(int64_t{data[i * t.stride]}) < static_cast<uint64_t>(num_pages);
    return ok;
  };
  if (t.wide ? all_within(static_cast<const int64_t*>(t.data))
             : all_within(static_cast<const int32_t*>(t.data)))
    return {true, 0};
  while (t.at(begin) >= 0 && t.at(begin) < num_pages) ++begin;
  return {false, t.at(begin)};
}

// The whole table, on the host.
inline void check_page_table_values(const char* op, const Tensor& kv_indices, const Tensor& kv_indptr,
                                    const Tensor& kv_last_page_len, int64_t num_pages, int64_t page_size) {
  check_indptr_values(op, "kv_indptr", kv_indptr);
  const Indices indptr = indices_of(kv_indptr), pages = indices_of(kv_indices);
  const int64_t end = indptr.at(kv_last_page_len.size(0));
  FI_CHECK(op, end <= kv_indices.size(0), "kv_indices has ", kv_indices.size(0),
           " pages but kv_indptr[-1] is ", end, "; pass indptr built from the same page table");
  check_last_page_len_values(op, kv_indptr, kv_last_page_len, page_size);
  const auto [ok, page] = pages_within(pages, indptr.at(0), end, num_pages);
  FI_CHECK(op, ok, "kv_indices must be pages of the cache, at least 0 and less than ", num_pages, ", got ",
           page, "; pass the table of this cache");
}

}  // namespace fi::binding
