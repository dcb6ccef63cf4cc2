// A row that a team of blocks works on: its shared memory, the first look at it, the token at which a sum
// over ids reaches a target; and how many blocks a row gets.
#pragma once

#include <algorithm>

#include "fi/cuda/sampling_select.h"

namespace fi::cuda {

inline constexpr int64_t kKeptBytes = 64 * 1024;   // of a row in a block: two blocks fit on a multiprocessor
inline constexpr int64_t kReadBytes = 264 * 1024;  // of a row for a block, at most, where not all is kept
inline constexpr int64_t kWorthABlock = 4096;      // tokens
inline constexpr int64_t kManyRows = 96;           // for fewer, blocks that keep all of a row are faster

// The bins of the first pass (fi/cuda/sampling_early.h).
struct EarlyScale {
  float base, octaves;
  bool used;
};

// Of each warp of the team: first and last order key.
struct RowEnds {
  uint32_t keys[2][kMaxTeam * kSampleWarps];
};

// In dynamic shared memory, in front of what is kept of the row: copies to where 128-byte lines don't begin
// are slower.
struct alignas(128) RowScratch {
  Team<kSampleThreads>::Scratch team;
  SelectScratch select;
  RowEnds ends;
  float warp_mass[kMaxTeam * kSampleWarps];  // of each warp of the team, by the early bins
  EarlyScale early;
  SamplingDraw draw;
  int64_t index;                          // of the draw
  alignas(16) unsigned char slice[64];    // a RowSlice
  alignas(16) unsigned char weights[48];  // the row's Weights
  bool use_top_k, use_top_p;
};

template <class Source, Keep kKeep>
using RowSlice = Slice<Source, kSampleThreads, kKeep, uint32_t(sizeof(RowScratch))>;

FI_DEVICE_INLINE RowScratch& row_scratch() { return *reinterpret_cast<RowScratch*>(dynamic_smem()); }

template <class Row>
FI_DEVICE_INLINE Row& shared_slice() {
  static_assert(sizeof(Row) <= sizeof(RowScratch::slice));
  return *reinterpret_cast<Row*>(row_scratch().slice);
}
template <class Row>
FI_DEVICE_INLINE typename Row::Weights& shared_weights() {
  static_assert(sizeof(typename Row::Weights) <= sizeof(RowScratch::weights));
  return *reinterpret_cast<typename Row::Weights*>(row_scratch().weights);
}

// The largest and the smallest of a row's values that may weigh something; not a number if any value is not.
struct Range {
  float max, min;
};

// How many octaves below the maximum tokens are so light that all of the row's together are less than
// 1 - top_p of the largest one, which is not where top-p ends; a hundredth of that is little to a guess of
// its place.
FI_DEVICE_INLINE float octaves_of_top_p(int32_t tokens, double top_p) {
  return log2f(float(tokens) / float(1.0 - top_p)) + 7.0f;
}

// Those of a thread.
struct ThreadRange {
  float high = -kInfinity, low = kInfinity;  // finite for the lower one
  bool nan = false;

  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N]) {
#pragma unroll
    for (const float value : x) {
      nan |= value != value;
      high = fmaxf(high, value);
      if (value > -kInfinity) low = fminf(low, value);
    }
  }
};

// The range of a row from those of the threads; one barrier of the team.
FI_DEVICE_INLINE Range range_of_row(const Team<kSampleThreads>& team, RowEnds& ends,
                                    const ThreadRange& mine) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float high = mine.nan ? __uint_as_float(0x7fffffffu) : mine.high;
  uint32_t first = __reduce_min_sync(kAllLanes, order_key(high + 0.0f)),
           last = __reduce_max_sync(kAllLanes, order_key(mine.low + 0.0f));
  team.tell_all(&ends.keys[0][team.rank * kSampleWarps + warp], first);
  team.tell_all(&ends.keys[1][team.rank * kSampleWarps + warp], last);
  team.sync();
  for (uint32_t i = lane; i < team.size * kSampleWarps; i += 32) {
    first = ::min(first, ends.keys[0][i]);
    last = ::max(last, ends.keys[1][i]);
  }
  return {key_logit(__reduce_min_sync(kAllLanes, first)), key_logit(__reduce_max_sync(kAllLanes, last))};
}

// The lowest id of a row with that value, if it has one; else kAllPlaces.
template <class Row>
__device__ uint64_t first_id_of_row(Team<kSampleThreads>& team, const Row& slice, float value) {
  uint64_t first = kAllPlaces;
  slice.for_each([&](float x, int32_t id) {
    if (x == value && uint64_t(id) < first) first = uint64_t(id);
  });
  return team.min(first);
}

template <class Row>
struct TeamRow {
  using Weights = typename Row::Weights;

  RowScratch& s;
  Row& slice;        // in s
  Weights& weights;  // in s
  Team<kSampleThreads>& team;

  __device__ explicit TeamRow(Team<kSampleThreads>& team)
      : s(row_scratch()), slice(shared_slice<Row>()), weights(shared_weights<Row>()), team(team) {}

  __device__ Range range_of(const ThreadRange& mine) const { return range_of_row(team, s.ends, mine); }
  __device__ uint64_t first_id_of(float value) const { return first_id_of_row(team, slice, value); }

  // Calls found(id) in one thread of the team: for the first id at which the sum over ids of weight_of(x, id)
  // exceeds target_of(the sum of all). `sums` has the sums by warp; where all are 0 all threads call none().
  template <class Target, class WeightOf, class Found, class None>
  __device__ void find_by_id(const WarpSums& by_warp, const Target& target_of, const WeightOf& weight_of,
                             const Found& found, const None& none) const {
    // Which warp's: all warps find out by themselves.
    constexpr uint32_t kSums = kMaxTeam * kSampleWarps / 32;
    const uint32_t lane = threadIdx.x % 32;
    uint64_t sums[kSums], up_to = 0;
#pragma unroll
    for (uint32_t i = 0; i < kSums; ++i) {
      sums[i] = lane * kSums + i < team.size * kSampleWarps ? by_warp.values[lane * kSums + i] : 0;
      up_to += sums[i];
    }
    const uint64_t of_lane = up_to;
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, up_to, step);
      if (lane >= step) up_to += other;
    }
    const uint64_t total = __shfl_sync(kAllLanes, up_to, 31);
    if (total == 0) return none();
    uint64_t left = target_of(total);
    const int owner = __ffs(int(__ballot_sync(kAllLanes, up_to > left))) - 1;
    left -= up_to - of_lane;
    uint32_t warp = lane * kSums;
#pragma unroll
    for (uint32_t i = 0; i + 1 < kSums; ++i) {
      if (warp != lane * kSums + i || left < sums[i]) continue;
      left -= sums[i];
      ++warp;
    }
    left = __shfl_sync(kAllLanes, left, owner);
    warp = __shfl_sync(kAllLanes, warp, owner);
    if (warp / kSampleWarps != team.rank) return;

    // Its range, by the whole block.
    constexpr int kLogits = Row::kLogits;
    const int32_t end = slice.end_of(warp % kSampleWarps);
    for (int32_t base = slice.begin_of(warp % kSampleWarps); base < end; base += kSampleThreads) {
      const int32_t vector = base + int32_t(threadIdx.x), id = vector * kLogits - slice.lead();
      uint64_t weight[kLogits] = {}, mine = 0;
      if (vector < end) {
        float x[kLogits];
        slice.read(vector, warp % kSampleWarps, x);
#pragma unroll
        for (int j = 0; j < kLogits; ++j) mine += weight[j] = weight_of(x[j], id + j);
      }
      const uint64_t before = team.scan(mine);
      if (before <= left && left - before < mine) {
        uint64_t rest = left - before;
        int32_t j = 0;
#pragma unroll
        for (int i = 0; i + 1 < kLogits; ++i) {
          if (j != i || rest < weight[i]) continue;
          rest -= weight[i];
          ++j;
        }
        found(int64_t(id + j));
      }
      if (base + kSampleThreads < end)
        left -= team.sum(mine, Among::kBlock);  // a large number behind its place
    }
  }

  // Draws from the tokens up to `cut`, of which s.select.kept has the weights: calls write(id) in one thread,
  // or none() in all where nothing weighs anything.
  template <class Write, class None>
  __device__ void draw(uint64_t cut, float uniform, const Write& write, const None& none) const {
    const Weights w = weights;
    const Kept kept(cut);
    find_by_id(
        s.select.kept, [&](uint64_t total) { return uint64_t(draw_target(int64_t(total), uniform)); },
        [&](float x, int32_t id) { return kept(x, id) ? weigh(w, x) : 0; }, write, none);
  }
};

// How a row's blocks start: before anything that its peers may write to a block has started, and before they
// have started themselves, nothing may be shared; between the two a block may read its slice.
FI_DEVICE_INLINE Team<kSampleThreads> begin_team() {
  Team<kSampleThreads> team(cluster_rank(), cluster_size());
  if (team.size > 1) cluster_arrive();
  wait_for_previous_kernel();
  allow_next_kernel();
  return team;
}
FI_DEVICE_INLINE void team_has_started(const Team<kSampleThreads>& team) {
  __syncthreads();
  if (team.size > 1) cluster_wait();
}

// How the rows of a launch are spread over blocks. The answer is the same however they are.
struct RowLaunch {
  unsigned blocks;  // a row
  bool keep;        // all of the row in shared memory
  int32_t room;     // vectors of each warp that are kept
  size_t smem;
  int a_multiprocessor;  // blocks that fit on one

  // As many blocks a row as keep it in shared memory with two of them on a multiprocessor, and more while
  // there are multiprocessors to spare. Where so many blocks can't run at once, fewer of them a row, which
  // keep what they can: passes that read the second-level cache cost less than rows that wait for others.
  // That is so from about a hundred rows on, and not for kernels that write rows.
  // `element_size`: bytes of a value; `scratch`: of a block's shared memory beside the row.
  RowLaunch(const Gpu& gpu, int64_t rows, int64_t vocab_size, int64_t element_size, bool writes_rows = false,
            int64_t scratch = sizeof(RowScratch), int a_multiprocessor = 2)
      : blocks(1), a_multiprocessor(a_multiprocessor) {
    const int64_t vectors = (vocab_size * element_size + 15) / 16 + 1;
    auto a_warp = [&] {
      const int64_t warps = int64_t(blocks) * kSampleWarps;
      return (vectors + warps - 1) / warps;
    };
    auto a_block = [&] { return a_warp() * kSampleWarps * 16; };  // bytes
    if (has_clusters(gpu)) {
      while (blocks < kMaxTeam && a_block() > kKeptBytes) blocks *= 2;
      while (blocks < kMaxTeam && rows * blocks * 2 <= gpu.num_sms && vocab_size > blocks * kWorthABlock)
        blocks *= 2;
      // Clusters of eight leave out up to a sixteenth of the blocks that there is room for.
      while (!writes_rows && rows >= kManyRows && blocks > 2 &&
             rows * blocks > 2 * gpu.num_sms * (blocks == 8 ? 15 : 16) / 16 && 2 * a_block() <= kReadBytes)
        blocks /= 2;
    }
    const int64_t part = (gpu.max_block_smem + 1024) / a_multiprocessor - 1024;
    const bool one_each = rows * blocks <= gpu.num_sms;  // multiprocessor
    keep = scratch + a_block() <= (one_each ? gpu.max_block_smem : part);
    room = int32_t(keep ? a_warp() : std::min(a_warp(), (part - scratch) / (kSampleWarps * 16)));
    smem = size_t(scratch + room * kSampleWarps * 16);
  }

  // About how many rows are worked on at the same time.
  int64_t rows_at_once(const Gpu& gpu) const {
    return std::max<int64_t>(1, a_multiprocessor * gpu.num_sms / int64_t(blocks));
  }

  // With a team for each row: kernel(args...), which calls begin_team().
  template <class... Params, class... Args>
  void run(const Gpu& gpu, void (*kernel)(Params...), int64_t rows, Args&&... args) const {
    launch_clusters(gpu, kernel, dim3(unsigned(rows) * blocks), blocks, dim3(kSampleThreads), smem,
                    /*overlap=*/true, std::forward<Args>(args)...);
  }
};

}  // namespace fi::cuda
