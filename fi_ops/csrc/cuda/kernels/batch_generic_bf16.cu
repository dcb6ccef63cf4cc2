#include "fi/cuda/batch/generic_kernel.h"

template void fi::cuda::batch::run_generic<fi::bf16>(const GenericArgs&, const Gpu&);
