// What one attention call over a dense batch reads and writes: every request as long as the others, one mask
// for all.
//
// A source tells the loop (attention_loop.h) the lengths of its requests, where their rows lie, which tiles
// of keys a block of rows must read, and what mask they meet there.
#pragma once

#include "fi/cpu/attention_tasks.h"
#include "fi/cpu/key_rows.h"
#include "fi/cpu/live_tiles.h"
#include "fi/cpu/online_softmax.h"
#include "fi/fp8.h"

namespace fi::FI_ISA {

// A block of rows (row = query position * group + head of the group) of one request and KV head.
struct Block {
  int64_t b, kv_head, index, row_begin, row_end, i_begin, i_end;
  int64_t at = 0;  // its first row in a worker's buffers

  FI_HD int64_t num_rows() const { return row_end - row_begin; }
};

// How the loop cuts a source.
struct Tiling {
  int64_t group, block_rows, tile;
};

template <class T>
class DenseSource {
 public:
  using Rows = StridedRows<T>;
  static constexpr bool kUneven = false;  // requests have the same length

  DenseSource(const AttentionParams& params, const Parallel& parallel) : p(params), parallel(parallel) {}

  int64_t count() const { return p.batch; }
  int64_t qo_len(int64_t) const { return p.qo_len; }
  int64_t kv_len(int64_t) const { return p.kv_len; }
  int64_t max_qo_len() const { return p.qo_len; }
  int64_t max_kv_len() const { return p.kv_len; }
  int64_t split_keys() const { return 0; }
  Fp8 kv_dtype() const { return Fp8::none; }
  float k_scale(int64_t) const { return 1.0f; }
  float v_scale(int64_t) const { return 1.0f; }

  const T* query(int64_t b, int64_t h, int64_t i) const {
    return static_cast<const T*>(p.query) + b * p.q_stride_b + h * p.q_stride_h + i * p.q_stride_n;
  }
  T* out(int64_t b, int64_t h, int64_t i) const {
    return static_cast<T*>(p.out) + b * p.o_stride_b + h * p.o_stride_h + i * p.o_stride_n;
  }
  float* lse(int64_t b, int64_t h, int64_t i) const {
    return p.lse + (b * p.num_qo_heads + h) * p.qo_len + i;
  }
  int64_t position(int64_t b, int64_t i) const { return query_position(p, b, i); }
  int64_t rope_row(int64_t, int64_t i) const { return i + p.rope_q_offset; }
  Range allowed(int64_t b, int64_t i) const { return allowed_keys(p, b, i); }
  Range allowed(int64_t b, int64_t i0, int64_t i1) const { return allowed_keys(p, b, i0, i1); }

  // ---- rows of K and V ----

  // Whether the heads of a key are neighbours in memory and read the same tiles.
  bool heads_together() const {
    return p.k_stride_h == p.head_dim_qk && p.v_stride_h == p.head_dim_vo &&
           (!p.mask || p.mask_stride_h == 0);
  }

  struct TileRows {
    Rows keys, values;

    void carve(Carver&, int64_t) {}
  };

  void locate(TileRows& rows, int64_t b, int64_t kv_head, int64_t begin, int64_t) const {
    const T* k = static_cast<const T*>(p.key) + b * p.k_stride_b + kv_head * p.k_stride_h;
    const T* v = static_cast<const T*>(p.value) + b * p.v_stride_b + kv_head * p.v_stride_h;
    rows.keys = {reinterpret_cast<const char*>(k + begin * p.k_stride_n), p.k_stride_n * int64_t(sizeof(T))};
    rows.values = {reinterpret_cast<const char*>(v + begin * p.v_stride_n),
                   p.v_stride_n * int64_t(sizeof(T))};
  }

  // Rows of `size` elements in a buffer.
  struct BufferRows {
    Rows rows;

    void carve(Carver&, int64_t, const T* buffer, int64_t size) {
      rows = {reinterpret_cast<const char*>(buffer), size * int64_t(sizeof(T))};
    }
  };

  // ---- what to read ----

  // Scans the mask: each block gets the list of its live tiles.
  void prepare(const Tiling& t) {
    tiling = t;
    num_blocks = ceil_div(t.group * p.qo_len, t.block_rows);
    num_tiles = ceil_div(p.kv_len, t.tile);
    if (!p.mask) return;
    mask_batches = p.mask_stride_b == 0 && !keys_differ_by_batch(p) ? 1 : p.batch;
    mask_heads = p.mask_stride_h == 0 ? 1 : p.num_kv_heads;
    const int64_t num_lists = mask_batches * mask_heads * num_blocks;
    lists = allocate<int32_t>(p.scratch, num_lists * num_tiles);
    list_sizes = allocate<int64_t>(p.scratch, num_lists);
    float* tops = allocate<float>(p.scratch, num_lists * num_tiles);
    for_each_task(parallel, num_lists, [&](int64_t n) {
      const int64_t row_begin = n % num_blocks * t.block_rows, rows = t.group * p.qo_len;
      const int64_t row_end = row_begin + t.block_rows < rows ? row_begin + t.block_rows : rows;
      const int64_t kv_head = n / num_blocks % mask_heads, b = n / num_blocks / mask_heads;
      list_sizes[n] =
          list_live_tiles(p, b, kv_head * t.group, (kv_head + 1) * t.group, row_begin / t.group,
                          (row_end - 1) / t.group + 1, t.tile, lists + n * num_tiles, tops + n * num_tiles);
    });
  }

  int64_t live_tiles(const Block& k, const Range& range) const {
    if (p.mask) return list_sizes[list_of(k)];
    return ceil_div(range.end, tiling.tile) - range.begin / tiling.tile;
  }

  // Entry n of the block's live tiles; `range` is what its rows are allowed.
  int32_t live_tile(const Block& k, const Range& range, int64_t n) const {
    if (p.mask) return lists[list_of(k) * num_tiles + n];
    return tile_entry(range.begin / tiling.tile + n, true);
  }

  // What of keys `r` of a tile the block must read, where the tile may be entered and left at any key; none:
  // an empty range. `masked`: whether the mask says anything there.
  Range narrow(const Block& k, Range r, bool at_any_key, bool& masked) const {
    return at_any_key && masked && p.mask_dtype == DType::boolean ? trim(k, r) : r;
  }

  // Which of a request's tiles its blocks read at all, where a mask decides; `wanted` is [num_kv_heads]
  // [num_tiles].
  bool mark_wanted(int64_t b, uint8_t* wanted) const {
    if (!p.mask) return false;
    for (int64_t n = 0; n < p.num_kv_heads * num_blocks; ++n) {
      Block k{};
      k.b = b, k.kv_head = n / num_blocks, k.index = n % num_blocks;
      const int64_t list = list_of(k);
      for (int64_t t = 0; t < list_sizes[list]; ++t) {
        wanted[k.kv_head * num_tiles + tile_index(lists[list * num_tiles + t])] = 1;
      }
    }
    return true;
  }

  // Whether rows of one query, or of all queries, meet the same mask.
  bool mask_differs_by_head() const { return p.mask_stride_h != 0; }
  bool mask_differs_by_query() const { return p.mask_stride_q != 0; }

  void stage(float* dst, int64_t b, int64_t h, int64_t i, int64_t begin, int64_t n) const {
    stage_mask(dst, p, b, h, i, begin, n);
  }

 private:
  int64_t list_of(const Block& k) const {
    return ((mask_batches == 1 ? 0 : k.b) * mask_heads + (mask_heads == 1 ? 0 : k.kv_head)) * num_blocks +
           k.index;
  }

  // Narrows [begin, end) to the first and last key that a bool mask shows to any row of the block: the edge
  // of a static cache's live part is not read past, whatever lies there.
  Range trim(const Block& k, Range r) const {
    auto shown = [&](int64_t j) {
      const int64_t heads = p.mask_stride_h == 0 ? 1 : tiling.group,
                    i_end = p.mask_stride_q == 0 ? k.i_begin + 1 : k.i_end;
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t i = k.i_begin; i < i_end; ++i) {
          if (static_cast<const uint8_t*>(
                  p.mask)[k.b * p.mask_stride_b + (k.kv_head * tiling.group + h) * p.mask_stride_h +
                          i * p.mask_stride_q + j * p.mask_stride_k]) {
            return true;
          }
        }
      }
      return false;
    };
    while (r.begin < r.end && !shown(r.begin)) ++r.begin;
    while (r.begin < r.end && !shown(r.end - 1)) --r.end;
    return r;
  }

  const AttentionParams& p;
  const Parallel& parallel;
  Tiling tiling{};
  int64_t num_blocks = 0, num_tiles = 0;
  int64_t mask_batches = 1, mask_heads = 1;
  int32_t* lists =
      nullptr;  // [mask_batches][mask_heads][num_blocks][num_tiles]: live tiles, where there is a mask
  int64_t* list_sizes = nullptr;  // [mask_batches][mask_heads][num_blocks]
};

}  // namespace fi::FI_ISA
