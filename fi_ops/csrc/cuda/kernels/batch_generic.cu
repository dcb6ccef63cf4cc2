// Attention over a batch on CUDA cores: any dtype, head dim and strides, every feature.
#include "fi/cuda/batch/generic.h"

namespace fi::cuda::batch {

void on_cuda_cores(const BatchAttentionParams& p, const PlanView& plan, bool segments, bool tiles,
                   const Gpu& gpu) {
  const GenericArgs args{
      p, plan, segments, tiles, static_cast<unsigned>(p.call.num_qo_heads / p.call.num_kv_heads), 1};
  p.call.dtype == DType::f32    ? run_generic<float>(args, gpu)
  : p.call.dtype == DType::bf16 ? run_generic<bf16>(args, gpu)
                                : run_generic<f16>(args, gpu);
}

}  // namespace fi::cuda::batch
