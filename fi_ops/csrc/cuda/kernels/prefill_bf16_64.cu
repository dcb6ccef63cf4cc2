#include "fi/cuda/sm80/prefill_kernel.h"

template void fi::cuda::run_prefill<fi::bf16, 64, 64>(const PrefillArgs&, const Gpu&, int);
