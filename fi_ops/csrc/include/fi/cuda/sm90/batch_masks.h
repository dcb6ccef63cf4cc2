// Custom masks of a batch (fi/batch_attention.h) on Hopper: what they leave of each KV tile, and their bits.
//
// A kernel of its own (cuda/kernels/sm90/batch_masks.cu) reads the mask once and writes a class for every KV
// tile of every query tile in the plan, joined with causal, window and length. Producers list the tiles that
// are seen. Consumers read the packed bits themselves, where a tile is cut. The classes take one byte a pair
// of tiles, with room for every request to be as long as all of them together: nothing has to be known of
// lengths, and masks may share bytes.
#pragma once

#include "fi/cuda/gpu.h"
#include "fi/cuda/sm90/batch_work.h"
#include "fi/cuda/sm90/prefill_device_keys.h"
#include "fi/cuda/sm90/warpgroup.h"

namespace fi::cuda::sm90 {

struct BatchMask {
  const uint8_t* classes;  // [planned query tile][kv_tiles], TileFlags
  int kv_tiles;
  // The packed bits as aligned words, from the one in which the first byte lies. The last word may end behind
  // the mask: its bits are in `tail`, which the scan writes, 0 where there are none.
  const uint32_t* words;
  const uint32_t* tail;
  uint32_t num_words;  // whole ones
  uint32_t first_bit;  // of words
  uint32_t num_bytes;
  Indices indptr;  // [batch + 1]

  // The first bit of request b.
  FI_DEVICE_INLINE uint64_t begin(int b) const {
    return first_bit + 8 * static_cast<uint64_t>(clamp_index(indptr.at(b), 0, num_bytes));
  }
};

// What the scan writes, for planned query tiles and KV tiles of `block_n` keys (at most 128): into scratch.
BatchMask scan_batch_mask(const BatchAttentionParams& p, const BatchShape& shape, int block_n,
                          const Gpu& gpu);

// At most what it asks of scratch.
int64_t batch_mask_scratch_bytes(const BatchAttentionParams& p);

// What the mask says of 32 keys of a query, from `first` on, a bit each; 0 behind the mask's end. `begin`:
// where the bits of the query's request begin.
FI_DEVICE_INLINE uint32_t mask_word(const BatchMask& mask, uint64_t begin, int query, int kv_len, int first) {
  const uint64_t bit = begin +
                       static_cast<uint64_t>(static_cast<uint32_t>(query)) * static_cast<uint32_t>(kv_len) +
                       static_cast<uint32_t>(first);
  const auto aligned = [&](uint64_t at) {
    const uint32_t* word = at < mask.num_words ? mask.words + at : mask.tail;
    return at <= mask.num_words ? *word : 0;
  };
  return __funnelshift_r(aligned(bit / 32), aligned(bit / 32 + 1), static_cast<uint32_t>(bit % 32));
}

// The lowest n bits.
FI_DEVICE_INLINE uint32_t low_bits(int n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// A query tile under a mask, and where a warp is in the list of its live KV tiles, from the last one back.
// They are told apart 32 at a time: the last 32 that were looked at begin at `group`, those below are to
// come. Producers, whose registers are short, keep all of it in shared memory.
struct MaskedTile : BatchTile {
  int next_tile;  // ListedTile::word; as the consumers are told of the tile, the first one
  int group;
  unsigned live, cut, has_unseen;  // a bit a tile of the group; of `live` those that are still to come
  uint32_t mask_begin[2];          // low and high half of where its request's bits begin

  FI_DEVICE_INLINE ListedTile next() const { return ListedTile(next_tile); }
  FI_DEVICE_INLINE uint64_t mask_bit() const {
    return mask_begin[0] | static_cast<uint64_t>(mask_begin[1]) << 32;
  }
};

FI_DEVICE_INLINE bool has_keys(const MaskedTile& tile) { return static_cast<bool>(tile.next()); }

// The keys first .. first + 31 that a query of the tile sees by mask, causal, window and length, a bit each.
FI_DEVICE_INLINE uint32_t seen_keys(const BatchMask& mask, const MaskedTile& tile, int query, int first) {
  const int begin = query + tile.first_key;
  const int end = query < tile.q_end ? min(query + tile.last_key + 1, tile.kv_len) : 0;
  return mask_word(mask, tile.mask_bit(), query, tile.kv_len, first) & low_bits(end - first) &
         ~low_bits(begin - first);
}

// By one lane: what the tile has beyond a BatchTile, before any live tile is looked for.
FI_DEVICE_INLINE void start_masked_tile(MaskedTile& tile, const BatchMask& mask) {
  tile.group = tile.work.tiles.end;
  tile.live = 0;
  const uint64_t begin = tile.any() ? mask.begin(tile.work.b) : 0;
  tile.mask_begin[0] = static_cast<uint32_t>(begin);
  tile.mask_begin[1] = static_cast<uint32_t>(begin >> 32);
}

// By a warp, none of whose lanes has changed the tile since they met: tile.next() becomes the live tile that
// follows.
FI_DEVICE_INLINE void advance(MaskedTile& tile, const BatchMask& mask) {
  while (tile.live == 0 && tile.group > tile.work.tiles.begin) {
    const int lane = static_cast<int>(thread_now() % 32), group = tile.group - 32;
    const uint8_t flags = group + lane >= tile.work.tiles.begin
                              ? mask.classes[tile.queue.at * mask.kv_tiles + group + lane]
                              : uint8_t(0);
    const unsigned live = __ballot_sync(kAllLanes, flags & kSeen);
    const unsigned cut = __ballot_sync(kAllLanes, flags & kCut);
    const unsigned has_unseen = __ballot_sync(kAllLanes, flags & kHasUnseen);
    if (lane == 0) tile.group = group, tile.live = live, tile.cut = cut, tile.has_unseen = has_unseen;
    __syncwarp();
  }
  __syncwarp();  // no lane is still to read what changes
  if (thread_now() % 32 == 0) {
    const unsigned live = tile.live;
    ListedTile next;
    if (live != 0) {
      const int bit = 31 - __clz(static_cast<int>(live));
      tile.live = live ^ 1u << bit;
      next = ListedTile(tile.group + bit, tile.cut >> bit & 1, tile.has_unseen >> bit & 1);
    }
    tile.next_tile = next.word();
  }
  __syncwarp();
}

}  // namespace fi::cuda::sm90
