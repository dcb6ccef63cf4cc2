// The device that a library is for. A binding source is compiled once for each: everything that differs is
// behind these names.
//
//   run(FI_KERNEL_OF(name), like, params)   run a kernel where the tensor `like` is
//   checks_values()                         whether tensors' contents are to be checked
//   values_to_check(t)                      a tensor's contents on the host, where they are to be checked
//   FI_DEVICE                               the dispatch key: STABLE_TORCH_LIBRARY_IMPL(fi, FI_DEVICE, m)
#pragma once

#ifdef FI_ON_CUDA
#  include "binding/cuda.h"
#else
#  include "binding/cpu.h"
#endif

#include "fi/fp8.h"
#include "fi/scalar.h"

namespace fi::binding {

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

// none: not one of the 8-bit formats.
inline Fp8 fp8_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float8_e4m3fn ? Fp8::e4m3
         : t.scalar_type() == ScalarType::Float8_e5m2 ? Fp8::e5m2
                                                      : Fp8::none;
}

}  // namespace fi::binding
