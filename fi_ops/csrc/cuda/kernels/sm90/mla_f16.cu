#include "fi/cuda/sm90/mla_kernel.h"

template void fi::cuda::sm90::mla<fi::f16>(const MlaParams&, const Gpu&);
