// How a kernel's entry point is declared: once, for every device that a library may be for.
//
// FI_KERNEL(name, Params), at the end of a family's header, declares in a CPU library one function an ISA
// level (fi/cpu/isa.h), in a CUDA library `void fi::cuda::name(const Params&, const Gpu&)` (fi/cuda/gpu.h).
#pragma once

#include <cstdint>

#ifdef FI_ON_CUDA
#  include "fi/cuda/gpu.h"
#  define FI_KERNEL(name, Params)               \
    namespace fi::cuda {                        \
    void name(const Params& p, const Gpu& gpu); \
    }
#else
#  include "fi/cpu/isa.h"
#  include "fi/cpu/parallel.h"
#  define FI_KERNEL(name, Params) \
    FI_DECLARE_KERNEL(void, name, (const Params& p, const fi::Parallel& parallel))
#endif
