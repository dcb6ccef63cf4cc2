#include "fi/cuda/sm80/batch_kernel.h"

template void fi::cuda::run_batch_tiles<fi::f16, 128, 128, false>(const BatchTilesArgs&, const Gpu&);
template void fi::cuda::run_batch_tiles<fi::f16, 128, 128, true>(const BatchTilesArgs&, const Gpu&);
