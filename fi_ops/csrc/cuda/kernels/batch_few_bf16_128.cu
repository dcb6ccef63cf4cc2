#include "fi/cuda/batch/few_kernel.h"

void fi::cuda::batch::few_bf16_128(const FewArgs& args, const Gpu& gpu) { run_few<bf16, 128>(args, gpu); }
