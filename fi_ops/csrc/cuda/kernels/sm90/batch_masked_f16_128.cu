#include "fi/cuda/sm90/batch_kernel.h"

template void fi::cuda::sm90::masked_batch_tiles<fi::f16, 128, 128>(const BatchAttentionParams&,
                                                                    const fi::cuda::batch::PlanView&,
                                                                    const Gpu&);
