// Attention of many query rows on Hopper: the predicate, and the choice of a kernel.
#include "fi/cuda/sm90/attention.h"

#include "fi/cuda/sm90/head_dims.h"
#include "fi/cuda/sm90/mask_bits.h"

namespace fi::cuda {

namespace {

// Pairs of values that can be read at once. No tile is skipped for its values, so not for a cache with more
// slots than rows, most of which such a mask excludes as a rule.
bool takes_additive_mask(const AttentionParams& p) {
  const auto even = [](int64_t size, int64_t stride) { return size <= 1 || stride % 2 == 0; };
  return p.kv_len <= p.qo_len && p.kv_len % 2 == 0 && p.mask_stride_k == 1 &&
         even(p.batch, p.mask_stride_b) && even(p.num_qo_heads, p.mask_stride_h) &&
         even(p.qo_len, p.mask_stride_q) &&
         reinterpret_cast<uintptr_t>(p.mask) % (2 * size_of(p.mask_dtype)) == 0 &&
         p.logits_soft_cap == 0.0f && !p.query_positions;
}

}  // namespace

bool sm90_prefill_supports(const AttentionParams& p) {
  constexpr int64_t kMinRows = 64;  // fewer leave most of a tile empty
  // Rows, keys and tiles are counted in 32 bits.
  constexpr int64_t kMaxLength = int64_t{1} << 29;
  constexpr int64_t kMaxMaskBytes = int64_t{2} << 30;  // of scratch: a mask that is broadcast can need more
  const bool plain = !p.alibi_slopes && p.rope.cos == nullptr && p.scale > 0.0f;
  const bool mask =
      p.mask == nullptr || (p.mask_dtype == DType::boolean ? sm90::mask_scratch_bytes(p) <= kMaxMaskBytes
                                                           : takes_additive_mask(p));
  const bool sizes = can_pad(p.head_dim_qk) && can_pad(p.head_dim_vo) && p.batch > 0 && p.num_qo_heads > 0 &&
                     p.qo_len >= kMinRows && p.qo_len <= kMaxLength && p.kv_len > 0 &&
                     p.kv_len <= kMaxLength && p.batch * p.num_qo_heads < kMaxLength / (p.qo_len / 128 + 1);
  return (p.dtype == DType::bf16 || p.dtype == DType::f16) && plain && mask && sizes &&
         sm90::tensor_map_takes(sm90::query_rows(p)) && sm90::tensor_map_takes(sm90::key_rows(p)) &&
         sm90::tensor_map_takes(sm90::value_rows(p)) && sm90::tensor_map_takes(sm90::out_rows(p));
}

namespace {

template <class T>
void dispatch(const AttentionParams& p, const Gpu& gpu) {
  sm90::with_head_dims(p.head_dim_qk, p.head_dim_vo,
                       [&]<int kDimQK, int kDimVO>() { sm90::prefill<T, kDimQK, kDimVO>(p, gpu); });
}

}  // namespace

void attention_sm90(const AttentionParams& p, const Gpu& gpu) {
  p.dtype == DType::bf16 ? dispatch<bf16>(p, gpu) : dispatch<f16>(p, gpu);
}

}  // namespace fi::cuda
