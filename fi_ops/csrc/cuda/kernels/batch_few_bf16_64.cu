#include "fi/cuda/batch/few_kernel.h"

void fi::cuda::batch::few_bf16_64(const FewArgs& args, const Gpu& gpu) { run_few<bf16, 64>(args, gpu); }
