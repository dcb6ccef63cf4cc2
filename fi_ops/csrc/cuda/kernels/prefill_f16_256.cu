#include "fi/cuda/sm80/prefill_kernel.h"

template void fi::cuda::run_prefill<fi::f16, 256, 256>(const PrefillArgs&, const Gpu&, int);
