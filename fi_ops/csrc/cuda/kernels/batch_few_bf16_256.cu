#include "fi/cuda/batch/few_kernel.h"

void fi::cuda::batch::few_bf16_256(const FewArgs& args, const Gpu& gpu) { run_few<bf16, 256>(args, gpu); }
