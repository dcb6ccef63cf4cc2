// Thread block clusters (sm_90): blocks that run at the same time and read each other's shared memory. Before
// sm_90 every cluster is one block.
//
// tests/emulation/include/fi/cuda/cluster.h has the same functions in plain C++.
#pragma once

#include "fi/cuda/launch.h"
#include "fi/cuda/ptx.h"

namespace fi::cuda {

inline bool has_clusters(const Gpu& gpu) { return gpu.compute_capability >= 90; }

#ifdef __CUDACC__
FI_DEVICE_INLINE uint32_t cluster_size() {
  uint32_t size = 1;
#  if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(size));
#  endif
  return size;
}

FI_DEVICE_INLINE uint32_t cluster_rank() {
  uint32_t rank = 0;
#  if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
#  endif
  return rank;
}

// The cluster's barrier in two halves: what a thread wrote before its arrival, to whatever block's shared
// memory, all threads see after their wait.
FI_DEVICE_INLINE void cluster_arrive() {
#  if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\n" ::: "memory");
#  endif
}
// The same without a word about memory, which then waits for none of the thread's stores.
FI_DEVICE_INLINE void cluster_arrive_relaxed() {
#  if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;\n" ::: "memory");
#  endif
}
FI_DEVICE_INLINE void cluster_wait() {
#  if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;\n" ::: "memory");
#  endif
}

// Where block `rank` of the cluster has what this block has at `p`, in shared memory. That block must have
// started and must not have ended.
template <class T>
FI_DEVICE_INLINE T* peer_smem(T* p, uint32_t rank) {
#  if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;\n" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
#  else
  return p;
#  endif
}
#endif

}  // namespace fi::cuda
