#include "fi/cuda/batch/generic_kernel.h"

template void fi::cuda::batch::run_generic<float>(const GenericArgs&, const Gpu&);
