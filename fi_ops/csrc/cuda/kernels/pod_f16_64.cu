#include "fi/cuda/batch/pod_kernel.h"

bool fi::cuda::batch::pod_f16_64(const FewArgs& decode, const BatchTilesArgs& prefill, const Gpu& gpu) {
  return run_pod<f16, 64>(decode, prefill, gpu);
}
