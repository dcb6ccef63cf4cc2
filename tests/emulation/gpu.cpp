// The GPU that the emulated bindings see.
#include <cstdlib>

#include "binding/cuda.h"

namespace fi::binding {

cuda::Gpu emulated_gpu() {
  const char* sms = std::getenv("FI_EMULATION_SMS");
#ifdef FI_CUDA_SM90A
  constexpr int kCapability = 90, kBlockSmem = 227 * 1024;
#else
  constexpr int kCapability = 80, kBlockSmem = 163 * 1024;
#endif
  return {nullptr, sms && *sms ? std::atoi(sms) : 4, kCapability, kBlockSmem};
}

}  // namespace fi::binding
