// The plan of a batch's attention on CUDA: one block, as all of it is scans over requests.
//
// Requests are taken kThreads at a time, a thread each: how many segments, units and tiles they have is
// summed up over the block, and segments are written at once. Tiles are sorted by counting, a tile a thread:
// counted for each class first, then placed in their order. Whatever the index tensors say, nothing is
// written outside of the plan.
#include "fi/batch_attention.h"
#include "fi/cuda/batch/plan.h"
#include "fi/cuda/launch.h"
#include "fi/cuda/ptx.h"

namespace fi::cuda {
namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
static_assert(kThreads % kTileClasses == 0);

struct Counts {
  int32_t segments, units, tiles;
};

struct PlanShared {
  Counts warps[kWarps];
  int32_t first_tile[kThreads];  // of each request of the round, and its lengths
  PlanRequest requests[kThreads];
  int32_t of_class[kTileClasses];  // tiles of each class; then where its next one belongs
  int32_t warp_sums[kTileClasses / 32];
  union {
    uint16_t of_warp[kWarps][kTileClasses];  // of a round of tiles
    PlanSegment segments[kThreads];          // to be written
  };
};

FI_DEVICE_INLINE int32_t scan_warp(int32_t x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kAll, x, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) x += other;
  }
  return x;
}

template <bool kFixed>
class Planner {
  static constexpr int kMost = kFewRows / kSegmentRows;  // segments of a request

 public:
  FI_DEVICE_INLINE Planner(const BatchPlanParams& p, PlanShared& shared)
      : p(p), shared(shared), sizes(plan_sizes(p.batch, p.nnz_qo, p.group_size)) {
#pragma unroll
    for (int s = 0; s < kMost; ++s) {
      first_query[s] = s * static_cast<int>(kSegmentRows) / static_cast<int>(p.group_size);
      last_query[s] = ((s + 1) * static_cast<int>(kSegmentRows) - 1) / static_cast<int>(p.group_size);
    }
    const PlanParts parts = PlanParts::of(p.plan, p.batch, p.nnz_qo, p.group_size);
    header = parts.header, segments = parts.segments, tiles = parts.tiles;
  }

  FI_DEVICE_INLINE void run() {
    for (int c = threadIdx.x; c < kTileClasses; c += kThreads) shared.of_class[c] = 0;
    Counts all{0, 0, 0};
    for (int64_t first = 0; first < p.batch; first += kThreads) {
      const Counts round = plan_requests</*kWrites=*/true>(first, all);
      for (int32_t t = threadIdx.x; t < round.tiles; t += kThreads)
        atomicAdd(&shared.of_class[place_of(tile_at(t))], 1);
      all.segments += round.segments, all.units += round.units, all.tiles += round.tiles;
    }
    const int64_t num_segments = clamp_index(all.segments, 0, sizes.max_segments);
    const int64_t num_tiles = clamp_index(all.tiles, 0, sizes.max_tiles);
    if (threadIdx.x == 0)
      *header =
          plan_header(p, static_cast<int32_t>(num_segments), all.units, static_cast<int32_t>(num_tiles));
    clear(reinterpret_cast<int32_t*>(segments + num_segments), reinterpret_cast<int32_t*>(tiles));
    clear(reinterpret_cast<int32_t*>(tiles + num_tiles), reinterpret_cast<int32_t*>(tiles + sizes.max_tiles));
    if (all.tiles == 0) return;
    __syncthreads();
    begin_classes();
    for (int64_t first = 0; first < p.batch; first += kThreads) {
      const Counts round = p.batch <= kThreads ? all : plan_requests</*kWrites=*/false>(first, all);
      for (int32_t t = 0; t < round.tiles; t += kThreads) place_tiles(first, t, round.tiles);
    }
  }

 private:
  FI_DEVICE_INLINE static void clear(int32_t* begin, int32_t* end) {
    for (int32_t* at = begin + threadIdx.x; at < end; at += kThreads) *at = 0;
  }

  // Requests [first, first + kThreads) of the batch, with `before` before them: leaves what tile_at() needs
  // and writes their segments (once). Their counts.
  template <bool kWrites>
  FI_DEVICE_INLINE Counts plan_requests(int64_t first, const Counts& before) {
    const int64_t b = first + threadIdx.x;
    PlanRequest r{0, 0};
    if (b < p.batch) r = plan_request(p, b);
    const int64_t rows = r.qo_len * p.group_size;
    Counts own{0, 0, 0};
    UnitRange units[kMost] = {};
    if (rows > kFewRows) {
      own.tiles = static_cast<int32_t>((r.qo_len + kTileQueries - 1) / kTileQueries);
    } else {
#pragma unroll
      for (int s = 0; s < kMost; ++s) {
        if (s * kSegmentRows >= rows) continue;
        units[s] = units_of(r, s);
        own.units += units[s].count;
        ++own.segments;
      }
    }
    Counts up_to{scan_warp(own.segments), scan_warp(own.units), scan_warp(own.tiles)};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();  // what the round before left has been used
    if (lane == 31) shared.warps[warp] = up_to;
    __syncthreads();
    const Counts of_warp = shared.warps[lane];
    const Counts warps{scan_warp(of_warp.segments), scan_warp(of_warp.units), scan_warp(of_warp.tiles)};
    auto start = [&](int32_t up_to_own, int32_t value, int32_t up_to_warp, int32_t warp_value) {
      return up_to_own - value + __shfl_sync(kAll, up_to_warp - warp_value, warp);
    };
    int32_t segment = before.segments + start(up_to.segments, own.segments, warps.segments, of_warp.segments);
    int32_t unit = before.units + start(up_to.units, own.units, warps.units, of_warp.units);
    shared.first_tile[threadIdx.x] = start(up_to.tiles, own.tiles, warps.tiles, of_warp.tiles);
    shared.requests[threadIdx.x] = r;
    const Counts all{__shfl_sync(kAll, warps.segments, 31), __shfl_sync(kAll, warps.units, 31),
                     __shfl_sync(kAll, warps.tiles, 31)};
    for (int32_t from = 0; kWrites && from < all.segments; from += kThreads) {
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kMost; ++s) {
        const int32_t at = segment + s - before.segments - from;
        if (s < own.segments && at >= 0 && at < kThreads)
          shared.segments[at] = {static_cast<int32_t>(b), static_cast<int32_t>(s * kSegmentRows), unit,
                                 units[s].begin, units[s].count};
        unit += units[s].count;
      }
      unit -= own.units;
      __syncthreads();
      constexpr int kWords = sizeof(PlanSegment) / 4;
      const int64_t first_segment = before.segments + from;
      const int64_t room = clamp_index(sizes.max_segments - first_segment, 0, kThreads);
      const int64_t words = kWords * clamp_index(all.segments - from, 0, room);
      for (int n = threadIdx.x; n < words; n += kThreads)
        reinterpret_cast<int32_t*>(segments + first_segment)[n] =
            reinterpret_cast<const int32_t*>(shared.segments)[n];
    }
    __syncthreads();
    return all;
  }

  // Of segment s of a request with few rows: what segment_units() finds, without its divisions. Rows end
  // where the queries do.
  FI_DEVICE_INLINE UnitRange units_of(const PlanRequest& r, int s) const {
    const int64_t last = last_query[s] < r.qo_len ? last_query[s] : r.qo_len - 1;
    const PlanKeys keys = keys_seen(p, r, first_query[s], last);
    const int64_t unit_keys = kFixed ? p.fixed_split_size : kUnitKeys, begin = keys.begin / unit_keys;
    return {static_cast<int32_t>(begin),
            static_cast<int32_t>((keys.end + unit_keys - 1) / unit_keys - begin)};
  }

  struct Tile {
    int request;  // of the round
    int64_t q_begin;
  };

  // Tile t of the round: that of the last request whose first tile is t or before (those without tiles begin
  // where the next one does). A request's tiles count from its last one.
  FI_DEVICE_INLINE Tile tile_at(int32_t t) const {
    int low = 0;
#pragma unroll
    for (int step = kThreads / 2; step > 0; step /= 2) {
      if (shared.first_tile[low + step] <= t) low += step;
    }
    const int64_t last = (shared.requests[low].qo_len - 1) / kTileQueries;
    return {low, (last - (t - shared.first_tile[low])) * kTileQueries};
  }

  FI_DEVICE_INLINE int place_of(const Tile& tile) const {
    return kTileClasses - 1 - tile_class_of(p, shared.requests[tile.request], tile.q_begin);
  }

  // Counts of classes to where each begins.
  FI_DEVICE_INLINE void begin_classes() {
    const int c = threadIdx.x, lane = c % 32;
    int32_t count = 0, up_to = 0;
    if (c < kTileClasses) {
      count = shared.of_class[c];
      up_to = scan_warp(count);
      if (lane == 31) shared.warp_sums[c / 32] = up_to;
    }
    __syncthreads();
    if (c < kTileClasses) {
      for (int w = 0; w < c / 32; ++w) up_to += shared.warp_sums[w];
      shared.of_class[c] = up_to - count;
    }
  }

  // Tiles [t, t + kThreads) of the round to their places: behind those of their class that come before.
  FI_DEVICE_INLINE void place_tiles(int64_t first, int32_t t, int32_t end) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int n = threadIdx.x; n < kWarps * kTileClasses / 2; n += kThreads)
      reinterpret_cast<uint32_t*>(shared.of_warp)[n] = 0;
    __syncthreads();
    t += threadIdx.x;
    const bool has = t < end;
    Tile tile{};
    int place = kTileClasses;
    if (has) {
      tile = tile_at(t);
      place = place_of(tile);
    }
    const unsigned same = __match_any_sync(kAll, place);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (has && rank == 0) shared.of_warp[warp][place] = static_cast<uint16_t>(__popc(same));
    __syncthreads();
    // Of each class: where each warp's tiles begin, and the next round's.
    if (threadIdx.x < kTileClasses) {
      const int c = threadIdx.x;
      int32_t sum = 0;
#pragma unroll 8
      for (int w = 0; w < kWarps; ++w) {
        const int32_t count = shared.of_warp[w][c];
        shared.of_warp[w][c] = static_cast<uint16_t>(sum);
        sum += count;
      }
      of_round = sum;
    }
    __syncthreads();
    if (has) {
      const int32_t at = shared.of_class[place] + shared.of_warp[warp][place] + rank;
      if (at >= 0 && at < sizes.max_tiles)
        tiles[at] = {static_cast<int32_t>(first + tile.request), static_cast<int32_t>(tile.q_begin)};
    }
    __syncthreads();
    if (threadIdx.x < kTileClasses) shared.of_class[threadIdx.x] += of_round;
  }

  const BatchPlanParams& p;
  PlanShared& shared;
  const PlanSizes sizes;
  int first_query[kMost], last_query[kMost];  // of a request's segments
  PlanHeader* header;
  PlanSegment* segments;
  PlanTile* tiles;
  int32_t of_round = 0;  // tiles of class threadIdx.x
};

template <bool kFixed>
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const __grid_constant__ BatchPlanParams p, int32_t* zeroed, int64_t num_zeroed) {
  allow_next_kernel();
  wait_for_previous_kernel();
  Planner<kFixed>(p, *reinterpret_cast<PlanShared*>(dynamic_smem())).run();
  for (int64_t i = threadIdx.x; i < num_zeroed; i += kThreads) zeroed[i] = 0;
}

}  // namespace

void make_plan(const BatchPlanParams& p, int32_t* zeroed, int64_t num_zeroed, const Gpu& gpu) {
  const auto run = [&]<bool kFixed>() {
    launch_with<plan_kernel<kFixed>, sizeof(PlanShared)>(gpu, dim3(1), dim3(kThreads), /*overlap=*/true, p,
                                                         zeroed, num_zeroed);
  };
  p.fixed_split_size ? run.template operator()<true>() : run.template operator()<false>();
}

void batch_attention_plan(const BatchPlanParams& p, const Gpu& gpu) { make_plan(p, nullptr, 0, gpu); }

}  // namespace fi::cuda
