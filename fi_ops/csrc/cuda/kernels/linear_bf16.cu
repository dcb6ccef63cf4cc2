#include "fi/cuda/linear/stream_instances.h"

namespace fi::cuda {

template void linear_stream<bf16>(const LinearParams&, const Gpu&);

}  // namespace fi::cuda
