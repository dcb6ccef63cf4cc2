// What every CPU binding needs besides the checks: torch's threads as a fi::Parallel, dtypes as fi::DType.
#pragma once

#include "binding/check.h"
#include "fi/cpu/isa.h"
#include "fi/cpu/parallel.h"
#include "fi/scalar.h"

namespace fi::binding {

inline Parallel torch_parallel() {
  auto launch = [](int64_t workers, void (*body)(int64_t, void*), void* context) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) body(worker, context);
    });
  };
  return {launch, static_cast<int64_t>(torch::stable::get_num_threads())};
}

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Bool:
      return DType::boolean;
    case ScalarType::Byte:
      return DType::u8;
    case ScalarType::Int:
      return DType::i32;
    case ScalarType::Long:
      return DType::i64;
    default:
      throw std::runtime_error("fi_ops: a dtype passed the checks that no kernel has");
  }
}

}  // namespace fi::binding
