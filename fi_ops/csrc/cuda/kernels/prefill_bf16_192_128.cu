#include "fi/cuda/sm80/prefill_kernel.h"

template void fi::cuda::run_prefill<fi::bf16, 192, 128>(const PrefillArgs&, const Gpu&, int);
