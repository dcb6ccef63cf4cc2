// The GPU that the emulated bindings see.
#include <cstdlib>

#include "binding/cuda.h"

namespace fi::binding {

cuda::Gpu emulated_gpu() {
  const char* sms = std::getenv("FI_EMULATION_SMS");
  return {nullptr, sms && *sms ? std::atoi(sms) : 4, 80, 163 * 1024};
}

}  // namespace fi::binding
