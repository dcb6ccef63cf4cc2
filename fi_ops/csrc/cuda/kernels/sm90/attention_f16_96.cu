#include "fi/cuda/sm90/prefill_launch.h"

template void fi::cuda::sm90::prefill<fi::f16, 96, 96>(const AttentionParams&, const Gpu&);
