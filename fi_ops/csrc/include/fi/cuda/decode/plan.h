// How a call is cut into work, and which part of it a block takes.
//
// A segment is one KV head of one batch entry with up to kRows query rows; its units are its live tiles. All
// units of the call, segment after segment, are shared out evenly: each block takes a run of them, so a
// ragged batch balances by what lives, and the blocks that share a segment join their results. Only the
// device knows how many units there are (a mask, positions), so the grid is an upper bound.
#pragma once

#include "fi/cuda/decode/live_tiles.h"

namespace fi::cuda::decode {

inline constexpr int kMaxWarps = 8;

// Rows of a static cache that the call itself brings: key and value [batch, num_kv_heads, count, head_dim],
// of which row i of batch entry b belongs into slot slots.at(b, i), whether a query sees that or not; the
// keys take row i of the rope table.
struct NewRows {
  const void* key;
  const void* value;
  int64_t k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n;
  Positions slots;
  int count;  // 0: the cache has all rows
};

struct Plan {
  int group;       // query heads a KV head
  int rows;        // group * qo_len
  int row_blocks;  // a segment each
  int num_segments;
  int num_groups, group_segments;  // segments with the same live tiles: all of a batch entry, or of a KV head
  int uniform_tiles;               // live tiles of every segment; -1: the device must look
  KeyRange range;                  // allowed_keys of every batch entry, unless range_is_data
  bool rope_chunks;                // the query is rotated, eight elements at once
  NewRows added;                   // cluster_kernel only
  int min_units;                   // for less than this many no block is started
  TileLists lists;
  int32_t* arrivals;  // [num_segments], zero at first: blocks that have left their partial result
  // [grid][2][partial_floats]: acc [part_rows][acc_width], then max and sum [part_rows] each. A block has at
  // most two partial results: slot 0 of the segment that began before it, slot 1 of the one that goes on
  // after it.
  float* partials;
  int part_rows, acc_width;

  // A multiple of 4: read and written as float4.
  FI_HD int partial_floats() const { return (part_rows * (acc_width + 2) + 3) / 4 * 4; }
};

// What most calls are, for which a kernel is compiled with less than half of the code: all rows of a batch
// entry see the same keys, a range or what a boolean mask leaves of it; weights come from scaled products
// alone, and only the result is wanted. In a model's step the code comes from DRAM, and fetching that of the
// general kernel takes longer than running it.
inline bool is_plain(const AttentionParams& p, const Plan& plan) {
  const bool same_keys = (!p.causal && p.window_left < 0) || p.qo_len == 1;
  return same_keys && (p.mask == nullptr || p.mask_dtype == DType::boolean) && p.logits_soft_cap == 0.0f &&
         !p.alibi_slopes && !p.sinks && p.lse == nullptr && !p.rope_keys &&
         (p.rope.cos == nullptr || plan.rope_chunks);
}

struct SegmentPlace {
  int b, kv_head, row_begin;
};

FI_DEVICE_INLINE SegmentPlace place_of(const AttentionParams& p, const Plan& plan, int rows_a_block,
                                       int segment) {
  const int head = plan.row_blocks == 1 ? segment : segment / plan.row_blocks;
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  return {head / num_kv_heads, head % num_kv_heads, (segment - head * plan.row_blocks) * rows_a_block};
}

// Row `row` of a segment: position in the query and query head.
struct QueryRow {
  int i, head;
};

FI_DEVICE_INLINE QueryRow query_row(const Plan& plan, const SegmentPlace& at, int row) {
  row += at.row_begin;
  const int i = plan.rows == plan.group ? 0 : row / plan.group;
  return {i, at.kv_head * plan.group + row - i * plan.group};
}

FI_DEVICE_INLINE KeyRange range_of(const AttentionParams& p, const Plan& plan, int b) {
  return range_is_data(p) ? allowed_keys(p, b) : plan.range;
}

FI_DEVICE_INLINE int tiles_of_group(const AttentionParams& p, const Plan& plan, int group) {
  if (plan.uniform_tiles >= 0) return plan.uniform_tiles;
  const bool by_head = plan.lists.heads > 1;
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int b = by_head ? group / num_kv_heads : group;
  if (plan.lists.entries)
    return __ldcg(&plan.lists.counts[plan.lists.list_of(b, by_head ? group % num_kv_heads : 0)]);
  return tiles_of(range_of(p, plan, b));
}

// The units of each block: `base` of them, the first `extra` blocks one more.
struct Shares {
  int total, base, extra;

  FI_DEVICE_INLINE Shares(const Plan& plan, int units) : total(units) {
    const int wanted = (units + plan.min_units - 1) / plan.min_units;
    const int blocks = max(1, min(static_cast<int>(gridDim.x), wanted));
    base = units / blocks;
    extra = units - base * blocks;
  }
  FI_DEVICE_INLINE int begin_of(int block) const { return min(total, block * base + min(block, extra)); }
  FI_DEVICE_INLINE int block_of(int unit) const {
    const int split = extra * (base + 1);
    return unit < split ? unit / (base + 1) : extra + (unit - split) / base;
  }
};

// Steps through the segments that have units.
struct SegmentWalk {
  int index, first_unit, tiles;

  FI_DEVICE_INLINE void next(const AttentionParams& p, const Plan& plan, int end_unit) {
    first_unit += tiles;
    ++index;
    if (first_unit >= end_unit || index % plan.group_segments != 0) return;
    int group = index / plan.group_segments;
#pragma unroll 1
    while (group < plan.num_groups && (tiles = tiles_of_group(p, plan, group)) == 0) ++group;
    index = group * plan.group_segments;
  }
};

struct FindShared {
  int warp_units[kMaxWarps];
  int group, first_unit, tiles;  // of the group that the block begins in
};

struct Work {
  Shares shares;
  int begin, end;     // this block's units
  SegmentWalk first;  // the segment that holds unit `begin`, where begin < end
};

// For all threads of the block; has barriers.
FI_DEVICE_INLINE Work find_work(const AttentionParams& p, const Plan& plan, FindShared& shared) {
  int group = 0, first_unit = 0, tiles = plan.uniform_tiles, total = 0;
  auto own = [&](Shares s) { return Work{s, s.begin_of(blockIdx.x), s.begin_of(blockIdx.x + 1), {}}; };
  if (plan.uniform_tiles >= 0) {
    total = plan.uniform_tiles * plan.num_segments;
  } else {
    // Each thread counts a run of groups.
    const int each = (plan.num_groups + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
    const int g_begin = min(static_cast<int>(threadIdx.x) * each, plan.num_groups);
    const int g_end = min(g_begin + each, plan.num_groups);
    int units = 0;
#pragma unroll 1
    for (int g = g_begin; g < g_end; ++g) units += tiles_of_group(p, plan, g) * plan.group_segments;
    int before = units;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int other = __shfl_up_sync(~0u, before, delta);
      if (lane >= delta) before += other;
    }
    if (lane == 31) shared.warp_units[warp] = before;
    __syncthreads();
    before -= units;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
      if (w < warp) before += shared.warp_units[w];
      total += shared.warp_units[w];
    }
    const int begin = own(Shares(plan, total)).begin;
    if (begin >= before && begin < before + units) {
#pragma unroll 1
      for (int g = g_begin; g < g_end; ++g) {
        const int t = tiles_of_group(p, plan, g);
        if (begin < before + t * plan.group_segments) {
          shared.group = g, shared.first_unit = before, shared.tiles = t;
          break;
        }
        before += t * plan.group_segments;
      }
    }
    __syncthreads();
    if (begin < total) group = shared.group, first_unit = shared.first_unit, tiles = shared.tiles;
  }
  Work work = own(Shares(plan, total));
  if (work.begin < work.end) {
    // All groups have the same size, or `group` is the one that holds the unit.
    const int skipped = (work.begin - first_unit) / tiles;
    work.first = {group * plan.group_segments + skipped, first_unit + skipped * tiles, tiles};
  }
  return work;
}

}  // namespace fi::cuda::decode
