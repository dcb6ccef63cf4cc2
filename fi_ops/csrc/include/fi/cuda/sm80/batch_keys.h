// Tiles of a request's keys and values, wherever their pages lie, in shared memory.
//
// The lanes of a warp look up the rows that the warp itself copies, a lane a row. What the page table says of
// a row comes by cp.async into the row's slot, while the tile before is computed; where the row lies takes
// its place there when the copies start. fp8 rows come as they are and are widened in shared memory, each
// piece by the thread that copied it.
#pragma once

#include "fi/batch_attention.h"
#include "fi/cuda/fp8.h"
#include "fi/cuda/sm80/block_rows.h"
#include "fi/cuda/sm80/prefill_tile.h"

namespace fi::cuda {

// C: T, kDimQK, kDimVO, kKeys, kThreads, kFp8.
template <class C>
class BatchKeys {
  using T = typename C::T;
  static constexpr int kRowsOfWarp = C::kKeys / (C::kThreads / 32);
  static constexpr int kUnitBytes = C::kFp8 ? 8 : 16;  // of 8 elements
  static constexpr uint32_t kNowhere = 0xffffffffu;
  static constexpr int kStages = C::kFp8 ? 1 : 2;

  template <int kDim>
  using Share = CopyShare<kDim, C::kThreads>;
  static constexpr int kSteps = C::kKeys / Share<64>::kStep;

  // Of a row: first what the page table says, then offsets in key and value, in units of 8 elements.
  union Slot {
    int64_t wide_page;
    int32_t page;
    uint2 offsets;
  };

 public:
  struct Smem {
    alignas(128) T k[kStages][C::kKeys * C::kDimQK];
    T v[kStages][C::kKeys * C::kDimVO];
    uint2 raw_k[C::kFp8 ? C::kKeys * C::kDimQK / 8 : 1], raw_v[C::kFp8 ? C::kKeys * C::kDimVO / 8 : 1];
    Slot slots[C::kKeys];
    // Rows that the page table places nowhere: [a stage][a warp], a bit for each row of the warp.
    alignas(8) uint16_t nowhere[2][C::kThreads / 32];
    int64_t kv_begin;
    int begin, end;  // the keys that the block needs
  };

  FI_DEVICE_INLINE BatchKeys(const BatchAttentionParams& p, const void* mapped, Smem& smem)
      : p(p), mapped(mapped), smem(smem) {}

  // By one thread, before a barrier.
  FI_DEVICE_INLINE void set_request(const Request& r, const BlockRange& range) {
    smem.kv_begin = r.kv_begin;
    smem.begin = range.begin, smem.end = range.end;
  }
  // By all.
  FI_DEVICE_INLINE void set_head(int64_t kv_head) {
    constexpr int64_t bytes = kUnitBytes / 8;
    key = static_cast<const char*>(p.call.key) + kv_head * p.call.k_stride_h * bytes;
    value = static_cast<const char*>(p.call.value) + kv_head * p.call.v_stride_h * bytes;
  }

  // Starts the look-up of a tile's rows.
  FI_DEVICE_INLINE void look_up(int tile) {
    const int row = row_of_lane(), j = tile * C::kKeys + row;
    if (!p.is_paged() || !has_row(j)) return;
    const Indices& pages = p.table.kv_indices;
    const int64_t at = (smem.kv_begin + j / page_size()) * pages.stride;
    if (pages.wide) {
      cp_async_small<8>(&smem.slots[row], static_cast<const int64_t*>(pages.data) + at);
    } else {
      cp_async_small<4>(&smem.slots[row], static_cast<const int32_t*>(pages.data) + at);
    }
  }

  // Starts the copy of a tile whose look-up has arrived.
  FI_DEVICE_INLINE void load(int tile, int stage) {
    locate(tile, stage);
    __syncwarp();
    load_rows_of<C::kDimQK>(smem.k[C::kFp8 ? 0 : stage], smem.raw_k, key, p.call.head_dim_qk,
                            [](const Slot& slot) { return slot.offsets.x; });
    load_rows_of<C::kDimVO>(smem.v[C::kFp8 ? 0 : stage], smem.raw_v, value, p.call.head_dim_vo,
                            [](const Slot& slot) { return slot.offsets.y; });
    __syncwarp();  // slots are free for the next look-up
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
  FI_DEVICE_INLINE int page_size() const { return static_cast<int>(p.table.page_size); }

  // Of the rows that this warp copies, the one that this lane looks up.
  FI_DEVICE_INLINE int row_of_lane() const {
    const int lane = threadIdx.x % 32;
    return static_cast<int>(threadIdx.x) / 32 * 4 + lane % 4 + lane / 4 * 16;
  }
  FI_DEVICE_INLINE bool has_row(int j) const {
    return static_cast<int>(threadIdx.x % 32) < kRowsOfWarp && j >= smem.begin && j < smem.end;
  }

  FI_DEVICE_INLINE void locate(int tile, int stage) {
    const int row = row_of_lane(), j = tile * C::kKeys + row;
    bool nowhere = false;
    if (has_row(j)) {
      int64_t page = 0, entry = smem.kv_begin + j;
      if (p.is_paged()) {
        page = p.table.kv_indices.wide ? smem.slots[row].wide_page : smem.slots[row].page;
        entry = j % page_size();
        nowhere = page < 0 || page >= p.table.num_pages;
      }
      const int64_t k_at = page * p.k_stride_page + entry * p.call.k_stride_n;
      const int64_t v_at = page * p.v_stride_page + entry * p.call.v_stride_n;
      smem.slots[row].offsets = nowhere
                                    ? uint2{kNowhere, kNowhere}
                                    : uint2{static_cast<uint32_t>(k_at / 8), static_cast<uint32_t>(v_at / 8)};
    } else if (static_cast<int>(threadIdx.x % 32) < kRowsOfWarp) {
      smem.slots[row].offsets = {kNowhere, kNowhere};
    }
    const unsigned bits = __ballot_sync(kAllLanes, nowhere);
    if (threadIdx.x % 32 == 0) smem.nowhere[stage][threadIdx.x / 32] = static_cast<uint16_t>(bits);
  }

  template <int kDim, class Offset>
  FI_DEVICE_INLINE void load_rows_of(T* tile, uint2* raw, const char* head, int64_t head_dim,
                                     const Offset& offset_of) {
    const Share<kDim> share;
    const int chunks = static_cast<int>(head_dim) / 8;
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      const uint32_t at = offset_of(smem.slots[share.row + n * Share<kDim>::kStep]);
      const char* src = head + int64_t{at} * kUnitBytes + share.chunk * kUnitBytes;
#pragma unroll
      for (int panel = 0; panel < Share<kDim>::kPanels; ++panel) {
        const bool valid = at != kNowhere && share.chunk + 8 * panel < chunks;
        const void* from = valid ? src + 8 * panel * kUnitBytes : mapped;
        if constexpr (C::kFp8) {
          cp_async_small<8>(raw + raw_place<kDim>(n, panel), from, valid);
        } else {
          cp_async_16(tile + share.offset(n, panel), from, valid);
        }
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
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (int panel = 0; panel < Share<kDim>::kPanels; ++panel) {
        *reinterpret_cast<uint4*>(tile + share.offset(n, panel)) =
            widen_fp8<T>(raw[raw_place<kDim>(n, panel)], p.kv_dtype);
      }
    }
  }

  const BatchAttentionParams& p;
  const void* mapped;  // any address that may be read: what copies of nothing name
  Smem& smem;
  const char* key;
  const char* value;
};

}  // namespace fi::cuda
