// Torch's streams and the devices' properties, for every binding of the CUDA library.
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "binding/cuda.h"

namespace fi::binding {
namespace {

// Resolved at run time: a CPU-only torch, against which this library may be linked, has no libtorch_cuda. It
// is asked for by name because torch loads it with local scope, where RTLD_DEFAULT does not look.
using CurrentStream = AOTITorchError (*)(int32_t, void**);
CurrentStream current_stream_function() {
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (function == nullptr)
    throw std::runtime_error("fi_ops: this torch was built without CUDA; install a CUDA build");
  return function;
}

// What does not change about a device.
struct Properties {
  std::atomic<int> num_sms{0};  // written last: 0 while nobody has asked yet
  std::atomic<int> compute_capability{0};
  std::atomic<int> max_block_smem{0};
};
constexpr int kMaxDevices = 64;
std::array<Properties, kMaxDevices> properties{};

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  cuda::check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// The architecture whose code runs on the card (the table in fi_ops/_build_cuda.py): Hopper's own only on
// Hopper, and only where it was compiled; all other cards run sm_80's, by its PTX where they are newer.
int code_capability(int device) {
  const int card = attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
                   attribute(cudaDevAttrComputeCapabilityMinor, device);
#ifdef FI_CUDA_SM90A
  if (card == 90) return 90;
#endif
  if (card < 80)
    throw std::runtime_error("fi_ops: the CUDA kernels need compute capability 8.0 or newer, got " +
                             std::to_string(card / 10) + "." + std::to_string(card % 10) +
                             "; use stock torch or the CPU ops with this GPU");
  return 80;
}

}  // namespace

cuda::Gpu gpu_at(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream_function()(device, &stream));
  if (device < 0 || device >= kMaxDevices) throw std::runtime_error("fi_ops: CUDA device index out of range");
  Properties& known = properties[device];
  if (known.num_sms.load(std::memory_order_acquire) == 0) {
    known.compute_capability.store(code_capability(device));
    known.max_block_smem.store(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    known.num_sms.store(attribute(cudaDevAttrMultiProcessorCount, device), std::memory_order_release);
  }
  return {static_cast<cudaStream_t>(stream), known.num_sms.load(), known.compute_capability.load(),
          known.max_block_smem.load()};
}

bool checks_values() {
  static const bool on = [] {
    const char* value = std::getenv("FI_OPS_CHECK");
    return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
  }();
  return on;
}

}  // namespace fi::binding
