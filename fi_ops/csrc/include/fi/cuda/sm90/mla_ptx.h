// Instructions that latent attention alone uses.
#pragma once

#include "fi/cuda/sm90/stmatrix.h"
#include "fi/cuda/sm90/tma.h"

namespace fi::cuda::sm90 {

// Brings a box into L2, later.
FI_DEVICE_INLINE void prefetch_box(const CUtensorMap& map, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];\n" ::"l"(&map),
               "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// As load_box, to the same place of both blocks of a cluster, each of whose barriers counts the bytes.
FI_DEVICE_INLINE void load_box_for_both(void* smem, const CUtensorMap& map, int x, int y, int z, int w,
                                        Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;\n" ::"r"(smem_address(smem)),
      "l"(&map), "r"(smem_address(&barrier)), "r"(x), "r"(y), "r"(z), "r"(w), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Arrives at the same barrier of block `rank` of the cluster.
FI_DEVICE_INLINE void barrier_arrive_at(Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(smem_address(&barrier)),
      "r"(rank)
      : "memory");
}

}  // namespace fi::cuda::sm90
