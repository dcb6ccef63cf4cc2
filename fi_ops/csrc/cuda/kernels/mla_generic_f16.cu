#include "fi/cuda/mla/generic_kernel.h"

template void fi::cuda::mla::run_generic<fi::f16>(const GenericArgs&, const Gpu&);
