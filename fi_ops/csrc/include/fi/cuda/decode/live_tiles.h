// The scan of a mask for the tiles of keys that it leaves: what is not in the lists is never loaded.
//
// One block a list. Rows and heads that the mask is broadcast over are scanned once, and so are batches. The
// rules are those of fi/cpu/live_tiles.h: a tile is dead where every row's values are -inf (or false), and
// where they are finfo.min or the like if no row lives on such values alone.
#pragma once

#include "fi/cuda/decode/key_range.h"
#include "fi/cuda/decode/mask.h"
#include "fi/cuda/pack.h"

namespace fi::cuda::decode {

struct TileLists {
  int32_t* entries = nullptr;  // [batches][heads][num_tiles]: tile_entry, ascending; null: there is no mask
  int32_t* counts = nullptr;   // [batches][heads]
  int batches = 1, heads = 1;  // 1 where all share a list; heads: KV heads
  int num_tiles = 0;

  FI_HD int list_of(int b, int kv_head) const {
    return (batches == 1 ? 0 : b) * heads + (heads == 1 ? 0 : kv_head);
  }
};

// A tile's index, and whether every value of the mask in it is "attend, add nothing".
FI_INLINE int32_t tile_entry(int tile, bool open) { return tile << 1 | int32_t(open); }
FI_INLINE int tile_index(int32_t entry) { return entry >> 1; }
FI_INLINE bool tile_open(int32_t entry) { return entry & 1; }

inline constexpr int kScanThreads = 1024;
inline constexpr int kScanWarps = kScanThreads / 32;
// Rows whose largest value is remembered; with more of them a negligible tile just stays alive.
inline constexpr int kScanRows = 64;

struct ScanShared {
  float row_top[kScanWarps][kScanRows];
  int live[kScanWarps];
  int can_drop;
};

// The largest and smallest value of a piece of the mask; bool: 0 is true, -inf false.
struct Summary {
  float top = -kInf, bottom = kInf;

  FI_DEVICE_INLINE void add(float x) {
    top = fmaxf(top, x);
    bottom = fminf(bottom, x);
  }
};

template <class M>
FI_DEVICE_INLINE float mask_value(M x) {
  if constexpr (__is_same(M, uint8_t)) {
    return x ? 0.0f : -kInf;
  } else {
    return to_float(x);
  }
}

// 16 bytes of a row.
template <class M>
FI_DEVICE_INLINE Summary summarize(const uint4& v) {
  Summary s;
  if constexpr (__is_same(M, uint8_t)) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    if (words[0] | words[1] | words[2] | words[3]) s.top = 0.0f;
    s.bottom = (words[0] & words[1] & words[2] & words[3]) == 0x01010101u ? 0.0f : -kInf;
  } else {
    float x[kPackSize<M>];
    unpack_16<M>(x, v);
#pragma unroll
    for (int n = 0; n < kPackSize<M>; ++n) s.add(x[n]);
  }
  return s;
}

// Keys [keys.begin, keys.end) of a row that starts at m, at most 16 bytes of them.
template <class M>
FI_DEVICE_INLINE Summary summarize(const M* m, int64_t stride, KeyRange keys) {
  constexpr int kValues = 16 / sizeof(M);
  Summary s;
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    if (keys.begin + j < keys.end) s.add(mask_value(m[(keys.begin + j) * stride]));
  }
  return s;
}

// The list of batch b and KV head kv_head into `entries`; returns its length. All threads of a block take
// part.
template <class M>
FI_DEVICE_INLINE int scan_list(const AttentionParams& p, int group, int b, int kv_head, int32_t* entries,
                               ScanShared& shared) {
  constexpr int kValues = 16 / sizeof(M);  // a lane's share of a tile
  constexpr int kLanes = kTileKeys / kValues;
  constexpr int kStep = 32 / kLanes;  // tiles a warp takes at once
  constexpr int kRowsAtOnce = 2;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t stride = p.mask_stride_k;
  const int num_heads = p.mask_stride_h == 0 ? 1 : group;
  const bool same_rows = p.mask_stride_q == 0 && !p.causal && p.window_left < 0;
  const int num_queries = same_rows ? 1 : static_cast<int>(p.qo_len), num_rows = num_heads * num_queries;
  const bool drops = !__is_same(M, uint8_t) && num_rows <= kScanRows;
  const float low = negligible(p.mask_dtype);
  const KeyRange all = allowed_keys(p, b);
  const int first = all.begin / kTileKeys, last = first + tiles_of(all);

  auto row_of = [&](int row) {
    return static_cast<const M*>(p.mask) + mask_row(p, b, kv_head * group + row % num_heads, row / num_heads);
  };

  if (drops) {
    for (int r = lane; r < num_rows; r += 32) shared.row_top[warp][r] = -kInf;
  }
  __syncwarp();
  // What each tile is, for now in `entries`: alive, open, negligible.
  for (int tile0 = first + warp * kStep; tile0 < last; tile0 += kScanWarps * kStep) {
    const int tile = tile0 + lane / kLanes, key = tile * kTileKeys + lane % kLanes * kValues;
    float tile_top = -kInf;
    bool open = true;
    for (int row0 = 0; row0 < num_rows; row0 += kRowsAtOnce) {
      // The loads of several rows together: one trip to memory for all of them.
      KeyRange keys[kRowsAtOnce];
      uint4 values[kRowsAtOnce];
      bool whole[kRowsAtOnce];
#pragma unroll
      for (int n = 0; n < kRowsAtOnce; ++n) {
        keys[n] = {0, 0};
        whole[n] = false;
        if (row0 + n >= num_rows) continue;
        const KeyRange r = allowed_keys(p, b, (row0 + n) / num_heads);
        keys[n] = {max(key, r.begin), min(key + kValues, r.end)};
        const M* at = row_of(row0 + n) + key;
        whole[n] = stride == 1 && keys[n].end - keys[n].begin == kValues &&
                   reinterpret_cast<uintptr_t>(at) % 16 == 0;
        if (whole[n]) values[n] = load_streaming_16(at);
      }
#pragma unroll
      for (int n = 0; n < kRowsAtOnce; ++n) {
        if (row0 + n >= num_rows) continue;
        Summary s;
        if (keys[n].begin < keys[n].end) {
          s = whole[n] ? summarize<M>(values[n]) : summarize(row_of(row0 + n), stride, keys[n]);
          open = open && s.top == 0.0f && s.bottom == 0.0f;
          tile_top = fmaxf(tile_top, s.top);
        }
        if (drops) {
#pragma unroll
          for (int other = 16; other > 0; other /= 2)
            s.top = fmaxf(s.top, __shfl_xor_sync(~0u, s.top, other));
          if (lane == 0) shared.row_top[warp][row0 + n] = fmaxf(shared.row_top[warp][row0 + n], s.top);
        }
      }
    }
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2)
      tile_top = fmaxf(tile_top, __shfl_xor_sync(~0u, tile_top, other));
    const unsigned opens = __ballot_sync(~0u, open) >> (lane / kLanes * kLanes);
    constexpr unsigned kTileLanes = kLanes == 32 ? ~0u : (1u << kLanes) - 1u;
    if (lane % kLanes == 0 && tile < last) {
      const int state = (tile_top > -kInf ? 1 : 0) | ((opens & kTileLanes) == kTileLanes ? 2 : 0) |
                        (tile_top <= low ? 4 : 0);
      entries[tile - first] = state;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.can_drop = drops;
  __syncthreads();
  if (drops && threadIdx.x < num_rows) {
    float top = -kInf;
    for (int w = 0; w < kScanWarps; ++w) top = fmaxf(top, shared.row_top[w][threadIdx.x]);
    if (top > -kInf && !(top > 0.5f * low)) shared.can_drop = false;
  }
  __syncthreads();
  // Compaction in place: an entry moves to its own place or an earlier one, after that was read.
  const int dead_if = shared.can_drop ? 4 : 0;
  int count = 0;
  for (int tile0 = first; tile0 < last; tile0 += kScanThreads) {
    const int tile = tile0 + static_cast<int>(threadIdx.x);
    const int state = tile < last ? entries[tile - first] : 0;
    const bool live = (state & 1) && !(state & dead_if);
    const unsigned lives = __ballot_sync(~0u, live);
    if (lane == 0) shared.live[warp] = __popc(lives);
    __syncthreads();
    int before = count + __popc(lives & ((1u << lane) - 1u)), total = 0;
    for (int w = 0; w < kScanWarps; ++w) {
      if (w < warp) before += shared.live[w];
      total += shared.live[w];
    }
    if (live) entries[before] = tile_entry(tile, (state & 2) != 0);
    count += total;
    __syncthreads();
  }
  return count;
}

}  // namespace fi::cuda::decode
