// Attention over a batch, many query rows a request, on Hopper: the predicate, and the choice of a kernel.
#include "fi/cuda/sm90/batch.h"

#include "fi/cuda/sm90/batch_masks.h"
#include "fi/cuda/sm90/batch_rows.h"
#include "fi/cuda/sm90/head_dims.h"

namespace fi::cuda {

bool sm90_batch_supports(const BatchAttentionParams& p) {
  // Rows, keys and tiles are counted in 32 bits.
  constexpr int64_t kMaxLength = int64_t{1} << 29;
  const AttentionParams& c = p.call;
  const bool plain = !c.alibi_slopes && c.rope.cos == nullptr && c.scale > 0.0f && p.kv_dtype == Fp8::none &&
                     (!p.k_scale || (c.head_dim_qk <= 128 && c.head_dim_vo <= 128));
  const bool sizes = can_pad(c.head_dim_qk) && can_pad(c.head_dim_vo) && c.batch > 0 && c.num_kv_heads > 0 &&
                     c.num_qo_heads > 0 && c.qo_len > 0 && c.kv_len > 0 && c.kv_len <= kMaxLength &&
                     c.batch + c.qo_len <= kMaxLength / c.num_qo_heads && p.table.num_pages < kMaxLength &&
                     (!p.is_paged() || p.table.num_pages > 0);
  constexpr int64_t kMaxMaskBytes = (int64_t{1} << 32) - 8, kMaxScratchBytes = int64_t{1} << 30;
  const bool masks = !p.custom_mask || !sizes ||
                     (p.mask_bytes <= kMaxMaskBytes && sm90::batch_mask_scratch_bytes(p) <= kMaxScratchBytes);
  return (c.dtype == DType::bf16 || c.dtype == DType::f16) && plain && sizes && masks &&
         sm90::tensor_map_takes(sm90::query_rows(p)) && sm90::tensor_map_takes(sm90::key_rows(p)) &&
         sm90::tensor_map_takes(sm90::value_rows(p)) && sm90::tensor_map_takes(sm90::out_rows(p)) &&
         sm90::cache_rows_fit(sm90::key_rows(p)) && sm90::cache_rows_fit(sm90::value_rows(p));
}

namespace {

template <class T>
void dispatch(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  sm90::with_head_dims(p.call.head_dim_qk, p.call.head_dim_vo, [&]<int kDimQK, int kDimVO>() {
    p.custom_mask ? sm90::masked_batch_tiles<T, kDimQK, kDimVO>(p, plan, gpu)
                  : sm90::batch_tiles<T, kDimQK, kDimVO>(p, plan, gpu);
  });
}

}  // namespace

void batch_tiles_sm90(const BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  p.call.dtype == DType::bf16 ? dispatch<bf16>(p, plan, gpu) : dispatch<f16>(p, plan, gpu);
}

}  // namespace fi::cuda
