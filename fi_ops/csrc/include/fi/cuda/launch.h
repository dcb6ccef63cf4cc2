// Kernel launches: one function for the host, one for the kernel's dynamic shared memory.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "fi/cuda/gpu.h"

namespace fi::cuda {

// Launches `kernel<<<grid, block, smem>>>(args...)` on gpu.stream, `cluster` consecutive blocks of grid.x in
// a cluster (more than 1 on sm_90 only). `smem` may exceed 48 KB. With `overlap` the kernel may start while
// the one before it in the stream runs its last blocks (sm_90, programmatic dependent launch); it must then
// call wait_for_previous_kernel() (fi/cuda/ptx.h) before it reads what that one wrote.
template <class... Params, class... Args>
void launch_clusters(const Gpu& gpu, void (*kernel)(Params...), dim3 grid, unsigned cluster, dim3 block,
                     size_t smem, bool overlap, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (smem > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem)),
          "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = gpu.stream;
  config.attrs = attributes;
  if (overlap && gpu.compute_capability >= 90) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    auto& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "a kernel launch");
}

template <class... Params, class... Args>
void launch(const Gpu& gpu, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, bool overlap,
            Args&&... args) {
  launch_clusters(gpu, kernel, grid, 1, block, smem, overlap, std::forward<Args>(args)...);
}

template <class... Params, class... Args>
void launch(const Gpu& gpu, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, Args&&... args) {
  launch(gpu, kernel, grid, block, smem, /*overlap=*/false, std::forward<Args>(args)...);
}

// Of a kernel whose shared memory the compiler knows. These are functions of their own in the object file,
// and their names say what each kernel gets: the build's report reads it there (fi_ops/_build_report.py).
template <auto kKernel, size_t kSmem, class... Args>
[[gnu::noinline]] void launch_clusters_with(const Gpu& gpu, dim3 grid, unsigned cluster, dim3 block,
                                            bool overlap, Args&&... args) {
  launch_clusters(gpu, kKernel, grid, cluster, block, kSmem, overlap, std::forward<Args>(args)...);
}

template <auto kKernel, size_t kSmem, class... Args>
[[gnu::noinline]] void launch_with(const Gpu& gpu, dim3 grid, dim3 block, bool overlap, Args&&... args) {
  launch(gpu, kKernel, grid, block, kSmem, overlap, std::forward<Args>(args)...);
}

#ifdef __CUDACC__
// The block's dynamic shared memory, 1024-byte aligned (what 128-byte swizzled TMA boxes need).
__device__ __forceinline__ unsigned char* dynamic_smem() {
  extern __shared__ __align__(1024) unsigned char fi_dynamic_smem[];
  return fi_dynamic_smem;
}
#endif

}  // namespace fi::cuda
