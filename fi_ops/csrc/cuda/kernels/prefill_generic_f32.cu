#include "fi/cuda/sm80/generic_kernel.h"

template void fi::cuda::run_generic<float>(const GenericArgs&, const Gpu&);
