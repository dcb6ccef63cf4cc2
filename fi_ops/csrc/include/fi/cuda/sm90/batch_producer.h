// The producers of a batch: they find out which query tile is next, tell the consumers, and bring its keys,
// by the copy engine where a page holds enough of them, else row by row.
//
// Config::kLoaders warps bring keys and as many values, each its share of a tile, and none waits for another.
// What is looked up in memory is asked for before it is needed: a query tile while the one before is worked
// on, the pages of keys a KV tile ahead. Registers are short: what describes a query tile stays in shared
// memory.
#pragma once

#include <numeric>

#include "fi/cuda/sm90/prefill_config.h"
#include "fi/cuda/sm90/prefill_producer.h"

namespace fi::cuda::sm90 {

FI_DEVICE_INLINE int lane_now() { return static_cast<int>(thread_now() % 32); }
// Which half of a tile this warp brings.
FI_DEVICE_INLINE int half_now() { return static_cast<int>(thread_now() / 32 % 2); }

// Boxes of box_rows keys and kBoxColumns columns, one a lane. Those of pages that are not there lie outside
// of the tensor and arrive as zeros.
template <class Config, bool kValues>
class BoxLoader {
 public:
  static constexpr int kArrivals = Config::kLoaders;  // at a tile's barrier: warps
  static constexpr int kPanels = kValues ? Config::kPanelsVO : Config::kPanelsQK;

  // A lane's box of a KV tile: its page.
  using Pages = int;

  FI_DEVICE_INLINE BoxLoader(const BatchArgs& args, const CUtensorMap& map) : args_(args), map_(map) {}

  FI_DEVICE_INLINE Pages look_up(const BatchTile& tile, int kv_tile) const {
    return row() < Config::kBlockN
               ? key_page(args_.shape, tile, kv_tile * Config::kBlockN + row(), args_.box_rows)
               : -1;
  }

  FI_DEVICE_INLINE void load(unsigned char* to, Barrier& full, const BatchTile& tile, int kv_tile,
                             Pages page) {
    constexpr int kPanelBytes = PrefillSmem<Config>::kKvPanelBytes;
    if (lane_now() == 0) barrier_arrive_expect(full, args_.box_bytes[kValues][share()]);
    __syncwarp();
    const int row = this->row(), panel = box() % kPanels;
    if (row < Config::kBlockN)
      load_box(to + panel * kPanelBytes + row * 128, map_, panel * kBoxColumns,
               key_entry(args_.shape, tile, kv_tile * Config::kBlockN + row), tile.kv_head,
               checked_page(args_.shape, page), full);
  }

 private:
  // Boxes are counted panel by panel, then by rows; the warps take them in turns.
  FI_DEVICE_INLINE static int box() { return Config::kLoaders * lane_now() + share(); }
  FI_DEVICE_INLINE static int share() { return Config::kLoaders == 1 ? 0 : half_now(); }
  FI_DEVICE_INLINE int row() const { return box() / kPanels * args_.box_rows; }

  const BatchArgs& args_;
  const CUtensorMap& map_;
};

// Boxes of fewer keys than this cost more than copies of rows.
inline constexpr int kMinBoxRows = 16;

// How many keys of a tile one box can bring: those that are neighbours wherever a tile is cut into as many.
// 0: too few.
inline int box_rows(const BatchAttentionParams& p, int block_n) {
  const int rows = p.is_paged() ? static_cast<int>(std::gcd(p.table.page_size, int64_t{block_n})) : block_n;
  return rows >= kMinBoxRows && rows % 8 == 0 ? rows : 0;
}

// What each of the Config::kLoaders warps brings of a tile.
template <class Config>
void set_boxes(BatchArgs& args, int box_rows) {
  args.box_rows = box_rows;
  const int panels[2] = {Config::kPanelsQK, Config::kPanelsVO};
  for (int kind = 0; kind < 2; ++kind) {
    const int boxes = Config::kBlockN / box_rows * panels[kind];
    for (int warp = 0; warp < Config::kLoaders; ++warp)
      args.box_bytes[kind][warp] = static_cast<uint32_t>((boxes + Config::kLoaders - 1 - warp) /
                                                         Config::kLoaders * box_rows * 2 * kBoxColumns);
  }
}

// Rows, copied by all threads to where the copy engine would have put them; zeros for rows that are nowhere.
// These are accesses of ordinary threads, so the consumers say to the tensor cores' side of memory that they
// have seen them (prefill.h).
template <class Config, bool kValues>
class RowLoader {
 public:
  static constexpr int kArrivals = 64;  // at a tile's barrier: threads
  static constexpr int kPanels = kValues ? Config::kPanelsVO : Config::kPanelsQK;

  // A lane's rows of a KV tile, lane and lane + 32 of the warp's: their pages.
  static constexpr int kWarpRows = Config::kBlockN / 2, kLaneRows = (kWarpRows + 31) / 32;
  struct Pages {
    int of[kLaneRows];
  };
  static_assert(kWarpRows % 8 == 0);

  FI_DEVICE_INLINE RowLoader(const BatchArgs& args, const CUtensorMap&) : args_(args) {}

  FI_DEVICE_INLINE Pages look_up(const BatchTile& tile, int kv_tile) const {
    Pages pages;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i)
      pages.of[i] = row(i) < kWarpRows ? key_page(args_.shape, tile, position(kv_tile, i), 1) : -1;
    return pages;
  }

  FI_DEVICE_INLINE void load(unsigned char* to, Barrier& full, const BatchTile& tile, int kv_tile,
                             Pages pages) {
    constexpr int kPanelBytes = PrefillSmem<Config>::kKvPanelBytes;
    constexpr uint32_t kNowhere = ~0u;
    const CacheRows& cache = kValues ? args_.values : args_.keys;
    uint32_t offsets[kLaneRows];  // in 16 bytes
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int page = checked_page(args_.shape, pages.of[i]);
      offsets[i] = page < 0 ? kNowhere
                            : page * cache.page_step +
                                  key_entry(args_.shape, tile, position(kv_tile, i)) * cache.row_step;
    }
    const unsigned lane = thread_now() % 32, chunk = lane % 8, eighth = lane / 8;
    const char* const head =
        reinterpret_cast<const char*>(cache.base) +
        (static_cast<uint32_t>(tile.kv_head) * uint64_t{cache.head_step} + chunk) * sizeof(uint4);
    // Row r of a panel starts at 128 r, its chunk c of 16 bytes lies at c ^ r % 8: the 128-byte swizzle.
    to += (half_now() * kWarpRows + eighth) * 128;
    // In how many panels a row has this thread's chunk.
    const int row_panels = (cache.row_chunks + 7 - static_cast<int>(chunk)) / 8;
    unsigned char* const places[2] = {to + (chunk ^ eighth) * 16, to + 512 + (chunk ^ (eighth + 4)) * 16};
#pragma unroll
    for (int i = 0; i < kWarpRows / 4; ++i) {
      const uint32_t offset = __shfl_sync(kAllLanes, offsets[i / 8], 4 * (i % 8) + eighth);
      const int panels = offset != kNowhere ? row_panels : 0;
      const char* const from = head + uint64_t{offset != kNowhere ? offset : 0} * sizeof(uint4);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel)
        cp_async_16(places[i % 2] + i / 2 * 1024 + panel * kPanelBytes, from + panel * 2 * kBoxColumns,
                    panel < panels);
    }
    barrier_arrive_after_copies(full);
  }

 private:
  FI_DEVICE_INLINE static int row(int i) { return lane_now() + 32 * i; }
  FI_DEVICE_INLINE static int position(int kv_tile, int i) {
    return kv_tile * Config::kBlockN + half_now() * kWarpRows + row(i);
  }

  const BatchArgs& args_;
};

// A warp of it, where a formula says which KV tiles there are.
template <class Config, bool kValues, class Smem_ = BatchSmem<Config>>
class BatchProducer {
 public:
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  using Smem = Smem_;
  using Loader = std::conditional_t<Config::kByRows, RowLoader<Config, kValues>, BoxLoader<Config, kValues>>;

  FI_DEVICE_INLINE static void run(Smem& smem, const BatchArgs& args, const CUtensorMap& q_map,
                                   const CUtensorMap& packed_q_map, const CUtensorMap& map) {
    auto& ring = ring_of(smem);
    auto& full = kValues ? smem.v_full : smem.k_full;
    auto& empty = kValues ? smem.v_empty : smem.k_empty;
    BatchTile(&prepared)[2] = smem.prepared[threadIdx.x / 32];
    Loader loader(args, map);
    RingPosition<Config::kStages> at;
    // Before the first query tile comes one that is nobody's and has no keys.
    BatchTile* current = &prepared[1];
    if (threadIdx.x % 32 == 0) current->work = {}, current->queue = first_of_queue<kBlockM>(args.shape);
    __syncwarp();
#pragma unroll 1
    for (;;) {
      const BatchTile& tile = *current;
      const bool odd = current == &prepared[1];
      const Range& kv_tiles = tile.work.tiles;
      typename Loader::Pages ahead;
      if (kv_tiles.size() > 0) ahead = loader.look_up(tile, kv_tiles.end - 1);
      if (!kValues && tile.queue.round > 0 && threadIdx.x < 32)
        publish(smem, args, odd, q_map, packed_q_map, tile);
      if (!tile.any()) break;
#pragma unroll 1
      for (int i = kv_tiles.end - 1;; --i) {
        if (i >= kv_tiles.begin) {
          const auto pages = ahead;
          if (i > kv_tiles.begin) ahead = loader.look_up(tile, i - 1);
          barrier_wait(empty[at.stage], at.parity ^ 1);
          loader.load(ring[at.stage], full[at.stage], tile, i, pages);
          at.advance();
        }
        if (i == kv_tiles.end - 1) {
          BatchTile& next = prepared[odd ? 0 : 1];
          __syncwarp();  // no lane is still at the tile that was there
          if (threadIdx.x % 32 == 0)
            next_batch_tile<kBlockM, kBlockN>(args.shape, static_cast<int>(gridDim.x),
                                              static_cast<int>(blockIdx.x), tile.queue, next);
          __syncwarp();
        }
        if (i <= kv_tiles.begin) break;
      }
      current = &prepared[odd ? 0 : 1];
    }
  }

 protected:
  FI_DEVICE_INLINE static auto& ring_of(Smem& smem) {
    if constexpr (kValues) {
      return smem.v;
    } else {
      return smem.k;
    }
  }

  // Tells the consumers of a tile, and brings its queries.
  template <class Tile>
  FI_DEVICE_INLINE static void publish(Smem& smem, const BatchArgs& args, uint32_t parity,
                                       const CUtensorMap& q_map, const CUtensorMap& packed_q_map,
                                       const Tile& tile) {
    // Empty: every consumer has taken the last query tile, and so is done with what was in this place.
    barrier_wait(smem.q_empty, parity ^ 1);
    constexpr int kWords = sizeof(Tile) / sizeof(uint32_t);
    static_assert(kWords <= 32);
    if (threadIdx.x < kWords)
      reinterpret_cast<uint32_t*>(&smem.tiles[parity])[threadIdx.x] =
          reinterpret_cast<const uint32_t*>(&tile)[threadIdx.x];
    __syncwarp();  // lane 0's arrival speaks for all
    if (threadIdx.x != 0) return;
    if (!tile.any() || !has_keys(tile)) return barrier_arrive(smem.q_full);
    const bool packed = tile.packed;
    barrier_arrive_expect(smem.q_full, packed ? args.packed_q_bytes : Config::kPanelsQK * Smem::kQPanelBytes);
    const int row = tile.q_begin + tile.work.q_start, head = tile.work.head;
#pragma unroll
    for (int panel = 0; panel < Config::kPanelsQK; ++panel)
      load_box(smem.q + panel * Smem::kQPanelBytes, packed ? packed_q_map : q_map, panel * kBoxColumns,
               packed ? head : row, packed ? row : head, 0, smem.q_full);
  }
};

}  // namespace fi::cuda::sm90
