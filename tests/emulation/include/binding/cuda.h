// The emulated twin of binding/cuda.h: the CUDA bindings over CPU tensors, under torch's CPU key.
#pragma once

#include <cstdlib>

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

// FI_EMULATION_CHECK=0: tensors' contents are not checked, as on a GPU without FI_OPS_CHECK.
inline bool checks_values() {
  const char* const text = std::getenv("FI_EMULATION_CHECK");
  return text == nullptr || text[0] != '0';
}
inline std::optional<Tensor> values_to_check(const Tensor& t) {
  return checks_values() ? std::optional<Tensor>(t) : std::nullopt;
}

}  // namespace fi::binding
