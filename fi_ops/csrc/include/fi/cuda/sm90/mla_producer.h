// The producers of latent attention: they find the block's pieces and bring their keys. One warp does where
// the copy engine brings pages, else four, each its share of a tile's rows.
//
// Half a tile is brought as soon as its place is free (mla_consumer.h says who frees it), and what comes two
// tiles later is fetched into L2 by then: two tiles are all that shared memory holds, too few for memory's
// latency.
#pragma once

#include "fi/cuda/cluster.h"
#include "fi/cuda/fp8.h"
#include "fi/cuda/sm90/mla_ptx.h"
#include "fi/cuda/sm90/mla_schedule.h"
#include "fi/cuda/sm90/wgmma.h"

namespace fi::cuda::sm90 {

// Where a key lies: page -1 is nowhere.
struct MlaKey {
  int page, entry;
};

FI_DEVICE_INLINE MlaKey mla_key(const MlaArgs& args, const MlaPiece& piece, int position) {
  const PageTable& table = args.p.batch.table;
  if (position >= piece.kv_len) return {-1, 0};
  const int nth = static_cast<int>(args.by_page_size.divide(static_cast<uint32_t>(position)));
  const int64_t page = table.kv_indices.at(int64_t{piece.kv_begin} + nth);
  const bool exists = page >= 0 && page < table.num_pages;
  return {exists ? static_cast<int>(page) : -1, position - nth * static_cast<int>(table.page_size)};
}

// Boxes of box_rows keys and 64 columns, one a lane. Those of pages that are nowhere lie outside of the
// tensor and arrive as zeros. With kShared block r of the cluster brings half r of each tile for both.
template <bool kShared>
class MlaBoxes {
 public:
  static constexpr int kWarps = 1, kArrivals = 1;

  FI_DEVICE_INLINE MlaBoxes(const MlaArgs& args, const CUtensorMap& ckv, const CUtensorMap& kpe)
      : args_(args), ckv_(ckv), kpe_(kpe), boxes_(kMlaKeys / args.box_rows) {}

  // The lane's key of a tile, of those that begin a box.
  FI_DEVICE_INLINE MlaKey look_up(const MlaPiece& piece, int tile) const {
    const int box = threadIdx.x % 32;
    return box < boxes_ ? mla_key(args_, piece, tile * kMlaKeys + box * args_.box_rows) : MlaKey{-1, 0};
  }

  // Once the place is empty (`parity` as of a RingPosition).
  template <bool kWithKpe>
  FI_DEVICE_INLINE void load(unsigned char* place, Barrier& full, Barrier& empty, uint32_t parity,
                             const MlaKey& key, int half) const {
    constexpr int kPanels = kMlaHalfPanels + kWithKpe;
    static_assert(kPanels * kMlaKeys / kMlaMinBoxRows <= 32);
    const bool mine = !kShared || half == static_cast<int>(cluster_rank());
    // What the other block brings is expected once what it brought before is there.
    mine ? barrier_wait(empty, parity ^ 1) : barrier_wait(full, parity ^ 1);
    __syncwarp();  // the other block's boxes may end the phase as soon as it is expected
    if (threadIdx.x == 0) barrier_arrive_expect(full, kPanels * kMlaPanelBytes);
    __syncwarp();
    if (!mine) return;
    const int box = threadIdx.x / kPanels, nth = threadIdx.x % kPanels;
    const int page = __shfl_sync(kAllLanes, key.page, box), entry = __shfl_sync(kAllLanes, key.entry, box);
    if (box < boxes_) {
      const bool is_kpe = nth == kMlaHalfPanels;
      const int panel = is_kpe ? kMlaKpePanel : half * kMlaHalfPanels + nth;
      (kShared ? load_box_for_both : load_box)(place + panel * kMlaPanelBytes + box * args_.box_rows * 128,
                                               is_kpe ? kpe_ : ckv_, is_kpe ? 0 : panel * kBoxColumns, entry,
                                               0, page, full);
    }
  }

  // The ranks share the work.
  FI_DEVICE_INLINE void prefetch(const MlaKey& key) const {
    const int rank = blockIdx.x % args_.ranks;
    for (int i = threadIdx.x; i < (kMlaPanels * boxes_ + 31) / 32 * 32; i += 32) {
      const int box = i / kMlaPanels, panel = i % kMlaPanels;
      const int page = __shfl_sync(kAllLanes, key.page, box), entry = __shfl_sync(kAllLanes, key.entry, box);
      if (box >= boxes_ || page < 0 || panel % args_.ranks != rank) continue;
      const bool is_kpe = panel == kMlaKpePanel;
      prefetch_box(is_kpe ? kpe_ : ckv_, is_kpe ? 0 : panel * kBoxColumns, entry, 0, page);
    }
  }

 private:
  const MlaArgs& args_;
  const CUtensorMap &ckv_, &kpe_;
  int boxes_;  // of a tile, one below the other
};

// Rows, copied by all threads to where the copy engine would have put them; zeros for rows that are nowhere.
// With kFp8 they are widened on the way.
template <class T, bool kFp8>
class MlaRowCopies {
 public:
  static constexpr int kWarps = 4, kArrivals = kWarpgroupThreads;

  FI_DEVICE_INLINE MlaRowCopies(const MlaArgs& args, const CUtensorMap&, const CUtensorMap&) : args_(args) {}

  // The lane's row of the 16 that its warp brings, in the lower lanes.
  FI_DEVICE_INLINE MlaKey look_up(const MlaPiece& piece, int tile) const {
    const int row = threadIdx.x % 32;
    return row < kWarpRows ? mla_key(args_, piece, tile * kMlaKeys + warp() * kWarpRows + row)
                           : MlaKey{-1, 0};
  }

  template <bool kWithKpe>
  FI_DEVICE_INLINE void load(unsigned char* place, Barrier& full, Barrier& empty, uint32_t parity,
                             const MlaKey& key, int half) const {
    const int first_panel = half * kMlaHalfPanels;
    barrier_wait(empty, parity ^ 1);
    if constexpr (kFp8) {
      // Two rows' 16 chunks of 16 values a step; what is loaded is four panels, or one.
      load_fp8<kMlaHalfPanels>(place, args_.ckv, key, first_panel * kBoxColumns / 16, first_panel);
      if constexpr (kWithKpe) load_fp8<1>(place, args_.kpe, key, 0, kMlaKpePanel);
      fence_for_products();
      barrier_arrive(full);
    } else {
#pragma unroll
      for (int i = 0; i < kWarpRows / 4; ++i) {
        const int row = 4 * i + threadIdx.x % 32 / 8, chunk = threadIdx.x % 8;
        const int page = __shfl_sync(kAllLanes, key.page, row),
                  entry = __shfl_sync(kAllLanes, key.entry, row);
        const bool valid = page >= 0;
        unsigned char* const to = place + (warp() * kWarpRows + row) * 128 + (chunk ^ row % 8) * 16;
        const uint4* from = source(args_.ckv, page, entry) + chunk;
#pragma unroll
        for (int n = 0; n < kMlaHalfPanels; ++n)
          cp_async_16(to + (first_panel + n) * kMlaPanelBytes, from + 8 * (first_panel + n), valid);
        if constexpr (kWithKpe)
          cp_async_16(to + kMlaKpePanel * kMlaPanelBytes, source(args_.kpe, page, entry) + chunk, valid);
      }
      barrier_arrive_after_copies(full);
    }
  }

  FI_DEVICE_INLINE void prefetch(const MlaKey& key) const {
    constexpr int kBytes = kFp8 ? 1 : 2;
    if (key.page < 0) return;
    if (args_.ranks > 1 &&
        static_cast<int>(threadIdx.x % args_.ranks) != static_cast<int>(blockIdx.x % args_.ranks))
      return;
    prefetch_l2(source(args_.ckv, key.page, key.entry), kCkvDim * kBytes);
    prefetch_l2(source(args_.kpe, key.page, key.entry), kKpeDim * kBytes);
  }

 private:
  static constexpr int kWarpRows = kMlaKeys / kWarps;

  FI_DEVICE_INLINE static int warp() { return threadIdx.x / 32; }
  FI_DEVICE_INLINE static const uint4* source(const CacheRows& cache, int page, int entry) {
    return cache.base + (page < 0 ? 0
                                  : uint32_t(page) * uint64_t{cache.page_step} +
                                        uint32_t(entry) * uint64_t{cache.row_step});
  }

  // kPanels panels from chunk `first_chunk` of 16 values on.
  template <int kPanels>
  FI_DEVICE_INLINE void load_fp8(unsigned char* place, const CacheRows& cache, const MlaKey& key,
                                 int first_chunk, int first_panel) const {
    constexpr int kChunks = 4 * kPanels, kRowsAtOnce = 32 / kChunks < 1 ? 1 : 32 / kChunks;
    const int lane = threadIdx.x % 32, chunk = lane % kChunks;
    constexpr int kSteps = kWarpRows / kRowsAtOnce, kAtOnce = kSteps < 4 ? kSteps : 4;
#pragma unroll 1  // as many loads in flight as there are registers for
    for (int first = 0; first < kSteps; first += kAtOnce) {
      uint4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = (first + i) * kRowsAtOnce + lane / kChunks;
        const int page = __shfl_sync(kAllLanes, key.page, row),
                  entry = __shfl_sync(kAllLanes, key.entry, row);
        x[i] = {0, 0, 0, 0};
        if (page >= 0) x[i] = load_streaming_16(source(cache, page, entry) + first_chunk + chunk);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = (first + i) * kRowsAtOnce + lane / kChunks;
        unsigned char* const to =
            place + (first_panel + chunk / 4) * kMlaPanelBytes + (warp() * kWarpRows + row) * 128;
        const int at = chunk % 4 * 2;
        const Fp8 format = args_.p.batch.kv_dtype;
        *reinterpret_cast<uint4*>(to + (at ^ row % 8) * 16) = widen_fp8<T>(uint2{x[i].x, x[i].y}, format);
        *reinterpret_cast<uint4*>(to + ((at + 1) ^ row % 8) * 16) =
            widen_fp8<T>(uint2{x[i].z, x[i].w}, format);
      }
    }
  }

  const MlaArgs& args_;
};

template <class T, MlaCopies kCopies>
class MlaProducer {
 public:
  using Loader = std::conditional_t<kCopies == MlaCopies::kBoxes || kCopies == MlaCopies::kSharedBoxes,
                                    MlaBoxes<kCopies == MlaCopies::kSharedBoxes>,
                                    MlaRowCopies<T, kCopies == MlaCopies::kFp8>>;

  // By Loader::kWarps warps.
  FI_DEVICE_INLINE static void run(MlaSmem& smem, const MlaArgs& args, const MlaShare& share,
                                   const CUtensorMap& ckv, const CUtensorMap& kpe) {
    Loader loader(args, ckv, kpe);
    RingPosition<2> at;
    uint32_t parities = 0;  // of the places, a bit each
    if (threadIdx.x < 32) {
      MlaPieces pieces(smem, args, share);
      for (;;) {
        MlaPiece piece;
        const bool any = pieces.next(piece);
        if (!any) piece.num_rows = -1;
        barrier_wait(smem.pieces_empty[at.stage], at.parity ^ 1);
        if (threadIdx.x == 0) {
          smem.pieces[at.stage] = piece;
          barrier_arrive(smem.pieces_full[at.stage]);
        }
        __syncwarp();
        if (!any) break;
        bring(smem, loader, smem.pieces[at.stage], parities);
        at.advance();
      }
    } else {
      for (;;) {
        barrier_wait(smem.pieces_full[at.stage], at.parity);
        const MlaPiece& piece = smem.pieces[at.stage];
        if (piece.num_rows < 0) break;
        bring(smem, loader, piece, parities);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(smem.pieces_empty[at.stage]);
        at.advance();
      }
    }
  }

 private:
  static constexpr int kAhead = 2;  // tiles that are in L2 before they are asked for

  FI_DEVICE_INLINE static void bring(MlaSmem& smem, const Loader& loader, const MlaPiece& piece,
                                     uint32_t& parities) {
    const int first = piece.first_tile, tiles = piece.num_tiles;
    if (tiles == 0) return;
    MlaKey keys[kAhead + 1];
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) keys[i] = loader.look_up(piece, first + i);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile + kAhead < tiles) loader.prefetch(keys[kAhead]);
      const MlaKey next = loader.look_up(piece, first + tile + kAhead + 1);
      const int place = tile % 2;
      const int other = 1 - place;
      const uint32_t parity = parities >> place & 1;
      loader.template load<false>(smem.kv[place], smem.full[place][place], smem.empty[place][place], parity,
                                  keys[0], place);
      loader.template load<true>(smem.kv[place], smem.full[place][other], smem.empty[place][other], parity,
                                 keys[0], other);
      parities ^= 1 << place;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) keys[i] = keys[i + 1];
      keys[kAhead] = next;
    }
  }
};

}  // namespace fi::cuda::sm90
