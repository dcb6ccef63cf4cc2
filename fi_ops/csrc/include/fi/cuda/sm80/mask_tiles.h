// What a mask leaves of each tile of KV, found before any of KV is loaded.
//
// A kernel of its own (cuda/kernels/prefill_mask.cu) reads the mask once and writes one byte a (block of
// rows, tile); the attention kernels walk from live tile to live tile. Dimensions that the mask is broadcast
// over are scanned once.
#pragma once

#include "fi/cuda/sm80/block_rows.h"

namespace fi::cuda {

enum TileClass : uint8_t {
  kDead = 0,    // every value excludes
  kPartial,     // to be read key by key
  kOpen,        // every value says "attend, add nothing"
  kNegligible,  // live, but dead beside the ordinary values of other tiles
};

enum RowFlag : uint8_t { kSeesAny = 1, kSeesOrdinary = 2 };

struct MaskTiles {
  uint8_t* classes = nullptr;  // [list_batches][list_heads][num_blocks][num_tiles]; null: no mask
  // What the distinct rows of a block see in each chunk of tiles (additive masks only):
  // [list_batches][list_heads][num_blocks][num_chunks][block_rows]
  uint8_t* row_flags = nullptr;
  int64_t num_blocks, num_tiles, num_chunks;
  int list_batches, list_heads;  // 1 where the mask is the same for all of them
  int block_rows, tile;

  static constexpr int kChunk = 16;  // tiles a thread block of the scan takes

  FI_DEVICE_INLINE int64_t list_of(int64_t b, int64_t kv_head, int64_t block) const {
    return ((list_batches == 1 ? 0 : b) * list_heads + (list_heads == 1 ? 0 : kv_head)) * num_blocks + block;
  }
};

// The rows of a block whose mask values differ, or whose keys do: every other row is like one of them.
class DistinctRows {
 public:
  FI_DEVICE_INLINE DistinctRows(const AttentionParams& p, const BlockOfRows& block, int block_rows)
      : block_(block),
        one_query_(p.mask_stride_q == 0 && !p.causal && p.window_left < 0),
        one_head_(p.mask_stride_h == 0) {
    const int rows = min(block_rows, static_cast<int>(block.num_rows - block.row_begin));
    const int queries = block.query(rows - 1) - block.query(0) + 1;
    count_ = !one_query_ ? (one_head_ ? queries : rows)
                         : (one_head_ ? 1 : min(rows, static_cast<int>(block.group)));
  }

  FI_DEVICE_INLINE int count() const { return count_; }
  FI_DEVICE_INLINE int row(int n) const {
    return one_query_ || !one_head_ ? n : first_of(block_.query(0) + n);
  }
  FI_DEVICE_INLINE int index_of(int r) const {
    if (one_query_) return one_head_ ? 0 : r % static_cast<int>(block_.group);
    return one_head_ ? block_.query(r) - block_.query(0) : r;
  }

 private:
  FI_DEVICE_INLINE int first_of(int query) const {
    const int r = query * static_cast<int>(block_.group) - static_cast<int>(block_.row_begin);
    return r < 0 ? 0 : r;
  }

  const BlockOfRows& block_;
  bool one_query_, one_head_;
  int count_;
};

// Whether row r of a block sees an ordinary value somewhere, or nothing at all: where this holds for all rows
// kNegligible is kDead.
FI_DEVICE_INLINE bool can_drop_negligible(const AttentionParams& p, const MaskTiles& m,
                                          const BlockOfRows& block, int64_t block_index, int r) {
  if (m.row_flags == nullptr || r >= m.block_rows || !block.has(r)) return true;
  const uint8_t* flags = m.row_flags +
                         m.list_of(block.b, block.kv_head, block_index) * m.num_chunks * m.block_rows +
                         DistinctRows(p, block, m.block_rows).index_of(r);
  int seen = 0;
  for (int64_t c = 0; c < m.num_chunks; ++c) seen |= flags[c * m.block_rows];
  return seen != kSeesAny;
}

// The live tiles of [first, last), from the last one back. All lanes of a warp walk together. With `classes`
// null, or not kMasked, all are live and open.
template <bool kMasked>
class TileWalk {
 public:
  FI_DEVICE_INLINE TileWalk(const uint8_t* classes, int first, int last, bool drop_negligible)
      : classes_(classes), first_(first), at_(last), drop_negligible_(drop_negligible) {}

  // -1 after the last one; `open`: no need to read the mask there.
  FI_DEVICE_INLINE int next(bool& open) {
    open = true;
    if constexpr (kMasked) {
      if (classes_ != nullptr) return next_in_map(open);
    }
    return at_ > first_ ? --at_ : -1;
  }

 private:
  FI_DEVICE_INLINE int next_in_map(bool& open) {
    while (live_ == 0) {
      if (at_ <= first_) return -1;
      at_ -= 32;
      const int tile = at_ + static_cast<int>(threadIdx.x % 32);
      const uint8_t c = tile >= first_ ? classes_[tile] : uint8_t(kDead);
      live_ = __ballot_sync(kAllLanes, c != kDead && !(c == kNegligible && drop_negligible_));
      open_ = __ballot_sync(kAllLanes, c == kOpen);
    }
    const int bit = 31 - __clz(static_cast<int>(live_));
    live_ ^= 1u << bit;
    open = (open_ >> bit & 1) != 0;
    return at_ + bit;
  }

  const uint8_t* classes_;
  int first_, at_;
  bool drop_negligible_;
  unsigned live_ = 0, open_ = 0;
};

// Scans p.mask for blocks of `block_rows` rows and tiles of `tile` keys (host).
MaskTiles classify_mask(const AttentionParams& p, const Gpu& gpu, int block_rows, int tile);

}  // namespace fi::cuda
