// The emulated twin of binding/cuda.h: the CUDA bindings over CPU tensors, under torch's CPU key.
#pragma once

#include "binding/check.h"
#include "fi/cuda/gpu.h"

#define FI_DEVICE CPU
#define FI_KERNEL_OF(name) (&::fi::cuda::name)

namespace fi::binding {

cuda::Gpu emulated_gpu();

template <class Params>
void run(void (*kernel)(const Params&, const cuda::Gpu&), const Tensor&, const Params& params) {
  kernel(params, emulated_gpu());
}

constexpr bool checks_values() { return true; }
inline std::optional<Tensor> values_to_check(const Tensor& t) { return t; }

}  // namespace fi::binding
