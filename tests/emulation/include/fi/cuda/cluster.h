// The emulated twin of fi/cuda/cluster.h.
#pragma once

#include <cstdlib>

#include "fi/cuda/launch.h"
#include "fi/cuda/ptx.h"

namespace fi::cuda {

template <class... Params, class... Args>
void launch_clusters(const Gpu&, void (*kernel)(Params...), dim3 grid, unsigned cluster, dim3 block,
                     size_t smem, bool, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulation::run_grid(grid, block, smem, [&] { kernel(args...); }, cluster);
}

template <class... Params, class... Args>
void launch_clusters(const Gpu& gpu, void (*kernel)(Params...), dim3 grid, unsigned cluster, dim3 block,
                     size_t smem, Args&&... args) {
  launch_clusters(gpu, kernel, grid, cluster, block, smem, false, std::forward<Args>(args)...);
}

// Clusters are emulated, whatever compute capability the device claims; FI_EMULATION_CLUSTERS=0: they are not there.
inline bool has_clusters(const Gpu&) {
  const char* text = std::getenv("FI_EMULATION_CLUSTERS");
  return text == nullptr || *text != '0';
}

inline uint32_t cluster_size() { return emulation::cluster_size(); }
inline uint32_t cluster_rank() { return emulation::cluster_rank(); }
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }

template <class T>
T* peer_smem(T* p, uint32_t rank) {
  return static_cast<T*>(emulation::peer_smem(p, rank));
}

}  // namespace fi::cuda
