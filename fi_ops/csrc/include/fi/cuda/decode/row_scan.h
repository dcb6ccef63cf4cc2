// The scan of a mask that has one row for all queries of a batch entry, by each block for itself: sooner
// there than a list from another kernel. The rules are those of live_tiles.h.
#pragma once

#include "fi/cuda/decode/live_tiles.h"
#include "fi/cuda/decode/plan.h"

namespace fi::cuda::decode {

inline constexpr int kMaxListed = 512;  // tiles: 32k keys

struct RowScanShared {
  int32_t entries[kMaxListed];  // tile_entry, ascending
  float top[kMaxWarps];
  int count;
};

// Whether scan_row() takes the call's mask.
inline bool row_scan_takes(const AttentionParams& p) {
  const int64_t bytes = p.mask_dtype == DType::boolean ? 1 : p.mask_dtype == DType::f32 ? 4 : 2;
  return (p.batch == 1 || p.mask_stride_b * bytes % 16 == 0) &&
         (p.num_qo_heads == 1 || p.mask_stride_h == 0) &&
         (p.qo_len == 1 || (p.mask_stride_q == 0 && !p.causal && p.window_left < 0)) &&
         (p.kv_len == 1 || p.mask_stride_k == 1) && p.kv_len <= kMaxListed * kTileKeys &&
         reinterpret_cast<uintptr_t>(p.mask) % 16 == 0;
}

// Lists the live tiles of batch entry b among `keys`, which holds at least one. By all threads of the block;
// has barriers.
template <class M>
FI_DEVICE_INLINE void scan_row(const AttentionParams& p, int b, KeyRange keys, RowScanShared& shared) {
  constexpr int kValues = 16 / sizeof(M), kLanes = kTileKeys / kValues;  // lanes a tile
  constexpr int kAtOnce = 4;                                             // loads in flight
  constexpr unsigned kTileLanes = (1u << kLanes) - 1u;
  const M* row = static_cast<const M*>(p.mask) + b * p.mask_stride_b;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int first = keys.begin / kTileKeys, num_tiles = tiles_of(keys), num = num_tiles * kLanes;
  const float low = negligible(p.mask_dtype);

  float row_top = -kInf;
#pragma unroll 1
  for (int start = 0; start < num; start += kAtOnce * static_cast<int>(blockDim.x)) {
    uint4 values[kAtOnce];
    KeyRange part[kAtOnce];
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int at = start + n * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      const int key = first * kTileKeys + at * kValues;
      part[n] = {max(key, keys.begin), min(key + kValues, keys.end)};
      if (part[n].end - part[n].begin == kValues) values[n] = load_streaming_16(row + key);
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int at = start + n * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      Summary s;
      bool open = true;
      if (part[n].begin < part[n].end) {
        s = part[n].end - part[n].begin == kValues ? summarize<M>(values[n]) : summarize(row, 1, part[n]);
        open = s.top == 0.0f && s.bottom == 0.0f;
      }
      row_top = fmaxf(row_top, s.top);
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2)
        s.top = fmaxf(s.top, __shfl_xor_sync(~0u, s.top, other));
      const unsigned opens = __ballot_sync(~0u, open) >> (lane / kLanes * kLanes) & kTileLanes;
      if (lane % kLanes == 0 && at < num)
        shared.entries[at / kLanes] =
            (s.top > -kInf ? 1 : 0) | (opens == kTileLanes ? 2 : 0) | (s.top <= low ? 4 : 0);
    }
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) row_top = fmaxf(row_top, __shfl_xor_sync(~0u, row_top, other));
  if (lane == 0) shared.top[warp] = row_top;
  __syncthreads();
  if (warp == 0) {
    for (int w = 1; w < warps; ++w) row_top = fmaxf(row_top, shared.top[w]);
    const bool can_drop = !__is_same(M, uint8_t) && (row_top == -kInf || row_top > 0.5f * low);
    // Compaction in place: an entry moves to its own place or an earlier one, after that was read.
    const int dead_if = can_drop ? 4 : 0;
    int count = 0;
    for (int start = 0; start < num_tiles; start += 32) {
      const int tile = start + lane;
      const int state = tile < num_tiles ? shared.entries[tile] : 0;
      const bool live = (state & 1) && !(state & dead_if);
      const unsigned lives = __ballot_sync(~0u, live);
      if (live)
        shared.entries[count + __popc(lives & ((1u << lane) - 1u))] = tile_entry(first + tile, state & 2);
      count += __popc(lives);
      __syncwarp();
    }
    if (lane == 0) shared.count = count;
  }
  __syncthreads();
}

FI_DEVICE_INLINE void scan_row(const AttentionParams& p, int b, KeyRange keys, RowScanShared& shared) {
  with_mask_type(p.mask_dtype, [&]<class M>(const M*) { scan_row<M>(p, b, keys, shared); });
}

}  // namespace fi::cuda::decode
