// Attention: the choice of a path. Each path has one predicate, which everyone asks.
#include "fi/cuda/decode.h"
#include "fi/cuda/sm80/prefill.h"
#ifdef FI_CUDA_SM90A
#  include "fi/cuda/sm90/attention.h"
#endif

namespace fi::cuda {
namespace {

#ifdef FI_CUDA_SM90A
// Hopper's kernel is about twice as fast as the one for sm_80, but takes 128 queries of one head a block and
// all of their keys: few blocks with long keys leave more than half of the GPU idle. 64 blocks on 132
// multiprocessors are worth it, 32 are not, and with very long keys and a head_dim of 64 neither are 64
// (docs/kernels/prefill_cuda.md).
bool runs_on_hopper(const AttentionParams& p, const Gpu& gpu) {
  if (gpu.compute_capability != 90 || !sm90_prefill_supports(p)) return false;
  const int64_t blocks = p.batch * p.num_qo_heads * ((p.qo_len + 127) / 128);
  const int ninths = p.head_dim_qk <= 64 && p.kv_len > 8192 ? 6 : 4;  // of the multiprocessors
  return p.kv_len < kLongKeys || 9 * blocks >= ninths * gpu.num_sms;
}
#endif

}  // namespace

void attention(const AttentionParams& p, const Gpu& gpu) {
  if (p.batch == 0 || p.num_qo_heads == 0 || p.qo_len == 0) return;
  if (decode_supports(p)) return attention_decode(p, nullptr, gpu);
  if (p.rope.cos) return attention(rotate_first(p, gpu), gpu);
#ifdef FI_CUDA_SM90A
  if (runs_on_hopper(p, gpu)) return attention_sm90(p, gpu);
#endif
  if (prefill_supports(p)) return prefill(p, gpu);
  generic_attention(p, gpu);
}

void append_attention(const AppendAttentionParams& p, const Gpu& gpu) {
  if (decode_supports(p.attention)) return attention_decode(p.attention, &p.append, gpu);
  append_kv(p.append, gpu);
  attention(p.attention, gpu);
}

}  // namespace fi::cuda
