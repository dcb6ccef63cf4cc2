#include "fi/cuda/mla/generic_kernel.h"

template void fi::cuda::mla::run_generic<fi::bf16>(const GenericArgs&, const Gpu&);
