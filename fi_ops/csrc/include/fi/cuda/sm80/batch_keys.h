// Tiles of a request's keys and values, wherever their pages lie, in shared memory.
//
// The lanes of a warp look up the rows that the warp itself copies, a lane a row, two tiles ahead of the
// copies: what the page table says comes by cp.async (look_up), then it becomes offsets (locate), and when
// the copies start (load) the offsets are there. fp8 rows come as they are and are widened in shared memory,
// each piece by the thread that copied it.
#pragma once

#include "fi/cuda/fp8.h"
#include "fi/cuda/sm80/batch.h"
#include "fi/cuda/sm80/block_rows.h"
#include "fi/cuda/sm80/prefill_tile.h"

namespace fi::cuda {

// C: T, kDimQK, kDimVO, kKeys, kThreads, kFp8.
template <class C>
class BatchKeys {
  using T = typename C::T;
  static constexpr int kRowsOfWarp = C::kKeys / (C::kThreads / 32);
  static constexpr int kUnitBytes = C::kFp8 ? 8 : 16;  // of 8 elements
  static constexpr int kStages = C::kFp8 ? 1 : 2;
  // In the place of an offset: not one of the block's keys, or the page table names a page that is not there.
  static constexpr uint32_t kOutside = 0xffffffffu, kNowhere = 0xfffffffeu;

  template <int kDim>
  using Share = CopyShare<kDim, C::kThreads>;
  static constexpr int kSteps = C::kKeys / Share<64>::kStep;

  union Page {
    int64_t wide;
    int32_t narrow;
  };

 public:
  struct Smem {
    alignas(128) T k[kStages][C::kKeys * C::kDimQK];
    T v[kStages][C::kKeys * C::kDimVO];
    uint2 raw_k[C::kFp8 ? C::kKeys * C::kDimQK / 8 : 1], raw_v[C::kFp8 ? C::kKeys * C::kDimVO / 8 : 1];
    Page pages[C::kKeys];     // as the table has them
    uint2 offsets[C::kKeys];  // of rows in key and value, in units of 8 elements
    // Rows that the page table places nowhere: [a stage][a warp], a bit for each row of the warp.
    alignas(8) uint16_t nowhere[2][C::kThreads / 32];
    const char* key;  // of the KV head
    const char* value;
    int64_t kv_begin;
    int begin, end;  // the keys that the block needs
  };

  FI_DEVICE_INLINE BatchKeys(const BatchTilesArgs& args, Smem& smem) : args(args), p(args.p), smem(smem) {}

  // By one thread, before a barrier.
  FI_DEVICE_INLINE void set_block(const Request& r, const BlockRange& range, int64_t kv_head) {
    constexpr int64_t bytes = kUnitBytes / 8;
    smem.key = static_cast<const char*>(p.call.key) + kv_head * p.call.k_stride_h * bytes;
    smem.value = static_cast<const char*>(p.call.value) + kv_head * p.call.v_stride_h * bytes;
    smem.kv_begin = r.kv_begin;
    smem.begin = range.begin, smem.end = range.end;
  }

  // Starts the look-up of a tile's rows.
  FI_DEVICE_INLINE void look_up(int tile) {
    const int row = row_of_lane(), j = tile * C::kKeys + row;
    if (!p.is_paged() || !has_row() || !needs(j)) return;
    const Indices& table = p.table.kv_indices;
    const int64_t at = (smem.kv_begin + args.by_page_size.divide(static_cast<uint32_t>(j))) * table.stride;
    if (table.wide) {
      cp_async_small<8>(&smem.pages[row], static_cast<const int64_t*>(table.data) + at);
    } else {
      cp_async_small<4>(&smem.pages[row], static_cast<const int32_t*>(table.data) + at);
    }
  }

  // Makes offsets of a look-up that has arrived.
  FI_DEVICE_INLINE void locate(int tile) {
    if (has_row()) smem.offsets[row_of_lane()] = offsets_of(tile * C::kKeys + row_of_lane());
  }

  // Starts the copy of the tile that was located last.
  FI_DEVICE_INLINE void load(int stage) {
    __syncwarp();
    const uint32_t own = has_row() ? smem.offsets[row_of_lane()].x : 0;
    const unsigned nowhere = __ballot_sync(kAllLanes, own == kNowhere);
    if (threadIdx.x % 32 == 0) smem.nowhere[stage][threadIdx.x / 32] = static_cast<uint16_t>(nowhere);
    const bool is_whole = !__any_sync(kAllLanes, own >= kNowhere) && p.call.head_dim_qk == C::kDimQK &&
                          p.call.head_dim_vo == C::kDimVO;
    is_whole ? copy<true>(stage) : copy<false>(stage);
    __syncwarp();  // offsets are free
  }

  // fp8: what has arrived takes its place in the tile. Needs barriers before and after it.
  FI_DEVICE_INLINE void widen() {
    widen_rows<C::kDimQK>(smem.k[0], smem.raw_k);
    widen_rows<C::kDimVO>(smem.v[0], smem.raw_v);
  }

  FI_DEVICE_INLINE T* k(int stage) const { return smem.k[C::kFp8 ? 0 : stage]; }
  FI_DEVICE_INLINE T* v(int stage) const { return smem.v[C::kFp8 ? 0 : stage]; }

  FI_DEVICE_INLINE bool all_somewhere(int stage) const {
    const uint2 bits = *reinterpret_cast<const uint2*>(smem.nowhere[stage]);
    return (bits.x | bits.y) == 0;
  }
  FI_DEVICE_INLINE bool is_nowhere(int stage, int row) const {
    return smem.nowhere[stage][row % 16 / 4] >> (row % 4 + row / 16 * 4) & 1;
  }

 private:
  // Of the rows that this warp copies, the one that this lane looks up.
  FI_DEVICE_INLINE int row_of_lane() const {
    const int lane = threadIdx.x % 32;
    return static_cast<int>(threadIdx.x) / 32 * 4 + lane % 4 + lane / 4 * 16;
  }
  FI_DEVICE_INLINE bool has_row() const { return static_cast<int>(threadIdx.x % 32) < kRowsOfWarp; }
  FI_DEVICE_INLINE bool needs(int j) const { return j >= smem.begin && j < smem.end; }

  FI_DEVICE_INLINE uint2 offsets_of(int j) const {
    if (!needs(j)) return {kOutside, kOutside};
    if (!p.is_paged()) {
      const auto entry = static_cast<uint32_t>(smem.kv_begin) + static_cast<uint32_t>(j);
      return {entry * args.k_units.row, entry * args.v_units.row};
    }
    const Page page = smem.pages[row_of_lane()];
    const int64_t index = p.table.kv_indices.wide ? page.wide : page.narrow;
    if (index < 0 || index >= p.table.num_pages) return {kNowhere, kNowhere};
    const auto nth = static_cast<uint32_t>(index);
    const uint32_t entry = static_cast<uint32_t>(j) - args.by_page_size.divide(static_cast<uint32_t>(j)) *
                                                          static_cast<uint32_t>(p.table.page_size);
    return {nth * args.k_units.page + entry * args.k_units.row,
            nth * args.v_units.page + entry * args.v_units.row};
  }

  // kWhole: all of the tile is there.
  template <bool kWhole>
  FI_DEVICE_INLINE void copy(int stage) {
    const int row = Share<64>().row, chunk = Share<64>().chunk;
    const char *key = smem.key + chunk * kUnitBytes, *value = smem.value + chunk * kUnitBytes;
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      const uint2 at = smem.offsets[row + n * Share<64>::kStep];
      const bool there = kWhole || at.x < kNowhere;
      copy_row<C::kDimQK, kWhole>(k(stage), smem.raw_k, n, key + int64_t{at.x} * kUnitBytes, there,
                                  p.call.head_dim_qk);
      copy_row<C::kDimVO, kWhole>(v(stage), smem.raw_v, n, value + int64_t{at.y} * kUnitBytes, there,
                                  p.call.head_dim_vo);
    }
  }

  template <int kDim, bool kWhole>
  FI_DEVICE_INLINE void copy_row(T* tile, uint2* raw, int n, const char* src, bool there, int64_t head_dim) {
    const Share<kDim> share;
#pragma unroll
    for (int panel = 0; panel < Share<kDim>::kPanels; ++panel) {
      const bool valid = kWhole || (there && share.chunk * 8 + 64 * panel < head_dim);
      const void* from = src + 8 * panel * kUnitBytes;
      if (!valid) from = args.plan.header;  // not read, but it may be
      if constexpr (C::kFp8) {
        cp_async_small<8>(raw + raw_place<kDim>(n, panel), from, valid);
      } else if constexpr (kWhole) {
        cp_async_16(tile + share.offset(n, panel), from);
      } else {
        cp_async_16(tile + share.offset(n, panel), from, valid);
      }
    }
  }

  template <int kDim>
  FI_DEVICE_INLINE int raw_place(int n, int panel) const {
    return (n * Share<kDim>::kPanels + panel) * C::kThreads + static_cast<int>(threadIdx.x);
  }

  template <int kDim>
  FI_DEVICE_INLINE void widen_rows(T* tile, const uint2* raw) {
    const Share<kDim> share;
    constexpr int kPanels = Share<kDim>::kPanels, kStepsAtOnce = kPanels < 4 ? 4 / kPanels : 1;
#pragma unroll kStepsAtOnce  // registers are short
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        *reinterpret_cast<uint4*>(tile + share.offset(n, panel)) =
            widen_fp8<T>(raw[raw_place<kDim>(n, panel)], p.kv_dtype);
      }
    }
  }

  const BatchTilesArgs& args;
  const BatchAttentionParams& p;
  Smem& smem;
};

}  // namespace fi::cuda
