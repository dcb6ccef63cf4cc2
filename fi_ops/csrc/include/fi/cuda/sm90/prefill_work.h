// Which rows a block works on next, and which keys they see.
#pragma once

#include <algorithm>

#include "fi/cuda/attention_rows.h"

namespace fi::cuda::sm90 {

// What is known of a call besides its tensors.
struct PrefillShape {
  int batch, num_qo_heads, group_size;  // group_size query heads share one KV head
  int qo_len, kv_len;
  int section_heads;  // query heads whose tiles are handed out together
  // Row i sees the keys j of [0, kv_len) with i + first_key <= j <= i + last_key; both are in [-qo_len,
  // kv_len].
  int first_key, last_key;

  FI_HD int q_tiles(int block_m) const { return (qo_len + block_m - 1) / block_m; }
};

// Heads whose tiles are handed out together, of KV heads with kv_len keys each: their keys and values stay in
// L2 (50 MB), or at least each is read by several blocks at a time.
inline int64_t section_kv_heads(int64_t kv_len, int64_t head_dim_qk, int64_t head_dim_vo, int num_sms) {
  constexpr int64_t kSectionBytes = 24 << 20;
  return std::max<int64_t>(kSectionBytes / (2 * std::max<int64_t>(kv_len, 1) * (head_dim_qk + head_dim_vo)),
                           num_sms / 4);
}

// A range of keys or of KV tiles.
struct Range {
  int begin, end;

  FI_HD int size() const { return end - begin; }
};

// The rows [first, last] of a query tile, and what they see.
struct SeenKeys {
  int first_row, last_row;
  PrefillShape const& shape;

  FI_HD SeenKeys(const PrefillShape& shape, int q_start, int block_m)
      : first_row(q_start), last_row(at_most(q_start + block_m, shape.qo_len) - 1), shape(shape) {}

  // KV tiles of which some row sees some key.
  FI_HD Range needed(int block_n) const {
    const int begin = at_least(first_row + shape.first_key, 0);
    const int end = at_most(last_row + shape.last_key + 1, shape.kv_len);
    return {begin / block_n, end <= begin ? begin / block_n : (end + block_n - 1) / block_n};
  }
  // KV tiles of which every row sees every key.
  FI_HD Range whole(int block_n) const {
    const int begin = at_least(last_row + shape.first_key, 0);
    const int end = at_least(at_most(first_row + shape.last_key + 1, shape.kv_len), 0);
    return {(begin + block_n - 1) / block_n, end / block_n};
  }

 private:
  FI_HD static int at_least(int x, int bound) { return x < bound ? bound : x; }
  FI_HD static int at_most(int x, int bound) { return x > bound ? bound : x; }
};

// A query tile: its place, the KV tiles it needs, and those of them that need no masking.
struct PrefillWork {
  int b, head, q_start;
  Range tiles, whole;
};

// What lane 0 reads, known to be the same in all lanes.
FI_DEVICE_INLINE PrefillWork uniform(const PrefillWork& work) {
  const auto of = [](int x) { return __shfl_sync(kAllLanes, x, 0); };
  return {of(work.b),
          of(work.head),
          of(work.q_start),
          {of(work.tiles.begin), of(work.tiles.end)},
          {of(work.whole.begin), of(work.whole.end)}};
}

// Query tiles are handed out to the blocks round by round. Under a causal mask a later one is a longer one,
// so the last ones go first, and every other round runs backwards through the blocks: the sums come out even.
// Heads go section by section, so that the keys and values in use at any time are in L2 or shared by several
// blocks; within a section the heads of a KV group are neighbours.
template <int kBlockM, int kBlockN>
class PrefillQueue {
 public:
  FI_DEVICE_INLINE explicit PrefillQueue(const PrefillShape& shape) : shape_(shape) {}

  // False when nothing is left.
  FI_DEVICE_INLINE bool next(PrefillWork& work) {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int index = round_ * blocks + (round_ % 2 == 0 ? block : blocks - 1 - block);
    ++round_;
    const int heads = shape_.batch * shape_.num_qo_heads, q_tiles = shape_.q_tiles(kBlockM);
    if (index >= heads * q_tiles) return false;
    const int first_head = index / (shape_.section_heads * q_tiles) * shape_.section_heads;
    const int section_heads = min(shape_.section_heads, heads - first_head);
    const int place = index - first_head * q_tiles;
    const int head = first_head + place % section_heads;
    work.b = head / shape_.num_qo_heads;
    work.head = head - work.b * shape_.num_qo_heads;
    work.q_start = (q_tiles - 1 - place / section_heads) * kBlockM;
    const SeenKeys seen(shape_, work.q_start, kBlockM);
    work.tiles = seen.needed(kBlockN);
    work.whole = seen.whole(kBlockN);
    return true;
  }

 private:
  const PrefillShape& shape_;
  int round_ = 0;
};

}  // namespace fi::cuda::sm90
