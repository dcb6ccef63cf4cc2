// The emulated twin of fi/cuda/launch.h.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "fi/cuda/gpu.h"

namespace fi::cuda {

template <class... Params, class... Args>
void launch_clusters(const Gpu&, void (*kernel)(Params...), dim3 grid, unsigned cluster, dim3 block, size_t smem, bool,
                     Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulation::note_launch(reinterpret_cast<const void*>(kernel));
  emulation::run_grid(grid, block, smem, [&] { kernel(args...); }, cluster);
}

template <class... Params, class... Args>
void launch(const Gpu& gpu, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, bool overlap, Args&&... args) {
  launch_clusters(gpu, kernel, grid, 1, block, smem, overlap, std::forward<Args>(args)...);
}

template <class... Params, class... Args>
void launch(const Gpu& gpu, void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, Args&&... args) {
  launch(gpu, kernel, grid, block, smem, false, std::forward<Args>(args)...);
}

template <auto kKernel, size_t kSmem, class... Args>
void launch_clusters_with(const Gpu& gpu, dim3 grid, unsigned cluster, dim3 block, bool overlap, Args&&... args) {
  launch_clusters(gpu, kKernel, grid, cluster, block, kSmem, overlap, std::forward<Args>(args)...);
}

template <auto kKernel, size_t kSmem, class... Args>
void launch_with(const Gpu& gpu, dim3 grid, dim3 block, bool overlap, Args&&... args) {
  launch(gpu, kKernel, grid, block, kSmem, overlap, std::forward<Args>(args)...);
}

inline unsigned char* dynamic_smem() { return emulation::dynamic_smem(); }

}  // namespace fi::cuda
