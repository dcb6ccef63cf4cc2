// What a binding needs of CUDA (see binding/device.h): the tensor's device made current, torch's stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "binding/check.h"
#include "fi/cuda/gpu.h"

#define FI_DEVICE CUDA
#define FI_KERNEL_OF(name) (&::fi::cuda::name)

namespace fi::binding {

// torch's current stream on `device_index`, and what the kernels ask about that device (read once a process).
cuda::Gpu gpu_at(int32_t device_index);

// True under FI_OPS_CHECK=1: checks that read tensor contents run too, each with a device sync.
bool checks_values();

template <class Params>
void run(void (*kernel)(const Params&, const cuda::Gpu&), const Tensor& like, const Params& params) {
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  kernel(params, gpu_at(like.get_device_index()));
}

inline std::optional<Tensor> values_to_check(const Tensor& t) {
  if (!checks_values()) return std::nullopt;
  return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

}  // namespace fi::binding
