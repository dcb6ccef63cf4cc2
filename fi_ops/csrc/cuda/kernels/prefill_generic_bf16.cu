#include "fi/cuda/sm80/generic_kernel.h"

template void fi::cuda::run_generic<fi::bf16>(const GenericArgs&, const Gpu&);
