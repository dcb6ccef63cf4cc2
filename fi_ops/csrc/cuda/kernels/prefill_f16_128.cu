#include "fi/cuda/sm80/prefill_kernel.h"

template void fi::cuda::run_prefill<fi::f16, 128, 128>(const PrefillArgs&, const Gpu&, int);
