// A storage type that is known at run time as a template argument: on the host, for every device.
#pragma once

#include "fi/scalar.h"

namespace fi {

// Calls f(T{}) with the storage type of `dtype`. Static and inlined, as everything that ISA levels share.
template <class F>
[[gnu::always_inline]] static inline void dispatch_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
    default:
      return f(float{});
  }
}

}  // namespace fi
