// The emulated twin of fi/cuda/cluster.h.
#pragma once

#include <cstdlib>

#include "fi/cuda/launch.h"
#include "fi/cuda/ptx.h"

namespace fi::cuda {

// Clusters are emulated, whatever compute capability the device claims; FI_EMULATION_CLUSTERS=0: they are not
// there.
inline bool has_clusters(const Gpu&) {
  const char* text = std::getenv("FI_EMULATION_CLUSTERS");
  return text == nullptr || *text != '0';
}

inline uint32_t cluster_size() { return emulation::cluster_size(); }
inline uint32_t cluster_rank() { return emulation::cluster_rank(); }
inline void cluster_arrive() { emulation::cluster_arrive(); }
inline void cluster_arrive_relaxed() { emulation::cluster_arrive(); }
inline void cluster_wait() { emulation::cluster_wait(); }

template <class T>
T* peer_smem(T* p, uint32_t rank) {
  return static_cast<T*>(emulation::peer_smem(p, rank));
}

}  // namespace fi::cuda
