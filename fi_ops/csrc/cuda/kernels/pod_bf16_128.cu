#include "fi/cuda/batch/pod_kernel.h"

bool fi::cuda::batch::pod_bf16_128(const FewArgs& decode, const BatchTilesArgs& prefill, const Gpu& gpu) {
  return run_pod<bf16, 128>(decode, prefill, gpu);
}
