// Keys that only the device knows: query rows at positions that are data, or under a mask.
//
// The producer finds out which KV tiles a query tile needs while the consumers are still at the one before.
// It tells them in shared memory, with the barriers that say that a tile has arrived.
#pragma once

#include <climits>

#include "fi/cuda/attention_rows.h"
#include "fi/cuda/sm90/mask_bits.h"
#include "fi/cuda/sm90/prefill_work.h"

namespace fi::cuda::sm90 {

// A KV tile as the producer names it: its index and its TileFlags, or that there is none.
class ListedTile {
 public:
  FI_DEVICE_INLINE ListedTile() : word_(-1) {}
  FI_DEVICE_INLINE ListedTile(int index, bool cut, bool has_unseen)
      : word_(index * 8 + (cut ? kCut : 0) + (has_unseen ? kHasUnseen : 0)) {}
  FI_DEVICE_INLINE explicit ListedTile(int word) : word_(word) {}

  FI_DEVICE_INLINE explicit operator bool() const { return word_ >= 0; }
  FI_DEVICE_INLINE int index() const { return word_ >> 3; }
  FI_DEVICE_INLINE bool cut() const { return word_ & kCut; }
  FI_DEVICE_INLINE bool has_unseen() const { return word_ & kHasUnseen; }
  FI_DEVICE_INLINE int word() const { return word_; }

 private:
  int word_;
};

// What consumers are told of a query tile.
template <int kBlockM>
struct RowKeys {
  int first_tile;  // ListedTile::word
  // Where positions decide: keys outside of `seen` are seen by no row, those of rows[r] by row r.
  Range seen;
  KeyRange rows[kBlockM];
};

// The KV tiles that some row of a query tile sees, from the last one back. All lanes of a warp walk together.
template <int kBlockM, int kBlockN>
class LiveTiles {
 public:
  // Where positions decide, this lane gets the keys of rows lane + 32 * i; rows past the end are like the
  // last.
  FI_DEVICE_INLINE LiveTiles(const AttentionParams& p, const MaskBits& mask, const PrefillWork& work,
                             KeyRange (&rows)[kBlockM / 32])
      : mask_(mask), at_(mask.kv_tiles), seen_{0, 0}, whole_{0, 0} {
    if (mask.classes) {
      list_ = mask.list_of(work.b, work.head, work.q_start / kBlockM);
    } else {
      p.query_positions.wide ? find_range<int64_t>(p, work, rows) : find_range<int32_t>(p, work, rows);
    }
  }

  FI_DEVICE_INLINE Range seen() const { return seen_; }

  FI_DEVICE_INLINE ListedTile next() {
    if (mask_.classes) return next_in_list();
    if (at_ * kBlockN <= seen_.begin) return {};
    --at_;
    const int begin = at_ * kBlockN, end = begin + kBlockN;
    return {at_, begin < whole_.begin || end > whole_.end, begin < seen_.begin || end > seen_.end};
  }

 private:
  template <class Index>
  FI_DEVICE_INLINE void find_range(const AttentionParams& p, const PrefillWork& work,
                                   KeyRange (&rows)[kBlockM / 32]) {
    const Index* positions =
        static_cast<const Index*>(p.query_positions.data) + work.b * p.query_positions.stride_b;
    Index position[kBlockM / 32];  // asked for together: nothing else goes on meanwhile
#pragma unroll
    for (int i = 0; i < kBlockM / 32; ++i) {
      const int row = work.q_start + 32 * i + static_cast<int>(threadIdx.x % 32);
      position[i] = positions[min(row, static_cast<int>(p.qo_len) - 1) * p.query_positions.stride_i];
    }
    int first = INT_MAX, last = 0, whole_first = 0, whole_last = INT_MAX;
#pragma unroll
    for (int i = 0; i < kBlockM / 32; ++i) {
      const KeyRange keys = rows[i] = keys_of_position(p, position[i]);
      if (keys.begin < keys.end) first = min(first, keys.begin);
      last = max(last, keys.end);
      whole_first = max(whole_first, keys.begin);
      whole_last = min(whole_last, keys.end);
    }
    first = __reduce_min_sync(kAllLanes, first);
    last = __reduce_max_sync(kAllLanes, last);
    seen_ = {first < last ? first : 0, last};
    whole_ = {__reduce_max_sync(kAllLanes, whole_first), __reduce_min_sync(kAllLanes, whole_last)};
    at_ = (last + kBlockN - 1) / kBlockN;
  }

  FI_DEVICE_INLINE ListedTile next_in_list() {
    while (live_ == 0) {
      if (at_ <= 0) return {};
      at_ -= 32;
      const int tile = at_ + static_cast<int>(threadIdx.x % 32);
      const uint8_t flags = tile >= 0 ? mask_.classes[list_ + tile] : uint8_t(0);
      live_ = __ballot_sync(kAllLanes, flags & kSeen);
      cut_ = __ballot_sync(kAllLanes, flags & kCut);
      has_unseen_ = __ballot_sync(kAllLanes, flags & kHasUnseen);
    }
    const int bit = 31 - __clz(static_cast<int>(live_));
    live_ ^= 1u << bit;
    return {at_ + bit, (cut_ >> bit & 1) != 0, (has_unseen_ >> bit & 1) != 0};
  }

  const MaskBits& mask_;
  int list_ = 0;  // its first class
  int at_;        // tiles from here on are done
  Range seen_, whole_;
  unsigned live_ = 0, cut_ = 0, has_unseen_ = 0;
};

}  // namespace fi::cuda::sm90
