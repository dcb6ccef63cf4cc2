// Latent attention over a paged compressed cache on Hopper: what it takes.
#include "fi/cuda/sm90/mla.h"

#include <climits>

#include "fi/cuda/sm90/mla_schedule.h"

namespace fi::cuda {
namespace {

using namespace sm90;

// Rows of queries: pieces of 16 bytes.
bool rows_fit(const AttentionParams& c, const void* data, int64_t stride_n, int64_t stride_h) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (c.qo_len <= 1 || stride_n % 8 == 0) &&
         (c.num_qo_heads <= 1 || stride_h % 8 == 0);
}

// The cache: likewise, and reached with 32 bits of 16 bytes.
bool cache_fits(const MlaParams& p, const void* data, int64_t width, int64_t stride_page, int64_t stride_n) {
  const PageTable& table = p.batch.table;
  const int64_t pack = p.batch.kv_dtype == Fp8::none ? 8 : 16;
  const auto fits = [&](int64_t extent, int64_t stride) {
    return extent <= 1 || (stride > 0 && stride % pack == 0 && stride < (int64_t{1} << 38));
  };
  const HeadRows rows{data, table.num_pages, 1, table.page_size, width, stride_page, 0, stride_n};
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && fits(table.num_pages, stride_page) &&
         fits(table.page_size, stride_n) && cache_rows_fit(rows);
}

}  // namespace

bool sm90_mla_supports(const MlaParams& p) {
  constexpr int64_t kMost = INT_MAX - 512;  // keys are looked up some tiles ahead
  const BatchAttentionParams& b = p.batch;
  const AttentionParams& c = b.call;
  return (c.dtype == DType::bf16 || c.dtype == DType::f16) && c.head_dim_qk == kCkvDim &&
         p.head_dim_kpe == kKpeDim && c.batch <= kMlaMostRequests && c.qo_len * c.num_qo_heads <= kMost &&
         c.kv_len <= kMost && b.table.nnz_pages <= kMost && b.table.num_pages > 0 &&
         b.table.num_pages <= kMost && b.table.page_size <= kMost &&
         rows_fit(c, c.query, c.q_stride_n, c.q_stride_h) &&
         rows_fit(c, p.q_pe, p.q_pe_stride_n, p.q_pe_stride_h) &&
         rows_fit(c, c.out, c.o_stride_n, c.o_stride_h) &&
         cache_fits(p, c.key, kCkvDim, b.k_stride_page, c.k_stride_n) &&
         cache_fits(p, p.kpe, kKpeDim, p.kpe_stride_page, p.kpe_stride_n);
}

void sm90_mla(const MlaParams& p, const Gpu& gpu) {
  const AttentionParams& c = p.batch.call;
  if (c.qo_len == 0 || c.num_qo_heads == 0) return;
  c.dtype == DType::bf16 ? mla<bf16>(p, gpu) : mla<f16>(p, gpu);
}

}  // namespace fi::cuda
