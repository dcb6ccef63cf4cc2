// The keys that causal, window and length leave to query rows.
#pragma once

#include "fi/cuda/attention_rows.h"

namespace fi::cuda::decode {

// Keys are listed, counted and handed out in tiles of this many: small enough that the edge of a ragged
// batch wastes little, large enough that a list entry is nothing beside the tile's K and V.
inline constexpr int kTileKeys = 64;

// Keys that causal, window and length leave to query row i; may be empty.
FI_INLINE KeyRange allowed_keys(const AttentionParams& p, int64_t b, int64_t i) {
  if (!p.causal && p.window_left < 0) return {0, static_cast<int>(p.kv_len)};
  return keys_of_position(p, query_position(p, b, i));
}

// The union of allowed_keys over all query rows (their positions need not ascend).
FI_INLINE KeyRange allowed_keys(const AttentionParams& p, int64_t b) {
  if (!p.causal && p.window_left < 0) return {0, static_cast<int>(p.kv_len)};
  KeyRange all{static_cast<int>(p.kv_len), 0};
#pragma unroll 1
  for (int64_t i = 0; i < p.qo_len; ++i) {
    const KeyRange r = allowed_keys(p, b, i);
    if (r.begin == r.end) continue;
    if (r.begin < all.begin) all.begin = r.begin;
    if (r.end > all.end) all.end = r.end;
  }
  return all.begin < all.end ? all : KeyRange{0, 0};
}

// Whether allowed_keys depends on device memory, so that the host can't know it.
FI_INLINE bool range_is_data(const AttentionParams& p) {
  return p.query_positions && (p.causal || p.window_left >= 0);
}

FI_INLINE int tiles_of(KeyRange r) {
  return r.begin < r.end ? (r.end + kTileKeys - 1) / kTileKeys - r.begin / kTileKeys : 0;
}

}  // namespace fi::cuda::decode
