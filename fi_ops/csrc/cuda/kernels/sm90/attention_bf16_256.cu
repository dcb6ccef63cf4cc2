#include "fi/cuda/sm90/prefill_launch.h"

template void fi::cuda::sm90::prefill<fi::bf16, 256, 256>(const AttentionParams&, const Gpu&);
