// Attention over a batch of 8-bit tensors on Hopper: the predicate, and the choice of a kernel.
#include "fi/cuda/sm90/fp8_batch.h"

#include "fi/cuda/sm90/batch_rows.h"
#include "fi/cuda/sm90/fp8_attention.h"

namespace fi::cuda {

bool sm90_fp8_batch_supports(const Fp8BatchAttentionParams& p) {
  // Rows, keys and tiles are counted in 32 bits.
  constexpr int64_t kMaxLength = int64_t{1} << 29;
  constexpr int64_t kPageStep = 16;  // keys that one copy brings at the least
  const BatchAttentionParams& b = p.batch;
  const AttentionParams& c = b.call;
  const bool plain = !b.custom_mask && !c.alibi_slopes && c.rope.cos == nullptr && c.logits_soft_cap == 0.0f;
  const bool sizes = c.head_dim_qk == c.head_dim_vo && (c.head_dim_qk == 64 || c.head_dim_qk == 128) &&
                     c.batch > 0 && c.num_kv_heads > 0 && c.num_qo_heads > 0 && c.qo_len > 0 &&
                     c.kv_len > 0 && c.kv_len <= kMaxLength &&
                     c.batch + c.qo_len <= kMaxLength / c.num_qo_heads && b.table.num_pages < kMaxLength &&
                     (!b.is_paged() || (b.table.num_pages > 0 && b.table.page_size % kPageStep == 0));
  return plain && sizes && sm90::pairs_map_takes(sm90::query_rows(b)) &&
         sm90::pairs_map_takes(sm90::key_rows(b)) && sm90::pairs_map_takes(sm90::value_rows(b));
}

namespace {

template <Fp8 kFormat>
void dispatch(const Fp8BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  p.batch.call.head_dim_qk == 64 ? sm90::fp8_batch_tiles<kFormat, 64>(p, plan, gpu)
                                 : sm90::fp8_batch_tiles<kFormat, 128>(p, plan, gpu);
}

}  // namespace

void fp8_batch_tiles_sm90(const Fp8BatchAttentionParams& p, const batch::PlanView& plan, const Gpu& gpu) {
  p.batch.kv_dtype == Fp8::e4m3 ? dispatch<Fp8::e4m3>(p, plan, gpu) : dispatch<Fp8::e5m2>(p, plan, gpu);
}

}  // namespace fi::cuda
