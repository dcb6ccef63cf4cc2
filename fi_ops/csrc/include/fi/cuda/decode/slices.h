// The slices of keys that one warp takes of its block's units, in order.
#pragma once

#include "fi/cuda/decode/plan.h"

namespace fi::cuda::decode {

// A warp's slices of a run of `tiles` tiles are dealt out in turn.
FI_DEVICE_INLINE int slices_of_warp(int tiles, int slices_a_tile, int warp, int warps) {
  const int left = tiles * slices_a_tile - warp;
  return left > 0 ? (left + warps - 1) / warps : 0;
}

struct Slice {
  int key;    // the first one
  bool open;  // the mask need not be read
};

template <int kSliceKeys, int kRows>
class SliceCursor {
 public:
  static constexpr int kSlicesATile = kTileKeys / kSliceKeys;
  static constexpr bool kOneMaskRow = false;  // for all rows of a segment

  FI_DEVICE_INLINE SliceCursor(const AttentionParams& p, const Plan& plan, const Work& work)
      : p_(p), plan_(plan), walk_(work.first), begin_(work.begin), end_(work.end) {
    if (!done()) enter();
  }

  FI_DEVICE_INLINE bool done() const { return begin_ >= end_; }
  // Of the segment that slice() is in.
  FI_DEVICE_INLINE SegmentPlace place() const { return place_of(p_, plan_, kRows, walk_.index); }
  FI_DEVICE_INLINE int key_end() const { return key_end_; }
  // Whether the last step has come to another segment.
  FI_DEVICE_INLINE bool entered() const { return entered_; }

  // For all lanes of the warp.
  FI_DEVICE_INLINE Slice slice() const {
    const int first = at_ % kSlicesATile * kSliceKeys;
    if (list_ == nullptr) return {(first_tile_ + at_ / kSlicesATile) * kTileKeys + first, true};
    const int32_t entry = __shfl_sync(~0u, entries_, used_entries_);
    return {tile_index(entry) * kTileKeys + first, tile_open(entry)};
  }

  FI_DEVICE_INLINE void step() {
    entered_ = false;
    at_ += blockDim.x / 32;
    if (at_ >= num_) {
      leave();
    } else if (list_ && ++used_entries_ == 32) {
      load_entries();
    }
  }

 private:
  // To the first slice of the segment, or of a later one that has a slice for this warp.
  FI_DEVICE_INLINE void enter() {
    at_ = threadIdx.x / 32;
    while (true) {
      const int stop = min(end_, walk_.first_unit + walk_.tiles);
      first_tile_ = begin_ - walk_.first_unit;
      num_ = (stop - begin_) * kSlicesATile;
      if (at_ < num_) break;
      begin_ = stop;
      if (done()) return;
      walk_.next(p_, plan_, end_);
    }
    const SegmentPlace at = place();
    const KeyRange range = range_of(p_, plan_, at.b);
    key_end_ = range.end;
    list_ = plan_.lists.entries;
    if (list_) list_ += int64_t{plan_.lists.list_of(at.b, at.kv_head)} * plan_.lists.num_tiles;
    if (list_ == nullptr) first_tile_ += range.begin / kTileKeys;
    entered_ = true;
    if (list_) load_entries();
  }

  FI_DEVICE_INLINE void leave() {
    begin_ = min(end_, walk_.first_unit + walk_.tiles);
    if (done()) return;
    walk_.next(p_, plan_, end_);
    enter();
  }

  // The entries of the next 32 slices, one a lane: one trip to L2 for all of them.
  FI_DEVICE_INLINE void load_entries() {
    const int at = at_ + static_cast<int>(threadIdx.x % 32 * (blockDim.x / 32));
    if (at < num_) entries_ = __ldcg(&list_[first_tile_ + at / kSlicesATile]);
    used_entries_ = 0;
  }

  const AttentionParams& p_;
  const Plan& plan_;
  SegmentWalk walk_;
  int begin_, end_;       // units still ahead, the current segment's included
  int first_tile_ = 0;    // of the block's part of the segment: an entry of the list, or a tile
  int num_ = 0, at_ = 0;  // slices of that part, of all warps
  int key_end_ = 0;
  const int32_t* list_ = nullptr;  // the segment's
  int32_t entries_ = 0;            // this lane's of 32, of which used_entries_ are done with
  int used_entries_ = 0;
  bool entered_ = false;
};

}  // namespace fi::cuda::decode
