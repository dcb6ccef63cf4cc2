#include "fi/cuda/sm80/batch_kernel.h"

template void fi::cuda::run_batch_tiles<fi::bf16, 64, 64, false>(const BatchTilesArgs&, const Gpu&);
template void fi::cuda::run_batch_tiles<fi::bf16, 64, 64, true>(const BatchTilesArgs&, const Gpu&);
