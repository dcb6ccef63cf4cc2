#include "fi/cuda/batch/few_kernel.h"

void fi::cuda::batch::few_f16_256(const FewArgs& args, const Gpu& gpu) { run_few<f16, 256>(args, gpu); }
