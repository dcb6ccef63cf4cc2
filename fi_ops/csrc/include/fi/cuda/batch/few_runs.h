// Which part of the plan's segments a block takes: shares of units, and the runs of keys that they come to.
//
// The units of a call are those of all segments, each once for every KV head: (segment, head) pairs, one
// after the other. All of them are shared out evenly, a run of neighbours for each block. Where the split is
// fixed, every unit is a run by itself; else a run is what a block has of one pair.
#pragma once

#include "fi/cuda/batch/plan.h"

namespace fi::cuda::batch {

struct FewArgs {
  BatchAttentionParams p;
  PlanView plan;
  int group;          // query heads of a KV head
  int room;           // blocks that run at once
  int min_units;      // for less no block is started
  int most_units;     // of all segments and KV heads
  bool whole_pairs;   // with a fixed split: no block begins or ends within a pair
  int32_t* arrivals;  // [max_segments * num_kv_heads], zeroed by the kernel before: partial results left
  // Slots of partial_floats() each: acc [part_rows][acc_width], then max and sum [part_rows] each. Two for
  // each block: 0 of the pair that began before it, 1 of the one that goes on after it; with a fixed split
  // one for each unit.
  float* partials;
  int64_t num_slots;
  float* folded;  // with a fixed split: [grid][part_rows * acc_width / 4][6], a block's own pairs so far
  int part_rows, acc_width;

  // A multiple of 4: read and written as float4.
  FI_HD int partial_floats() const { return (part_rows * (acc_width + 2) + 3) / 4 * 4; }
};

// From so many units a block on, there are twice the blocks that run at once: SMs differ in speed, and a
// faster one takes more of them.
inline constexpr int kLongShare = 64;

// The units of each block: `base` of them, the first `extra` blocks one more.
struct Shares {
  int total, base, extra, blocks;

  FI_DEVICE_INLINE Shares(const FewArgs& args, int units) : total(units) {
    const int grid = static_cast<int>(gridDim.x), wanted = (units - 1) / args.min_units + 1;
    const int most = units / kLongShare >= args.room ? grid : min(grid, args.room);
    blocks = max(1, min(wanted, most));
    base = units / blocks;
    extra = units - base * blocks;
  }
  FI_DEVICE_INLINE int begin_of(int block) const {
    return block >= blocks ? total : block * base + min(block, extra);
  }
  FI_DEVICE_INLINE int block_of(int unit) const {
    const int split = extra * (base + 1);
    const int block = unit < split ? unit / (base + 1) : extra + (unit - split) / base;
    return max(0, min(block, blocks - 1));
  }
};

struct Run {
  int64_t kv_begin, mask_begin;  // of the request
  int first_unit;                // of the pair
  int pair, kv_head;
  int q_begin, qo_len, kv_len;  // of the request
  int row_begin, num_rows;
  int key_begin, key_end;  // key_begin a multiple of 16
  // The blocks that share the pair, first and last; with a fixed split this unit of the pair, and its last.
  int part, last_part;
  bool whole;  // this block has the whole pair
};

inline constexpr int kRunsAtOnce = 32;

struct RunTable {
  Run runs[kRunsAtOnce];
  int count;
  bool more;
  int begin, end;  // the block's units
  int next;        // what the next runs begin with: a pair, or a unit
};

// Finds a block's runs, kRunsAtOnce at a time, a lane each: what a chain of loads costs, it costs once for
// all. By one warp. What it remembers is in the table: registers are for the loop over slices.
template <bool kFixed>
class RunFinder {
 public:
  FI_DEVICE_INLINE RunFinder(const FewArgs& args, RunTable& table)
      : args(args),
        p(args.p),
        table(table),
        heads(static_cast<int>(p.call.num_kv_heads)),
        num_segments(args.plan.num_segments()),
        unit_keys(kFixed ? static_cast<int>(p.fixed_split_size) : static_cast<int>(kUnitKeys)),
        shares(args, num_segments > 0
                         ? max(0, min(args.plan.header->num_units, args.most_units / heads)) * heads
                         : 0) {}

  FI_DEVICE_INLINE void fill(bool is_first) {
    if (is_first) {
      begin = shares.begin_of(blockIdx.x), end = shares.begin_of(blockIdx.x + 1);
      next = first_of_block();
    } else {
      begin = table.begin, end = table.end, next = table.next;
    }
    if constexpr (kFixed) {
      fill_units();
    } else {
      fill_pairs();
    }
    if (threadIdx.x % 32 == 0) table.begin = begin, table.end = end, table.next = next;
  }

 private:
  struct Segment {
    PlanSegment s;
    Request r;
    int first;  // unit, of all pairs
    int units;  // of its keys
  };

  FI_DEVICE_INLINE int first_of_block() {
    if constexpr (kFixed) {
      if (args.whole_pairs) begin = next_pair(begin), end = next_pair(end);
      return begin;
    } else {
      if (begin >= end) return 0;
      const int n = segment_of(begin);
      const Segment segment = load(n);
      return n * heads + max(0, min((begin - segment.first) / max(segment.units, 1), heads - 1));
    }
  }

  FI_DEVICE_INLINE Segment load(int n) const {
    Segment segment;
    segment.s = args.plan.segments[n];
    segment.first = max(0, min(segment.s.first_unit, 0x7fffffff / heads)) * heads;
    segment.units = 0;
    if (segment.s.request < 0 || segment.s.request >= p.call.batch) return segment;
    segment.r = request_of(p, segment.s.request);
    const int most = (static_cast<int>(segment.r.kv_len) + unit_keys - 1) / unit_keys;
    segment.s.unit_begin = max(0, min(segment.s.unit_begin, most));
    segment.units = max(0, min(segment.s.num_units, most - segment.s.unit_begin));
    return segment;
  }

  // The segment with the unit (of all pairs): the last one that begins at it or before. For the whole warp.
  FI_DEVICE_INLINE int segment_of(int unit) const {
    const int wanted = unit / heads, lane = threadIdx.x % 32;
    int low = 0, high = num_segments;
    while (high - low > 1) {
      const int step = (high - low + 31) / 32, at = low + lane * step;
      const unsigned before =
          __ballot_sync(~0u, lane == 0 || (at < high && args.plan.segments[at].first_unit <= wanted));
      low += (31 - __clz(before)) * step;
      high = min(high, low + step);
    }
    return low;
  }

  // The same, for a unit of each lane.
  FI_DEVICE_INLINE int segment_of_lane(int unit) const {
    const int wanted = unit / heads;
    int low = 0, high = num_segments;
    while (high - low > 1) {
      const int middle = low + (high - low) / 2;
      const bool before = args.plan.segments[middle].first_unit <= wanted;
      low = before ? middle : low;
      high = before ? high : middle;
    }
    return low;
  }

  // The first unit at `unit` or after that begins a pair.
  FI_DEVICE_INLINE int next_pair(int unit) const {
    if (unit >= shares.total) return shares.total;
    const Segment segment = load(segment_of(unit));
    if (segment.units == 0) return unit;
    const int within = (unit - segment.first) % segment.units;
    return within <= 0 ? unit : unit - within + segment.units;
  }

  // Units [from, to) of the segment's own.
  FI_DEVICE_INLINE Run run_of(const Segment& segment, int n, int head, int first_unit, int from,
                              int to) const {
    const Request& r = segment.r;
    Run run;
    run.kv_begin = r.kv_begin, run.mask_begin = r.mask_begin;
    run.pair = n * heads + head, run.kv_head = head;
    run.q_begin = static_cast<int>(r.q_begin);
    run.qo_len = static_cast<int>(r.qo_len), run.kv_len = static_cast<int>(r.kv_len);
    const int rows = run.qo_len * args.group;
    run.row_begin = max(0, min(segment.s.row_begin, rows));
    run.num_rows = min(rows - run.row_begin, static_cast<int>(kSegmentRows));
    const int last_row = max(run.row_begin + run.num_rows - 1, 0);
    const int64_t first_key = keys_of_query(p, r, run.row_begin / args.group).begin / 16 * 16;
    const int64_t last_key = keys_of_query(p, r, last_row / args.group).end;
    const int64_t key_begin = int64_t{segment.s.unit_begin + from} * unit_keys,
                  key_end = int64_t{segment.s.unit_begin + to} * unit_keys;
    run.key_begin = static_cast<int>(key_begin > first_key ? key_begin : first_key);
    run.key_end = static_cast<int>(key_end < last_key ? key_end : last_key);
    run.first_unit = first_unit;
    return run;
  }

  // For each lane its run where it has one, in the order of lanes.
  FI_DEVICE_INLINE void put(bool has, const Run& run) {
    const unsigned all = __ballot_sync(~0u, has), lane = threadIdx.x % 32;
    if (has) table.runs[__popc(all & ((1u << lane) - 1))] = run;
    if (lane == 0) table.count = __popc(all);
  }

  FI_DEVICE_INLINE void fill_pairs() {
    const int n = (next + static_cast<int>(threadIdx.x % 32)) / heads;
    const int head = next + static_cast<int>(threadIdx.x % 32) - n * heads;
    bool before_end = begin < end && n < num_segments, has = false;
    Run run;
    if (before_end) {
      const Segment segment = load(n);
      const int first = segment.first + head * segment.units, past = first + segment.units;
      const int from = max(first, begin), to = min(past, end);
      before_end = first < end;
      has = from < to;
      if (has) {
        run = run_of(segment, n, head, first, from - first, to - first);
        run.part = shares.block_of(first), run.last_part = shares.block_of(past - 1);
        run.whole = run.part == run.last_part;
      }
    }
    put(has, run);
    const bool more = __all_sync(~0u, before_end);
    if (threadIdx.x % 32 == 0) table.more = more;
    next += 32;
  }

  FI_DEVICE_INLINE void fill_units() {
    const int unit = next + static_cast<int>(threadIdx.x % 32);
    bool has = unit < end;
    Run run;
    if (has) {
      const int n = segment_of_lane(unit);
      const Segment segment = load(n);
      const int at = unit - segment.first, head = at / max(segment.units, 1);
      has = segment.units > 0 && at >= 0 && head < heads;
      if (has) {
        const int first = segment.first + head * segment.units, own = unit - first;
        run = run_of(segment, n, head, first, own, own + 1);
        run.part = own, run.last_part = segment.units - 1;
        run.whole = first >= begin && first + segment.units <= end;
      }
    }
    put(has, run);
    next += 32;
    if (threadIdx.x % 32 == 0) table.more = next < end;
  }

  const FewArgs& args;
  const BatchAttentionParams& p;
  RunTable& table;
  const int heads, num_segments, unit_keys;
  const Shares shares;
  int begin, end, next;  // as in the table
};

}  // namespace fi::cuda::batch
