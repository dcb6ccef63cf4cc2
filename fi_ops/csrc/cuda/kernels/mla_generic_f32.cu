#include "fi/cuda/mla/generic_kernel.h"

template void fi::cuda::mla::run_generic<float>(const GenericArgs&, const Gpu&);
