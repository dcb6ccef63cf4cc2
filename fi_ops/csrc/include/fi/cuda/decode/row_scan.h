// The scan of a mask that has one row for all queries of a batch entry, by each block for itself: sooner
// there than a list from another kernel. The rules are those of live_tiles.h.
#pragma once

#include "fi/cuda/decode/live_tiles.h"
#include "fi/cuda/decode/plan.h"

namespace fi::cuda::decode {

inline constexpr int kMaxScanned = 512;  // tiles: 32k keys

// Whether RowScan takes the call's mask.
inline bool row_scan_takes(const AttentionParams& p) {
  const int64_t bytes = p.mask_dtype == DType::boolean ? 1 : p.mask_dtype == DType::f32 ? 4 : 2;
  return (p.batch == 1 || p.mask_stride_b * bytes % 16 == 0) &&
         (p.num_qo_heads == 1 || p.mask_stride_h == 0) &&
         (p.qo_len == 1 || (p.mask_stride_q == 0 && !p.causal && p.window_left < 0)) &&
         (p.kv_len == 1 || p.mask_stride_k == 1) && p.kv_len <= kMaxScanned * kTileKeys &&
         reinterpret_cast<uintptr_t>(p.mask) % 16 == 0;
}

struct RowScanShared {
  uint8_t states[kMaxScanned];  // of each tile: kIsLive, kIsOpen, kIsHigh
  float top[kMaxWarps];
};

// The live tiles of a row, 32 tiles a lane. A block's warps have the same ones, each for itself: one barrier
// does for the scan, and no warp writes a list that others wait for.
class LiveTiles {
 public:
  // Of batch entry b among `keys`, which holds at least one. By all threads of the block; has a barrier.
  // kBoolean: the mask's dtype is known.
  template <bool kBoolean>
  FI_DEVICE_INLINE void find(const AttentionParams& p, int b, KeyRange keys, RowScanShared& shared) {
    first_ = keys.begin / kTileKeys;
    if constexpr (kBoolean) {
      scan<uint8_t>(p, b, keys, shared);
    } else {
      with_mask_type(p.mask_dtype, [&]<class M>(const M*) { scan<M>(p, b, keys, shared); });
    }
    __syncthreads();
    collect<kBoolean>(p, tiles_of(keys), shared);
  }

  FI_DEVICE_INLINE int count() const { return count_; }

  // The n-th of them, as tile_entry has it. For all lanes of the warp.
  FI_DEVICE_INLINE int32_t entry(int n) const {
    const bool mine = before_ <= n && n < before_ + __popc(live_);
    const int lane = __ffs(__ballot_sync(~0u, mine)) - 1;
    unsigned live = __shfl_sync(~0u, live_, lane);
    const unsigned open = __shfl_sync(~0u, open_, lane);
    int left = n - __shfl_sync(~0u, before_, lane), tile = 0;  // the bit with `left` live ones below it
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
      const int below = __popc(live & ((1u << half) - 1u));
      if (left >= below) left -= below, live >>= half, tile += half;
    }
    return tile_entry(first_ + lane * 32 + tile, open >> tile & 1);
  }

 private:
  static constexpr int kIsLive = 1, kIsOpen = 2, kIsHigh = 4;  // high: more than a negligible value

  template <class M>
  FI_DEVICE_INLINE void scan(const AttentionParams& p, int b, KeyRange keys, RowScanShared& shared) const {
    constexpr int kValues = 16 / sizeof(M), kLanes = kTileKeys / kValues;  // lanes a tile
    constexpr int kAtOnce = 2;                                             // loads in flight
    constexpr unsigned kTileLanes = (1u << kLanes) - 1u;
    const M* row = static_cast<const M*>(p.mask) + b * p.mask_stride_b;
    const int lane = threadIdx.x % 32, num = tiles_of(keys) * kLanes;
    const float low = negligible(p.mask_dtype);

    float row_top = -kInf;
#pragma unroll 1
    for (int start = threadIdx.x; start - lane < num; start += kAtOnce * static_cast<int>(blockDim.x)) {
      uint4 values[kAtOnce];
      KeyRange part[kAtOnce];
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int key = first_ * kTileKeys + (start + n * static_cast<int>(blockDim.x)) * kValues;
        part[n] = {max(key, keys.begin), min(key + kValues, keys.end)};
        if (part[n].end - part[n].begin == kValues) values[n] = load_streaming_16(row + key);
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int at = start + n * static_cast<int>(blockDim.x);
        if (at - lane >= num) break;
        Summary s;
        if (part[n].end - part[n].begin == kValues) {
          s = summarize<M>(values[n]);
        } else {
#pragma unroll 1
          for (int key = part[n].begin; key < part[n].end; ++key) s.add(mask_value(row[key]));
        }
        const bool is_empty = part[n].begin >= part[n].end;
        const unsigned lives = __ballot_sync(~0u, s.top > -kInf), highs = __ballot_sync(~0u, s.top > low);
        const unsigned opens = __ballot_sync(~0u, is_empty || (s.top == 0.0f && s.bottom == 0.0f));
        row_top = fmaxf(row_top, s.top);
        const unsigned tile = kTileLanes << lane;  // of the first of its lanes
        if (lane % kLanes == 0 && at < num)
          shared.states[at / kLanes] =
              static_cast<uint8_t>((lives & tile ? kIsLive : 0) | ((opens & tile) == tile ? kIsOpen : 0) |
                                   (highs & tile ? kIsHigh : 0));
      }
    }
    if constexpr (!__is_same(M, uint8_t)) {
#pragma unroll
      for (int other = 16; other > 0; other /= 2)
        row_top = fmaxf(row_top, __shfl_xor_sync(~0u, row_top, other));
      if (lane == 0) shared.top[threadIdx.x / 32] = row_top;
    }
  }

  template <bool kBoolean>
  FI_DEVICE_INLINE void collect(const AttentionParams& p, int num_tiles, const RowScanShared& shared) {
    const int lane = threadIdx.x % 32;
    int needed = kIsLive;
    if (!kBoolean && p.mask_dtype != DType::boolean) {
      float row_top = -kInf;
#pragma unroll 1
      for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) row_top = fmaxf(row_top, shared.top[w]);
      // The row doesn't live on negligible values alone.
      if (row_top == -kInf || row_top > 0.5f * negligible(p.mask_dtype)) needed = kIsLive | kIsHigh;
    }
#pragma unroll 1
    for (int word = 0; word * 32 < num_tiles; ++word) {
      const int tile = word * 32 + lane, state = tile < num_tiles ? shared.states[tile] : 0;
      const unsigned live = __ballot_sync(~0u, (state & needed) == needed);
      const unsigned open = __ballot_sync(~0u, state & kIsOpen);
      if (lane == word) live_ = live, open_ = open, before_ = count_;
      count_ += __popc(live);
    }
  }

  int first_ = 0, count_ = 0;
  unsigned live_ = 0, open_ = 0;  // this lane's tiles, a bit each
  int before_ = 0;                // live ones before them
};

}  // namespace fi::cuda::decode
