// What a binding needs of the CPU (see binding/device.h): torch's threads as a fi::Parallel, the ISA's
// kernel.
#pragma once

#include "binding/check.h"
#include "fi/cpu/isa.h"
#include "fi/cpu/parallel.h"

#define FI_DEVICE CPU
#define FI_KERNEL_OF(name) FI_DISPATCH(name)

namespace fi::binding {

inline Parallel torch_parallel() {
  auto launch = [](int64_t workers, void (*body)(int64_t, void*), void* context) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(worker, context);
    });
  };
  return {launch, static_cast<int64_t>(torch::stable::get_num_threads())};
}

template <class Params>
void run(void (*kernel)(const Params&, const Parallel&), const Tensor&, const Params& params) {
  kernel(params, torch_parallel());
}

constexpr bool checks_values() { return true; }
inline std::optional<Tensor> values_to_check(const Tensor& t) { return t; }

}  // namespace fi::binding
