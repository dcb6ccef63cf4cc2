// The producers of a batch under a custom mask: they bring the KV tiles that the scan of the mask found live,
// and tell the consumers which they are.
#pragma once

#include "fi/cuda/sm90/batch_masks.h"
#include "fi/cuda/sm90/batch_producer.h"

namespace fi::cuda::sm90 {

// A warp of it, as in BatchProducer.
template <class Config, bool kValues>
class MaskedBatchProducer : BatchProducer<Config, kValues> {
  using Base = BatchProducer<Config, kValues>;
  using typename Base::Smem;

 public:
  using typename Base::Loader;

  FI_DEVICE_INLINE static void run(Smem& smem, const MaskedBatchArgs& args, const CUtensorMap& q_map,
                                   const CUtensorMap& packed_q_map, const CUtensorMap& map) {
    auto& ring = Base::ring_of(smem);
    auto& full = kValues ? smem.v_full : smem.k_full;
    auto& empty = kValues ? smem.v_empty : smem.k_empty;
    MaskedTile(&prepared)[2] = smem.prepared[threadIdx.x / 32];
    Loader loader(args, map);
    RingPosition<Config::kStages> at;
    // Before the first query tile comes one that is nobody's and has no keys.
    if (lane_now() == 0) {
      prepared[1].work = {}, prepared[1].queue = first_of_queue<Config::kBlockM>(args.shape);
      start_masked_tile(prepared[1], args.mask);
      prepared[0].queue.round = 0;
    }
    __syncwarp();
    MaskedTile* current = &prepared[1];
#pragma unroll 1
    for (;;) {
      MaskedTile& tile = *current;
      const bool odd = current == &prepared[1];
      advance(tile, args.mask);
      typename Loader::Pages ahead;
      if (tile.next()) ahead = loader.look_up(tile, tile.next().index());
      if (!kValues && tile.queue.round > 0 && thread_now() < 32)
        Base::publish(smem, args, odd, q_map, packed_q_map, tile);
      if (!tile.any()) break;
#pragma unroll 1
      for (;;) {
        const ListedTile kv_tile = tile.next();
        if (kv_tile) {
          const auto pages = ahead;
          advance(tile, args.mask);
          if (tile.next()) ahead = loader.look_up(tile, tile.next().index());
          barrier_wait(empty[at.stage], at.parity ^ 1);
          if (!kValues && thread_now() == 0) {
            smem.after[at.stage] = tile.next_tile;
            // Arrivals of copies say nothing of what else their thread has written.
            if constexpr (Config::kByRows) barrier_arrive(full[at.stage]);
          }
          loader.load(ring[at.stage], full[at.stage], tile, kv_tile.index(), pages);
          at.advance();
        }
        MaskedTile& following = prepared[odd ? 0 : 1];
        if (following.queue.round <= tile.queue.round) {  // not found yet
          __syncwarp();                                   // no lane is still at the tile that was there
          if (lane_now() == 0) {
            next_batch_tile<Config::kBlockM, Config::kBlockN>(
                args.shape, static_cast<int>(gridDim.x), static_cast<int>(blockIdx.x), tile.queue, following);
            start_masked_tile(following, args.mask);
          }
          __syncwarp();
        }
        if (!kv_tile || !tile.next()) break;
      }
      current = &prepared[odd ? 0 : 1];
    }
  }
};

}  // namespace fi::cuda::sm90
