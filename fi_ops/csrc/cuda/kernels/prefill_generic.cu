// Attention on CUDA cores: any dtype, head dim and strides.
#include "fi/cuda/sm80/prefill.h"

namespace fi::cuda {

void generic_attention(const AttentionParams& p, const Gpu& gpu) {
  GenericArgs args{};
  args.p = p;
  args.group = static_cast<unsigned>(p.num_qo_heads / p.num_kv_heads);
  args.num_rows = args.group * static_cast<unsigned>(p.qo_len);
  args.num_blocks = (args.num_rows + 63) / 64;
  if (p.mask) args.mask = classify_mask(p, gpu, 64, 64);
  p.dtype == DType::f32    ? run_generic<float>(args, gpu)
  : p.dtype == DType::bf16 ? run_generic<bf16>(args, gpu)
                           : run_generic<f16>(args, gpu);
}

}  // namespace fi::cuda
