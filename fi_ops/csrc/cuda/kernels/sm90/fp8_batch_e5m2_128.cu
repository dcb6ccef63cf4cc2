#include "fi/cuda/sm90/fp8_batch_kernel.h"

template void fi::cuda::sm90::fp8_batch_tiles<fi::Fp8::e5m2, 128>(const Fp8BatchAttentionParams&,
                                                                  const fi::cuda::batch::PlanView&,
                                                                  const Gpu&);
