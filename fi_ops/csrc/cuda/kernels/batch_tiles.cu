// Attention over a batch on mma.sync: what it takes, dispatch by head dim.
#include "fi/cuda/sm80/batch.h"

#include <climits>

#include "fi/cuda/sm80/padded_dims.h"
#include "fi/cuda/sm80/prefill.h"
#include "fi/cuda/sm80/rotate_tile.h"

namespace fi::cuda {
namespace {

// A request's keys are counted in int, and where they lie in 32 bits of 8 elements.
constexpr int64_t kMostKeys = INT_MAX - 128, kMostElements = (int64_t{1} << 35) - 16;

bool fits(int64_t size, int64_t stride) { return size <= 1 || stride % 8 == 0; }

// Keys or values: whether pieces of 8 elements lie at boundaries of their size, within reach.
bool fits(const BatchAttentionParams& p, const void* data, int64_t stride_page, int64_t stride_n,
          int64_t stride_h) {
  const int64_t piece = p.kv_dtype == Fp8::none ? 16 : 8;
  const int64_t pages = p.is_paged() ? p.table.num_pages : 1;
  const int64_t entries = p.is_paged() ? p.table.page_size : p.table.nnz_pages;
  return reinterpret_cast<uintptr_t>(data) % piece == 0 && fits(pages, stride_page) &&
         fits(entries, stride_n) && fits(p.call.num_kv_heads, stride_h) &&
         pages * stride_page + entries * stride_n < kMostElements;
}

template <class T>
void run(const BatchTilesArgs& args, const Gpu& gpu) {
  const AttentionParams& c = args.p.call;
  with_padded_dims(padded_dims(c.head_dim_qk, c.head_dim_vo), [&]<int kDimQK, int kDimVO>() {
    args.p.kv_dtype == Fp8::none ? run_batch_tiles<T, kDimQK, kDimVO, false>(args, gpu)
                                 : run_batch_tiles<T, kDimQK, kDimVO, true>(args, gpu);
  });
}

}  // namespace

bool sm80_batch_supports(const BatchAttentionParams& p) {
  const AttentionParams& c = p.call;
  return (c.dtype == DType::bf16 || c.dtype == DType::f16) && can_pad(c.head_dim_qk) &&
         can_pad(c.head_dim_vo) && c.kv_len <= kMostKeys && p.table.page_size <= kMostKeys &&
         c.qo_len * c.num_qo_heads <= INT_MAX && reinterpret_cast<uintptr_t>(c.query) % 16 == 0 &&
         fits(c.qo_len, c.q_stride_n) && fits(c.num_qo_heads, c.q_stride_h) &&
         fits(p, c.key, p.k_stride_page, c.k_stride_n, c.k_stride_h) &&
         fits(p, c.value, p.v_stride_page, c.v_stride_n, c.v_stride_h);
}

bool sm80_batch_splits(const BatchAttentionParams& p) {
  // With a fixed split a request's result must not depend on how many tiles there are.
  return p.fixed_split_size == 0 && p.call.kv_len >= kLongKeys;
}

int64_t sm80_batch_counters(const BatchAttentionParams& p, const Gpu& gpu) {
  return 1 + (sm80_batch_splits(p) ? int64_t{2} * gpu.num_sms : 0);
}

BatchTilesArgs batch_tiles_args(const BatchAttentionParams& p, const batch::PlanView& plan,
                                int32_t* counters) {
  const AttentionParams& c = p.call;
  auto units = [](int64_t stride_page, int64_t stride_n) {
    return KeyUnits{static_cast<uint32_t>(stride_page / 8), static_cast<uint32_t>(stride_n / 8)};
  };
  BatchTilesArgs args{p, plan};
  args.group = static_cast<unsigned>(c.num_qo_heads / c.num_kv_heads);
  args.by_page_size = Divisor(static_cast<uint32_t>(p.table.page_size));
  args.k_units = units(p.k_stride_page, c.k_stride_n);
  args.v_units = units(p.v_stride_page, c.v_stride_n);
  args.rope_has_packs = c.rope.cos && rope_has_packs(c.rope);
  args.next_item = reinterpret_cast<unsigned*>(counters);
  if (sm80_batch_splits(p)) args.arrivals = counters + 1;
  return args;
}

void batch_tiles_sm80(const BatchAttentionParams& p, const batch::PlanView& plan, int32_t* counters,
                      const Gpu& gpu) {
  const BatchTilesArgs args = batch_tiles_args(p, plan, counters);
  p.call.dtype == DType::bf16 ? run<bf16>(args, gpu) : run<f16>(args, gpu);
}

}  // namespace fi::cuda
