// Which query tile of a batch a block takes next, and where its keys lie. The plan lists the tiles on the
// device (fi/batch_attention.h); nothing of it is known to the host.
//
// Everything is counted in 32 bits, and index tensors are clamped to what is there: registers of the
// producers, who ask, are few.
#pragma once

#include <algorithm>
#include <numeric>

#include "fi/batch_attention.h"
#include "fi/cuda/batch/plan.h"
#include "fi/cuda/divisor.h"

#include "fi/cuda/sm90/prefill_work.h"

namespace fi::cuda::sm90 {

FI_INLINE int clamp_int(int64_t x, int low, int high) { return static_cast<int>(clamp_index(x, low, high)); }

// A batch as its producers see it.
struct BatchShape {
  const PlanTile* tiles;
  const int32_t* num_tiles;  // on the device; not to be believed beyond max_tiles
  int max_tiles;
  int batch, num_qo_heads, group_size, nnz_qo;
  int section_heads;   // query heads whose tiles are handed out together
  int packed_queries;  // that a tile holds with all heads of a KV head's group; 0: tiles of one head alone
  Divisor by_group_size;
  bool causal, is_paged;
  int window_left;  // -1: none
  // As in PageTable; ragged: the keys are one page, of which kv_indptr counts the rows.
  int nnz_pages, num_pages, page_size;
  Divisor by_page_size;
  Indices qo_indptr, kv_indptr, kv_indices, kv_last_page_len;
  PerHead k_scale, v_scale;
};

// For query tiles of `block_m` rows.
inline BatchShape batch_shape(const BatchAttentionParams& p, const batch::PlanView& plan, int block_m,
                              int num_sms) {
  const AttentionParams& c = p.call;
  BatchShape shape;
  shape.tiles = plan.tiles;
  shape.num_tiles = &plan.header->num_tiles;
  shape.max_tiles = plan.max_tiles;
  shape.batch = static_cast<int>(c.batch);
  shape.num_qo_heads = static_cast<int>(c.num_qo_heads);
  shape.group_size = static_cast<int>(c.num_qo_heads / c.num_kv_heads);
  shape.nnz_qo = static_cast<int>(c.qo_len);
  const int64_t mean_kv_len = c.kv_len / std::max<int64_t>(c.batch, 1);
  shape.section_heads = static_cast<int>(std::min(
      c.num_qo_heads,
      section_kv_heads(mean_kv_len, c.head_dim_qk, c.head_dim_vo, num_sms) * int64_t{shape.group_size}));
  // Large tiles are for long requests, and half a tile of idle rows is no gain.
  shape.packed_queries = block_m == kTileQueries && shape.group_size > 1 ? block_m / shape.group_size : 0;
  shape.by_group_size = Divisor(static_cast<unsigned>(shape.group_size));
  shape.causal = c.causal;
  shape.is_paged = p.is_paged();
  shape.window_left = clamp_int(c.window_left, -1, 1 << 30);
  shape.nnz_pages = static_cast<int>(p.table.nnz_pages);
  shape.num_pages = p.is_paged() ? static_cast<int>(p.table.num_pages) : 1;
  shape.page_size = static_cast<int>(p.table.page_size);
  shape.by_page_size = Divisor(static_cast<unsigned>(shape.page_size));
  shape.qo_indptr = p.qo_indptr;
  shape.kv_indptr = p.table.kv_indptr;
  shape.kv_indices = p.table.kv_indices;
  shape.kv_last_page_len = p.kv_last_page_len;
  shape.k_scale = p.k_scale;
  shape.v_scale = p.v_scale;
  return shape;
}

// Where a block is in the plan's list of tiles.
struct BatchQueue {
  int round = 0;               // of handing out tiles
  int span = -1, at = -1;      // the last span asked for, and its first planned tile
  int section = 0, parts = 0;  // where heads are in sections: this one's first head, the parts of all spans
};

// A query tile of one head, or of all heads of a KV head's group, as the producer tells it to the consumers.
// Queries and keys count from the request's first.
struct BatchTile {
  PrefillWork work;                         // b: the request; head: the first, -1: no tile is left
  bool packed;                              // of all heads: row r is query r / group_size
  int q_end;                                // its queries end there
  int qo_len, kv_len, first_key, last_key;  // as in PrefillShape
  Range values;                             // what lies outside may be anything
  int q_begin, kv_begin;                    // as in Request
  int kv_head;
  BatchQueue queue;  // behind it
  float k_scale, v_scale;

  FI_HD bool any() const { return work.head >= 0; }
};

FI_INLINE bool has_keys(const BatchTile& tile) { return tile.work.tiles.size() != 0; }

// The query tiles that start `row` queries behind the planned one are those of each head, or as many fewer of
// all heads of each group as there are queries for. This makes the `nth` of num_qo_heads; false where there
// is none: behind the request's end, where there are fewer, or because it is a plan of another batch.
FI_INLINE bool make_batch_tile(const BatchShape& shape, const PlanTile& planned, int row, int nth,
                               int block_m, int block_n, BatchTile& tile) {
  const int b = planned.request;
  if (b < 0 || b >= shape.batch) return false;
  const int q_begin = clamp_int(shape.qo_indptr.at(b), 0, shape.nnz_qo);
  const int qo_len = clamp_int(shape.qo_indptr.at(b + 1), q_begin, shape.nnz_qo) - q_begin;
  if (planned.q_begin < 0 || planned.q_begin >= qo_len - row) return false;
  int q_start = planned.q_begin + row, queries = block_m, head = nth;
  tile.packed = false;
  if (shape.packed_queries > 0) {
    const int rest = qo_len - q_start < kTileQueries ? qo_len - q_start : static_cast<int>(kTileQueries);
    const int blocks = (rest + shape.packed_queries - 1) / shape.packed_queries;
    if (blocks < shape.group_size) {
      const int kv_heads = shape.num_qo_heads / shape.group_size, block = nth / kv_heads;
      if (block >= blocks) return false;
      tile.packed = true;
      queries = shape.packed_queries;
      q_start += (blocks - 1 - block) * queries;
      head = (nth - block * kv_heads) * shape.group_size;
    }
  }
  const int kv_begin = clamp_int(shape.kv_indptr.at(b), 0, shape.nnz_pages);
  const int pages = clamp_int(shape.kv_indptr.at(b + 1), kv_begin, shape.nnz_pages) - kv_begin;
  int kv_len = pages * shape.page_size;
  if (shape.kv_last_page_len && pages > 0)
    kv_len -= shape.page_size - clamp_int(shape.kv_last_page_len.at(b), 0, shape.page_size);

  PrefillShape keys{};
  keys.qo_len = qo_len, keys.kv_len = kv_len;
  keys.last_key = shape.causal ? kv_len - qo_len : kv_len;
  keys.first_key =
      shape.window_left < 0 ? -qo_len : clamp_int(kv_len - qo_len - shape.window_left, -qo_len, kv_len);
  const SeenKeys seen(keys, q_start, queries);
  tile.work.b = b, tile.work.head = head, tile.work.q_start = q_start;
  tile.work.tiles = seen.needed(block_n);
  tile.work.whole = seen.whole(block_n);
  tile.q_end = seen.last_row + 1;
  tile.qo_len = qo_len, tile.kv_len = kv_len;
  tile.first_key = keys.first_key, tile.last_key = keys.last_key;
  tile.values = {q_start + keys.first_key < 0 ? 0 : q_start + keys.first_key, kv_len};
  tile.q_begin = q_begin, tile.kv_begin = kv_begin;
  tile.kv_head = head / shape.group_size;
  tile.k_scale = shape.k_scale ? shape.k_scale.at(tile.kv_head) : 1.0f;
  tile.v_scale = shape.v_scale ? shape.v_scale.at(tile.kv_head) : 1.0f;
  return true;
}

// Query tiles of kBlockM rows are made from the planned ones by spans: as many neighbours of one request as
// they fill exactly.
template <int kBlockM>
inline constexpr int kSpanRows = static_cast<int>(std::lcm(kTileQueries, kBlockM));

// Finds the nth span, that is its first planned tile; false where there is no room for one. They are asked
// for in order, again and again.
FI_INLINE bool find_span(const BatchShape& shape, int span_rows, int nth, BatchQueue& queue) {
  if (span_rows == kTileQueries) {
    queue.at = nth;
  } else {
    if (nth < queue.span) queue.span = queue.at = -1;
    while (queue.span < nth && queue.at < shape.max_tiles)
      if (++queue.at < shape.max_tiles && shape.tiles[queue.at].q_begin % span_rows == 0) ++queue.span;
  }
  return queue.at < shape.max_tiles;
}

// Where every block begins.
template <int kBlockM>
FI_INLINE BatchQueue first_of_queue(const BatchShape& shape) {
  BatchQueue queue;
  if (shape.section_heads >= shape.num_qo_heads) return queue;
  const int num_tiles = clamp_int(*shape.num_tiles, 0, shape.max_tiles);
  if (kSpanRows<kBlockM> == kTileQueries) {
    queue.parts = num_tiles;
  } else {
#pragma unroll 1  // registers are short
    for (int i = 0; i < num_tiles; ++i)
      if (shape.tiles[i].q_begin % kSpanRows<kBlockM> == 0) queue.parts += kSpanRows<kBlockM> / kBlockM;
  }
  return queue;
}

// Tiles are handed out to the blocks round by round, of each tile all heads, so that those of a KV group are
// neighbours; where there are so many that L2 doesn't hold their keys, one section of heads after the other,
// as in PrefillQueue. The plan has the long ones first, and every other round runs backwards through the
// blocks. !any() when nothing is left. `behind` may be tile.queue.
template <int kBlockM, int kBlockN>
FI_INLINE void next_batch_tile(const BatchShape& shape, int blocks, int block, const BatchQueue& behind,
                               BatchTile& tile) {
  constexpr int kParts = kSpanRows<kBlockM> / kBlockM;
  tile.queue = behind;
  // Registers are short: its section is read anew where it is needed.
  BatchQueue& queue = tile.queue;
  const volatile int &section = queue.section, &parts = queue.parts;
  for (;;) {
    const int index = queue.round * blocks + (queue.round % 2 == 0 ? block : blocks - 1 - block);
    ++queue.round;
    if (shape.section_heads < shape.num_qo_heads) {
      while (index >= (section + shape.section_heads) * parts && section < shape.num_qo_heads)
        queue.section = section + shape.section_heads;
      if (section >= shape.num_qo_heads) break;
    }
    const int rest = shape.num_qo_heads - section;
    const int heads = rest < shape.section_heads ? rest : shape.section_heads;
    const int place = index - section * parts, part = place / heads, nth = part / kParts;
    if (!find_span(shape, kSpanRows<kBlockM>, nth, queue)) break;
    const PlanTile planned = shape.tiles[queue.at];  // on its way with their number
    if (queue.at >= *shape.num_tiles) break;
    const int row = (kParts - 1 - part % kParts) * kBlockM;  // the last one, the longest if causal, first
    if (make_batch_tile(shape, planned, row, section + place - part * heads, kBlockM, kBlockN, tile)) return;
  }
  tile.work.head = -1, tile.work.tiles = {0, 0};
}

// The page that `count` keys of a tile's request lie in, as the table says. -1: nowhere, or no row sees any
// of them. Looked up ahead: what the table says is compared with what there is only by checked_page().
FI_INLINE int key_page(const BatchShape& shape, const BatchTile& tile, int position, int count) {
  if (position + count <= tile.values.begin || position >= tile.values.end) return -1;
  if (!shape.is_paged) return 0;
  const Indices& table = shape.kv_indices;
  const int64_t nth = tile.kv_begin + shape.by_page_size.divide(static_cast<unsigned>(position));
  if (!table.wide) return static_cast<int>(table.at(nth));
  const int64_t page = table.at(nth);  // no page, where 32 bits don't hold it
  return page == static_cast<int>(page) ? static_cast<int>(page) : -1;
}
FI_INLINE int checked_page(const BatchShape& shape, int page) {
  return page >= 0 && page < shape.num_pages ? page : -1;
}
// Which of the page's keys it is.
FI_INLINE int key_entry(const BatchShape& shape, const BatchTile& tile, int position) {
  if (!shape.is_paged) return tile.kv_begin + position;
  return position -
         static_cast<int>(shape.by_page_size.divide(static_cast<unsigned>(position))) * shape.page_size;
}

}  // namespace fi::cuda::sm90
