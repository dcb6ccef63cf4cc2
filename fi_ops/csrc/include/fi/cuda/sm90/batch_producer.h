// The producers of a batch: they find out which query tile is next, tell the consumers, and bring its keys,
// by the copy engine where a page holds enough of them, else row by row.
//
// What is looked up in memory is asked for before it is needed: a query tile while the one before is worked
// on, the pages of keys two KV tiles ahead. Registers are short: what describes a query tile stays in shared
// memory.
#pragma once

#include "fi/cuda/sm90/prefill_config.h"
#include "fi/cuda/sm90/prefill_producer.h"
#include "fi/cuda/sm90/wgmma.h"

namespace fi::cuda::sm90 {

// threadIdx.x, read anew, for what would otherwise be computed once and kept.
FI_DEVICE_INLINE int thread_now() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(thread));
  return thread;
}

// One warp starts copies of box_rows keys each. Boxes of pages that are not there lie outside of the tensor
// and arrive as zeros.
template <class Config>
class BoxLoader {
 public:
  static constexpr int kWarps = 1;

  FI_DEVICE_INLINE BoxLoader(const BatchArgs& args, const CUtensorMap& k_map, const CUtensorMap& v_map)
      : args_(args), k_map_(k_map), v_map_(v_map) {}

  // The page of this lane's part of a KV tile: of its box.
  FI_DEVICE_INLINE int look_up(const BatchTile& at, int kv_tile) const {
    return lane() * args_.box_rows < Config::kBlockN ? key_page(args_.shape, at, position(kv_tile)) : -1;
  }

  FI_DEVICE_INLINE void wait_empty(Barrier& empty, uint32_t parity) { barrier_wait(empty, parity); }
  FI_DEVICE_INLINE void finish() {}

  FI_DEVICE_INLINE void load_keys(unsigned char* to, Barrier& full, const BatchTile& at, int kv_tile,
                                  int page) {
    load(to, full, k_map_, at, kv_tile, page);
  }
  FI_DEVICE_INLINE void load_values(unsigned char* to, Barrier& full, const BatchTile& at, int kv_tile,
                                    int page) {
    load(to, full, v_map_, at, kv_tile, page);
  }

 private:
  FI_DEVICE_INLINE static int lane() { return thread_now() % 32; }
  FI_DEVICE_INLINE int position(int kv_tile) const {
    return kv_tile * Config::kBlockN + lane() * args_.box_rows;
  }

  FI_DEVICE_INLINE void load(unsigned char* to, Barrier& full, const CUtensorMap& map, const BatchTile& at,
                             int kv_tile, int page) {
    constexpr int kPanelBytes = PrefillSmem<Config>::kKvPanelBytes;
    const int entry = key_entry(args_.shape, at, position(kv_tile)), kv_head = at.kv_head;
    page = checked_page(args_.shape, page);
    if (lane() == 0) barrier_arrive_expect(full, Config::kPanels * kPanelBytes);
#pragma unroll 1
    for (int box = 0, row = 0; row < Config::kBlockN; ++box, row += args_.box_rows) {
      const int box_page = __shfl_sync(kAllLanes, page, box);
      const int box_entry = __shfl_sync(kAllLanes, entry, box);
      if (lane() == 0) {
#pragma unroll
        for (int panel = 0; panel < Config::kPanels; ++panel)
          load_box(to + panel * kPanelBytes + row * 128, map, panel * kBoxColumns, box_entry, kv_head,
                   box_page, full);
      }
    }
  }

  const BatchArgs& args_;
  const CUtensorMap &k_map_, &v_map_;
};

// Four warps copy a quarter of a tile's rows each, into the places that the copy engine would have put them.
// These are copies of ordinary threads: when they have arrived, each thread says so to the tensor cores' side
// of memory, then a lane of each warp to the consumers. That of a tile is put off until the next one's copies
// are under way, or until there is nothing else to do.
template <class Config>
class RowLoader {
 public:
  static constexpr int kWarps = 4;

  FI_DEVICE_INLINE RowLoader(const BatchArgs& args, const CUtensorMap&, const CUtensorMap&) : args_(args) {}

  // The page of this lane's part of a KV tile: of its row.
  FI_DEVICE_INLINE int look_up(const BatchTile& at, int kv_tile) const {
    return lane() < kWarpRows ? key_page(args_.shape, at, position(kv_tile)) : -1;
  }

  FI_DEVICE_INLINE void wait_empty(Barrier& empty, uint32_t parity) {
    if (pending_ != 0 && !__all_sync(kAllLanes, barrier_test(empty, parity))) finish();
    barrier_wait(empty, parity);
  }
  FI_DEVICE_INLINE void finish() {
    if (pending_ == 0) return;
    cp_async_wait<0>();
    hand_over();
    pending_ = 0;
  }

  FI_DEVICE_INLINE void load_keys(unsigned char* to, Barrier& full, const BatchTile& at, int kv_tile,
                                  int page) {
    const AttentionParams& p = args_.p;
    load(to, full, at, kv_tile, page, p.key, args_.k_stride_page, p.k_stride_n, p.k_stride_h);
  }
  FI_DEVICE_INLINE void load_values(unsigned char* to, Barrier& full, const BatchTile& at, int kv_tile,
                                    int page) {
    const AttentionParams& p = args_.p;
    load(to, full, at, kv_tile, page, p.value, args_.v_stride_page, p.v_stride_n, p.v_stride_h);
  }

 private:
  static constexpr int kWarpRows = Config::kBlockN / kWarps;
  static_assert(kWarpRows % 4 == 0 && kWarpRows <= 32);

  FI_DEVICE_INLINE static int lane() { return thread_now() % 32; }
  FI_DEVICE_INLINE static int first_row() { return thread_now() / 32 * kWarpRows; }
  FI_DEVICE_INLINE static int position(int kv_tile) {
    return kv_tile * Config::kBlockN + first_row() + lane();
  }

  FI_DEVICE_INLINE void load(unsigned char* to, Barrier& full, const BatchTile& at, int kv_tile, int page,
                             const void* base, int64_t stride_page, int64_t stride_n, int64_t stride_h) {
    using T = typename Config::T;
    page = checked_page(args_.shape, page);
    const int64_t offset =
        page < 0 ? -1 : page * stride_page + key_entry(args_.shape, at, position(kv_tile)) * stride_n;
    const int chunk = lane() % 8;
    const T* const head = static_cast<const T*>(base) + at.kv_head * stride_h + chunk * 8;
#pragma unroll 2
    for (int first = 0; first < kWarpRows; first += 4) {
      const int row = first_row() + first + lane() / 8;
      const int64_t row_offset = __shfl_sync(kAllLanes, offset, first + lane() / 8);
      const bool valid = row_offset >= 0;
      const T* const from = head + (valid ? row_offset : 0);
      unsigned char* const row_to = to + row * 128 + (chunk ^ row % 8) * 16;
#pragma unroll
      for (int panel = 0; panel < Config::kPanels; ++panel)
        cp_async_16(row_to + panel * PrefillSmem<Config>::kKvPanelBytes, from + panel * kBoxColumns, valid);
    }
    cp_async_commit();
    if (pending_ != 0) {
      cp_async_wait<1>();
      hand_over();
    }
    pending_ = smem_address(&full);
  }

  FI_DEVICE_INLINE void hand_over() {
    fence_for_products();
    __syncwarp();
    if (lane() == 0) barrier_arrive(pending_);
  }

  const BatchArgs& args_;
  uint32_t pending_ = 0;  // the barrier of the last tile copied, which nobody was told of yet; 0: none
};

template <class Config, class Loader>
class BatchProducer {
 public:
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN;
  using Smem = BatchSmem<Config>;

  // By Loader::kWarps warps, of which the first brings the queries.
  FI_DEVICE_INLINE static void run(Smem& smem, const BatchArgs& args, const CUtensorMap& q_map,
                                   const CUtensorMap& k_map, const CUtensorMap& v_map) {
    BatchTile(&prepared)[2] = smem.prepared[Loader::kWarps == 1 ? 0 : threadIdx.x / 32];
    Loader loader(args, k_map, v_map);
    RingPosition<Config::kStages> v_at;
    int next_page = -1;
    // Before the first query tile comes one that is nobody's and has no keys.
    BatchTile* at = &prepared[1];
    if (threadIdx.x % 32 == 0) at->work = {}, at->queue = {};
    __syncwarp();
#pragma unroll 1
    for (;;) {
      const BatchTile& tile = *at;
      const bool odd = at == &prepared[1];
      if (tile.queue.round > 0 && threadIdx.x < 32) publish(smem, loader, odd, q_map, tile);
      if (!tile.any()) break;
      // Keys of tile i - 1, then values of tile i: in the order in which they are needed.
      const Range& kv_tiles = tile.work.tiles;
      int page = -1, ahead = next_page;
#pragma unroll 1
      for (int i = kv_tiles.end;; --i) {
        const int values_page = page;
        page = ahead;
        if (i - 1 > kv_tiles.begin) ahead = loader.look_up(tile, i - 2);
        if (i > kv_tiles.begin) {
          RingPosition<Config::kStages> k_at = v_at;
          if (i < kv_tiles.end) k_at.advance();
          loader.wait_empty(smem.k_empty[k_at.stage], k_at.parity ^ 1);
          loader.load_keys(smem.k[k_at.stage], smem.k_full[k_at.stage], tile, i - 1, page);
        }
        if (i < kv_tiles.end) {
          loader.wait_empty(smem.v_empty[v_at.stage], v_at.parity ^ 1);
          loader.load_values(smem.v[v_at.stage], smem.v_full[v_at.stage], tile, i, values_page);
          v_at.advance();
        }
        if (i == kv_tiles.end - 1 || kv_tiles.size() == 0) {
          loader.finish();  // what follows takes a while
          BatchTile& next = prepared[odd ? 0 : 1];
          __syncwarp();  // no lane is still at the tile that was there
          if (threadIdx.x % 32 == 0)
            next_batch_tile<kBlockM, kBlockN>(args.shape, static_cast<int>(gridDim.x),
                                              static_cast<int>(blockIdx.x), tile.queue, next);
          __syncwarp();
          if (next.work.tiles.size() > 0) next_page = loader.look_up(next, next.work.tiles.end - 1);
        }
        if (i <= kv_tiles.begin) break;
      }
      at = &prepared[odd ? 0 : 1];
    }
    loader.finish();
  }

 private:
  // Tells the consumers of a tile, and brings its queries.
  FI_DEVICE_INLINE static void publish(Smem& smem, Loader& loader, uint32_t parity, const CUtensorMap& q_map,
                                       const BatchTile& tile) {
    // Empty: every consumer has taken the last query tile, and so is done with what was in this place.
    loader.wait_empty(smem.q_empty, parity ^ 1);
    constexpr int kWords = sizeof(BatchTile) / sizeof(uint32_t);
    static_assert(kWords <= 32);
    if (threadIdx.x < kWords)
      reinterpret_cast<uint32_t*>(&smem.tiles[parity])[threadIdx.x] =
          reinterpret_cast<const uint32_t*>(&tile)[threadIdx.x];
    __syncwarp();  // lane 0's arrival speaks for all
    if (threadIdx.x != 0) return;
    if (tile.any() && tile.work.tiles.size() > 0) {
      start_load<Config>(smem.q, smem.q_full, q_map, tile.q_begin + tile.work.q_start, tile.work.head, 0,
                         Smem::kQPanelBytes);
    } else {
      barrier_arrive(smem.q_full);
    }
  }
};

}  // namespace fi::cuda::sm90
