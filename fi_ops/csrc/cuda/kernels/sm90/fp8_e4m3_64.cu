#include "fi/cuda/sm90/fp8_launch.h"

template void fi::cuda::sm90::fp8_prefill<fi::Fp8::e4m3, 64>(const Fp8AttentionParams&, const Gpu&);
