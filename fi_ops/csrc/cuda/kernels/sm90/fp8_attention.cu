// Attention of 8-bit tensors on Hopper: the predicate, and the choice of a kernel.
#include "fi/cuda/sm90/fp8_attention.h"

namespace fi::cuda {

bool sm90_fp8_supports(const Fp8AttentionParams& p) {
  constexpr int64_t kMinRows = 64;  // fewer leave most of a tile empty
  // Rows, keys and tiles are counted in 32 bits.
  constexpr int64_t kMaxLength = int64_t{1} << 29;
  const AttentionParams& c = p.call;
  const bool plain =
      !c.alibi_slopes && !c.mask && !c.query_positions && c.rope.cos == nullptr && c.logits_soft_cap == 0.0f;
  const bool sizes = c.head_dim_qk == c.head_dim_vo && (c.head_dim_qk == 64 || c.head_dim_qk == 128) &&
                     c.batch > 0 && c.num_qo_heads > 0 && c.qo_len >= kMinRows && c.qo_len <= kMaxLength &&
                     c.kv_len > 0 && c.kv_len <= kMaxLength &&
                     c.batch * c.num_qo_heads < kMaxLength / (c.qo_len / 128 + 1);
  return plain && sizes && sm90::pairs_map_takes(sm90::query_rows(c)) &&
         sm90::pairs_map_takes(sm90::key_rows(c)) && sm90::pairs_map_takes(sm90::value_rows(c));
}

namespace {

template <Fp8 kFormat>
void dispatch(const Fp8AttentionParams& p, const Gpu& gpu) {
  p.call.head_dim_qk == 64 ? sm90::fp8_prefill<kFormat, 64>(p, gpu) : sm90::fp8_prefill<kFormat, 128>(p, gpu);
}

}  // namespace

void fp8_attention_sm90(const Fp8AttentionParams& p, const Gpu& gpu) {
  p.format == Fp8::e4m3 ? dispatch<Fp8::e4m3>(p, gpu) : dispatch<Fp8::e5m2>(p, gpu);
}

}  // namespace fi::cuda
