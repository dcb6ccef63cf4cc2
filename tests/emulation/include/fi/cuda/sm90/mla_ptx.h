// The emulated twin of fi/cuda/sm90/mla_ptx.h.
#pragma once

#include "fi/cuda/cluster.h"
#include "fi/cuda/sm90/stmatrix.h"
#include "fi/cuda/sm90/tma.h"

namespace fi::cuda::sm90 {

inline void prefetch_box(const CUtensorMap&, int, int, int, int) {}

inline void load_box_for_both(void* smem, const CUtensorMap& map, int x, int y, int z, int w,
                              Barrier& barrier) {
  for (unsigned rank = 0; rank < 2; ++rank) emulation::load_box(smem, map, {x, y, z, w}, barrier, rank);
}

inline void barrier_arrive_at(Barrier& barrier, uint32_t rank) { barrier_arrive(*peer_smem(&barrier, rank)); }

}  // namespace fi::cuda::sm90
