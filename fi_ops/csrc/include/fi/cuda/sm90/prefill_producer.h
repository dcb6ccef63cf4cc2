// The producers, which start the copies of a block: one thread where a formula says which tiles there are,
// one warp where it finds them out first.
#pragma once

#include "fi/cuda/sm90/prefill_config.h"
#include "fi/cuda/sm90/tma.h"

namespace fi::cuda::sm90 {

// Starts the copy of a tile into an empty place.
template <int kPanels>
FI_DEVICE_INLINE void start_load(unsigned char* tile, Barrier& full, const CUtensorMap& map, int row,
                                 int head, int b, int panel_bytes) {
  barrier_arrive_expect(full, kPanels * panel_bytes);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel)
    load_box(tile + panel * panel_bytes, map, panel * kBoxColumns, row, head, b, full);
}
// The same, once the place is empty.
template <int kPanels>
FI_DEVICE_INLINE void load_tile(unsigned char* tile, Barrier& full, Barrier& empty, uint32_t parity,
                                const CUtensorMap& map, int row, int head, int b, int panel_bytes) {
  barrier_wait(empty, parity ^ 1);
  start_load<kPanels>(tile, full, map, row, head, b, panel_bytes);
}

template <class Config>
class PrefillProducer {
 public:
  using Smem = PrefillSmem<Config>;

  // By one thread.
  FI_DEVICE_INLINE static void run(Smem& smem, const PrefillShape& shape, const CUtensorMap& q_map,
                                   const CUtensorMap& k_map, const CUtensorMap& v_map) {
    PrefillQueue<Config::kBlockM, Config::kBlockN> queue(shape);
    PrefillWork work;
    RingPosition<1> q_at;
    RingPosition<Config::kStages> k_at, v_at;
    while (queue.next(work)) {
      if (work.tiles.size() == 0) continue;
      const int kv_head = work.head / shape.group_size;
      const auto load_k = [&](int tile) {
        load_tile<Config::kPanelsQK>(smem.k[k_at.stage], smem.k_full[k_at.stage], smem.k_empty[k_at.stage],
                                     k_at.parity, k_map, tile * Config::kBlockN, kv_head, work.b,
                                     Smem::kKvPanelBytes);
        k_at.advance();
      };
      load_tile<Config::kPanelsQK>(smem.q, smem.q_full, smem.q_empty, q_at.parity, q_map, work.q_start,
                                   work.head, work.b, Smem::kQPanelBytes);
      q_at.advance();
      load_k(work.tiles.end - 1);
      for (int tile = work.tiles.end - 1; tile >= work.tiles.begin; --tile) {
        if (tile > work.tiles.begin) load_k(tile - 1);  // in the order in which they are needed
        load_tile<Config::kPanelsVO>(smem.v[v_at.stage], smem.v_full[v_at.stage], smem.v_empty[v_at.stage],
                                     v_at.parity, v_map, tile * Config::kBlockN, kv_head, work.b,
                                     Smem::kKvPanelBytes);
        v_at.advance();
      }
    }
  }
};

// Lists the tiles as it goes.
template <class Config>
class DeviceKeysProducer {
 public:
  using Smem = DeviceKeysSmem<Config>;
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;

  // By one warp.
  FI_DEVICE_INLINE static void run(Smem& smem, const PrefillArgs& args, const CUtensorMap& q_map,
                                   const CUtensorMap& k_map, const CUtensorMap& v_map) {
    const bool leader = threadIdx.x == 0;
    PrefillQueue<kBlockM, kBlockN> queue(args.shape);
    PrefillWork work;
    RingPosition<1> q_at;
    RingPosition<Config::kStages> k_at, v_at;
    for (; queue.next(work); q_at.advance()) {
      KeyRange row_keys[kBlockM / 32];
      LiveTiles<kBlockM, kBlockN> live(args.p, args.mask, work, row_keys);
      ListedTile tile = live.next();
      // Empty: every consumer has taken the last query tile, and so is done with what was in this place.
      barrier_wait(smem.q_empty, q_at.parity ^ 1);
      RowKeys<kBlockM>& keys = smem.rows[q_at.parity];
      if (args.mask.classes == nullptr) {
#pragma unroll
        for (int i = 0; i < kBlockM / 32; ++i) keys.rows[32 * i + threadIdx.x] = row_keys[i];
      }
      if (leader) {
        keys.first_tile = tile.word();
        keys.seen = live.seen();
      }
      __syncwarp();  // the leader's arrival speaks for all
      if (!tile) {
        if (leader) barrier_arrive(smem.q_full);
        continue;
      }
      const int kv_head = work.head / args.shape.group_size;
      const auto load_k = [&](ListedTile tile, ListedTile next) {
        if (leader) {
          barrier_wait(smem.k_empty[k_at.stage], k_at.parity ^ 1);
          smem.tiles[k_at.stage] = next.word();
          start_load<Config::kPanelsQK>(smem.k[k_at.stage], smem.k_full[k_at.stage], k_map,
                                        tile.index() * kBlockN, kv_head, work.b, Smem::kKvPanelBytes);
        }
        k_at.advance();
      };
      if (leader)
        start_load<Config::kPanelsQK>(smem.q, smem.q_full, q_map, work.q_start, work.head, work.b,
                                      Smem::kQPanelBytes);
      ListedTile next = live.next();
      load_k(tile, next);
      while (tile) {
        ListedTile after;
        if (next) {
          after = live.next();
          load_k(next, after);  // in the order in which they are needed
        }
        if (leader) {
          barrier_wait(smem.v_empty[v_at.stage], v_at.parity ^ 1);
          start_load<Config::kPanelsVO>(smem.v[v_at.stage], smem.v_full[v_at.stage], v_map,
                                        tile.index() * kBlockN, kv_head, work.b, Smem::kKvPanelBytes);
        }
        v_at.advance();
        tile = next, next = after;
      }
    }
  }
};

}  // namespace fi::cuda::sm90
