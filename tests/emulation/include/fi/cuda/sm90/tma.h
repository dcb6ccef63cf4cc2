// The emulated twin of fi/cuda/sm90/tma.h.
#pragma once

#include <cuda.h>

#include "emulation/boxes.h"
#include "fi/cuda/sm90/mbarrier.h"

namespace fi::cuda::sm90 {

inline void prefetch_tensor_map(const CUtensorMap&) {}

inline void load_box(void* smem, const CUtensorMap& map, int x, int y, int z, int w, Barrier& barrier) {
  emulation::load_box(smem, map, {x, y, z, w}, barrier, emulation::cluster_rank());
}

}  // namespace fi::cuda::sm90
