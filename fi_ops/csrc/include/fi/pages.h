// Paged KV caches: where a token lies, appending tokens, copying pages, and the index tensors of a batch.
//
// Strides are in elements and free; the last dimension of what is appended and of caches is contiguous.
#pragma once

#include "fi/attention.h"
#include "fi/fp8.h"
#include "fi/indices.h"
#include "fi/kernel.h"
#include "fi/rows.h"
#include "fi/scalar.h"

namespace fi {

// The pages of each request: request b has kv_indices[kv_indptr[b]] .. kv_indices[kv_indptr[b + 1] - 1].
struct PageTable {
  Indices kv_indices;  // [nnz_pages]
  Indices kv_indptr;   // [batch + 1]
  int64_t nnz_pages, batch;
  int64_t num_pages, page_size;  // of the cache
};

struct PageEntry {
  int64_t page = -1;  // -1: nowhere
  int64_t entry = 0;
};

// Where token `position` of request b lies. Reads nothing outside the table, whatever is in it: an impossible
// request, position or page is nowhere, and so is padding (-1).
FI_INLINE PageEntry page_entry(const PageTable& t, int64_t b, int64_t position) {
  if (b < 0 || b >= t.batch || position < 0) return {};
  const int64_t begin = t.kv_indptr.at(b), end = t.kv_indptr.at(b + 1);
  if (begin < 0 || end < begin || end > t.nnz_pages) return {};
  const int64_t nth = position / t.page_size;
  if (nth >= end - begin) return {};
  const int64_t page = t.kv_indices.at(begin + nth);
  if (page < 0 || page >= t.num_pages) return {};
  return {page, position - nth * t.page_size};
}

// New keys or values and the cache that they go to.
struct PagedRows {
  const void* input;  // [nnz, num_kv_heads, head_dim]
  int64_t input_stride_n, input_stride_h;
  void* cache;  // [num_pages, page_size, num_kv_heads, head_dim]
  int64_t cache_stride_page, cache_stride_n, cache_stride_h;
  int64_t head_dim;

  FI_HD int64_t input_offset(int64_t n, int64_t h) const { return n * input_stride_n + h * input_stride_h; }
  FI_HD int64_t cache_offset(const PageEntry& at, int64_t h) const {
    return at.page * cache_stride_page + at.entry * cache_stride_n + h * cache_stride_h;
  }
};

// Queries that are rotated on the way. None: num_heads 0.
struct QueryRows {
  const void* input;  // [nnz, num_heads, head_dim_qk]
  int64_t input_stride_n, input_stride_h;
  void* output;  // as input
  int64_t output_stride_n, output_stride_h;
  int64_t num_heads;
};

struct AppendPagesParams {
  int64_t nnz, num_kv_heads;
  DType dtype;      // of query, key and value
  Fp8 cache_dtype;  // none: `dtype`
  PagedRows key, value;
  Indices batch_indices, positions;  // [nnz]; -1 is padding
  PageTable table;
  QueryRows query;   // of padding: copied
  RopeTable rope;    // for query and key; a token takes the row of its position. No cos: no rotation
  int64_t rope_len;  // rows of it
};

// Token i belongs to the request b with append_indptr[b] <= i < append_indptr[b + 1], whose appended tokens
// are the last of its seq_lens[b]. Tokens of no request get -1 twice.
struct BatchPositionsParams {
  Indices append_indptr;  // [batch + 1]
  Indices seq_lens;       // [batch]
  int64_t batch, nnz;
  int32_t* batch_indices;  // [nnz]
  int32_t* positions;      // [nnz]
};

// The position of token i in request b, or -1 where there is none.
FI_INLINE int32_t appended_position(const BatchPositionsParams& p, int64_t b, int64_t i) {
  const int64_t begin = p.append_indptr.at(b), end = p.append_indptr.at(b + 1);
  if (i < begin || i >= end) return -1;
  const int64_t position = p.seq_lens.at(b) - (end - i);
  return position < 0 || position > 0x7fffffff ? -1 : static_cast<int32_t>(position);
}

// The last request that starts at token i or before; the first, if none does. In range whatever is in
// append_indptr.
FI_INLINE int64_t last_request_from(const BatchPositionsParams& p, int64_t i) {
  int64_t low = 0, high = p.batch;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (p.append_indptr.at(middle) <= i) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct SeqLensParams {
  Indices kv_indptr;         // [batch + 1]
  Indices kv_last_page_len;  // [batch]
  int64_t batch, page_size;
  void* seq_lens;  // [batch], int64 where `wide`, else int32
  bool wide;
};

FI_INLINE void put_seq_len(const SeqLensParams& p, int64_t b) {
  const int64_t pages = p.kv_indptr.at(b + 1) - p.kv_indptr.at(b);
  const int64_t len = (pages > 1 ? pages - 1 : 0) * p.page_size + p.kv_last_page_len.at(b);
  if (p.wide) {
    static_cast<int64_t*>(p.seq_lens)[b] = len;
  } else {
    static_cast<int32_t*>(p.seq_lens)[b] = static_cast<int32_t>(len);
  }
}

// A cache as pages: each is parts.num_rows runs of run_bytes neighbouring bytes. Strides in bytes.
struct Pages {
  void* data;
  int64_t page_stride;
  Rows parts;
  int64_t run_bytes;
};

// Page src_pages[i] over page dst_pages[i], in both caches. Pairs with a page outside (padding: -1) are left
// out.
struct CopyPagesParams {
  Pages caches[2];
  Indices src_pages, dst_pages;  // [num_copies]
  int64_t num_copies, num_pages;
};

}  // namespace fi

FI_KERNEL(append_paged_kv_cache, fi::AppendPagesParams)
FI_KERNEL(get_batch_indices_positions, fi::BatchPositionsParams)
FI_KERNEL(get_seq_lens, fi::SeqLensParams)
FI_KERNEL(copy_pages, fi::CopyPagesParams)
