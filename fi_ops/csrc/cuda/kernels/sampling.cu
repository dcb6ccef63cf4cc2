// Sampling from logits: a cluster of blocks a row, which it reads from memory once (notes and measurements:
// docs/kernels/sampling_cuda.md).
//
// 1. Fetch and scan: the row's maximum, NaN, +inf.
// 2. A small top-k: all that it can keep is a short list, from which one block draws
//    (fi/cuda/sampling_short.h). Else where the filters end, by a histogram (fi/cuda/sampling_select.h).
// 3. The draw: the weight that is kept, by warp; then one warp looks into its range of ids.
#include "fi/sampling.h"

#include <math.h>

#include <algorithm>

#include "fi/cuda/sampling_short.h"
#include "fi/dispatch.h"

namespace fi::cuda {
namespace {

constexpr int64_t kKeptBytes = 64 * 1024;  // of a row in a block: two blocks fit on a multiprocessor
constexpr int64_t kWorthABlock = 4096;     // tokens

// In dynamic shared memory, in front of what is kept of the row.
struct alignas(16) SampleScratch {
  Team<kSampleThreads>::Scratch team;
  SelectScratch select;
  uint32_t warp_keys[2]
                    [kMaxTeam * kSampleThreads / 32];  // of each warp of the team: first and last order key
  SamplingDraw draw;
  int64_t index;                        // of the draw
  alignas(16) unsigned char slice[64];  // a RowSlice
  Weights weights;
  float min_p_distance;
  bool use_top_k, use_top_p;
};

template <class T, bool kKept>
using RowSlice = Slice<T, kSampleThreads, kKept, uint32_t(sizeof(SampleScratch))>;

// This block's part of a row.
template <class Row>
__device__ Row slice_of(const SamplingParams& p, int64_t row, const Team<kSampleThreads>& team) {
  return {static_cast<const typename Row::Logit*>(p.input) + row * p.row_stride, p.vocab_size, team.rank,
          team.size};
}

// Where the filters end, from the row's histogram, whatever the logits.
struct Ends {
  uint64_t cut;
  uint32_t listed;  // as in the Selector
  bool has_sums;
};
template <class Row>
FI_DEVICE_NOINLINE Ends search_ends(float scale, bool top_k_first, bool exact_ties) {
  auto& s = *reinterpret_cast<SampleScratch*>(dynamic_smem());
  const Row& slice = *reinterpret_cast<const Row*>(s.slice);
  Team<kSampleThreads> team(cluster_rank(), cluster_size());
  Selector<Row> selector{slice, s.weights, team, s.select};
  Bins<Row>& bins = selector.bins;
  bins.scale = scale;
  uint64_t cut = kAllPlaces;
#pragma unroll 1
  for (int filter = 0; filter < 2; ++filter) {
    const bool by_count = filter == 0;
    if (!(by_count ? s.use_top_k : s.use_top_p)) continue;
    team.sync();  // lists and sums are no more in use
    uint64_t target = uint64_t(s.draw.top_k);
    if (!by_count) {
      uint64_t kept = s.select.mass;
      if (cut != kAllPlaces) {
        selector.sum_row(cut, s.select.of_row);
        kept = s.select.of_row.total(team);
      }
      target = uint64_t(mass_target(s.draw.top_p, int64_t(top_k_first ? kept : s.select.mass)));
      if (target > kept) break;
    }
    const Bracket bracket = by_count ? bins.bracket_of_count(target) : bins.bracket_of_mass(target);
    if (by_count && bracket.last == kBins - 1) continue;  // it keeps all that weighs something
    selector.find_end(by_count, bracket, target, cut);
    if (by_count && !exact_ties) cut |= 0xffffffffu;
  }
  team.sync();  // as what the other Team shares comes next
  return {cut, selector.listed, selector.has_sums};
}

template <class Row>
struct Sampler {
  const SamplingParams& p;
  SampleScratch& s;
  Row& slice;  // in s
  Team<kSampleThreads>& team;

  __device__ void write(int64_t id, bool valid) const {
    if (team.rank == 0 && threadIdx.x == 0) p.write(s.index, id, valid);
  }

  // A draw's row comes to the second-level cache while others are worked on.
  __device__ void prefetch_row(int64_t index) const {
    if (index >= p.batch) return;
    const int64_t row = p.indices.data == nullptr ? index : p.indices.at(index);
    if (row >= 0 && row < p.rows) slice_of<Row>(p, row, team).prefetch();
  }

  // What all threads need and one can find out.
  __device__ void prepare_draw(SamplingDraw d, int fraction_bits) const {
    // Values that no check has seen, NaN among them: what follows relies on these ranges.
    d.temperature = d.temperature > 0.0f ? d.temperature : 0.0f;
    d.uniform = d.uniform > 0.0f ? fminf(d.uniform, 1.0f - 0x1p-24f) : 0.0f;
    s.draw = d;
    s.use_top_k = d.top_k > 0 && d.top_k < p.vocab_size;
    s.use_top_p = d.top_p < 1.0;
    s.weights.exponent_scale = exponent_scale_of(d.temperature);
    s.weights.set_fraction_bits(fraction_bits);
    // p >= min_p * max(p), as a distance from the largest logit: a prefix, as the other filters are
    s.min_p_distance = d.min_p > 0.0 ? float(-double(d.temperature) * log(d.min_p)) : kInfinity;
    s.select.num_found = 0;
  }

  // `row`: what will be in `slice`.
  __device__ void run(const Row& row, int64_t index, int64_t rows_at_once, int fraction_bits) {
    float high = -kInfinity, low = kInfinity;  // of this thread, finite for the lower one
    bool nan = false;
    row.fetch(
        [&] {
          if (threadIdx.x != 0) return;
          slice = row;
          s.index = index;
          prepare_draw(p.draw(index), fraction_bits);
        },
        [&](const auto& x, int32_t) {
#pragma unroll
          for (const float logit : x) {
            nan |= logit != logit;
            high = fmaxf(high, logit);
            if (logit > -kInfinity) low = fminf(low, logit);
          }
        });
    if (threadIdx.x == kSampleThreads - 1) prefetch_row(index + rows_at_once);
    __syncthreads();
    if (team.size > 1) cluster_wait();  // the others have started
    ShortDraw<Row> short_draw{slice, s.weights, team, s.select};
    const bool try_short = s.use_top_k && short_draw.fits(s.draw.top_k, team.size) &&
                           (!s.use_top_p || (p.top_k_first && (p.min_p_first || s.draw.min_p <= 0.0))) &&
                           s.draw.temperature > 0.0f;
    if (try_short) short_draw.publish(high);
    const Range range = range_of_row(nan ? __uint_as_float(0x7fffffff) : high, low);
    float max = range.max, min = range.min;
    if (max != max || max == -kInfinity) return write(0, false);
    if (max == kInfinity) {
      slice.set_infinite();
      __syncthreads();
      max = min = 0.0f;
    }

    const SamplingDraw& d = s.draw;
    if (d.temperature == 0.0f || d.top_p == 0.0 || (d.top_k == 1 && p.exact_ties)) {
      uint64_t first = kAllPlaces;
      slice.for_each([&](float x, int32_t id) {
        if (x == max && uint64_t(id) < first) first = uint64_t(id);
      });
      return write(int64_t(team.min(first)), true);
    }

    if (threadIdx.x == 0) {
      s.weights.max = max;
      s.weights.eligible = p.min_p_first || !s.use_top_p ? s.min_p_distance : kInfinity;
    }
    if (try_short && range.max < kInfinity) {
      // Of logits far below the maximum one more or less in a step does no harm.
      const float steps = fminf(max - min, fmaxf(64.0f, 64.0f / s.weights.exponent_scale));
      if (short_draw.draw(d, s.use_top_p, p.exact_ties, max, steps,
                          [&](int64_t id, bool valid) { p.write(s.index, id, valid); }))
        return;
    }
    __syncthreads();
    Selector<Row> selector{slice, s.weights, team, s.select};
    const bool filters = s.use_top_k || s.use_top_p;
    const uint64_t cut = filters ? end_of_filters(selector, max - min) : kAllPlaces;
    // What weighs something in the filters' last pass does so in the draw, but for min-p behind top-p.
    if (selector.has_sums && s.weights.eligible == s.min_p_distance) {
      selector.add_listed(cut);
      __syncthreads();
    } else {
      if (filters) team.sync();  // sums are no more in use
      if (threadIdx.x == 0) s.weights.eligible = s.min_p_distance;
      __syncthreads();
      selector.sum_row(cut, s.select.kept);
    }
    draw(cut);
  }

  // The largest and the smallest finite logit of the row (not a number if any is), from those of the threads.
  struct Range {
    float max, min;
  };
  __device__ Range range_of_row(float high, float low) const {
    constexpr uint32_t kWarps = kSampleThreads / 32;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t first = __reduce_min_sync(kAllLanes, order_key(high + 0.0f)),
             last = __reduce_max_sync(kAllLanes, order_key(low + 0.0f));
    team.tell_all(&s.warp_keys[0][team.rank * kWarps + warp], first);
    team.tell_all(&s.warp_keys[1][team.rank * kWarps + warp], last);
    team.sync();
    for (uint32_t i = lane; i < team.size * kWarps; i += 32) {
      first = ::min(first, s.warp_keys[0][i]);
      last = ::max(last, s.warp_keys[1][i]);
    }
    return {key_logit(__reduce_min_sync(kAllLanes, first)), key_logit(__reduce_max_sync(kAllLanes, last))};
  }

  // The place up to which top-k and top-p keep the row's tokens; `spread` is the distance between the row's
  // largest and smallest finite logits.
  __device__ uint64_t end_of_filters(Selector<Row>& selector, float spread) const {
    const SamplingDraw& d = s.draw;
    // Bins are for what weighs something and is there.
    const float there = fmaxf(spread * s.weights.exponent_scale * (kBins / (kBins - 2.0f)), 0x1p-20f);
    float octaves = fminf(float(s.weights.fraction_bits + 1), there);
    // Tokens so light that all of the row's together are less than 1 - top_p of the largest one are not where
    // top-p ends; a hundredth of that is little to the guess of its place.
    if (!s.use_top_k) octaves = fminf(octaves, log2f(float(slice.n) / float(1.0 - d.top_p)) + 7.0f);
    Bins<Row>& bins = selector.bins;
    bins.set(octaves);
    bins.count_row(s.use_top_p);

    if (!s.use_top_k) {
      const uint64_t target = uint64_t(mass_target(d.top_p, int64_t(s.select.mass)));
      const Bracket likely = bins.likely_bracket_of_mass(target);
      uint64_t cut = kAllPlaces;
      if (likely.inside <= kShort && selector.list_bins(likely) &&
          selector.end_of_short_list(likely, target, cut))
        return cut;
    }
    const auto ends = search_ends<Row>(bins.scale, p.top_k_first, p.exact_ties);
    selector.listed = ends.listed;
    selector.has_sums = ends.has_sums;
    return ends.cut;
  }

  // Writes the first kept id at which the cumulative weight exceeds uniform * total; s.select.kept has the
  // sums.
  __device__ void draw(uint64_t cut) {
    // Which warp's: all warps find out by themselves.
    constexpr uint32_t kSums = kMaxTeam * kSampleWarps / 32;
    const uint32_t lane = threadIdx.x % 32;
    uint64_t sums[kSums], up_to = 0;
#pragma unroll
    for (uint32_t i = 0; i < kSums; ++i) {
      sums[i] = lane * kSums + i < team.size * kSampleWarps ? s.select.kept.values[lane * kSums + i] : 0;
      up_to += sums[i];
    }
    const uint64_t of_lane = up_to;
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, up_to, step);
      if (lane >= step) up_to += other;
    }
    const uint64_t total = __shfl_sync(kAllLanes, up_to, 31);
    if (total == 0) return write(0, false);  // of values that no check has seen
    uint64_t left = uint64_t(draw_target(int64_t(total), s.draw.uniform));
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
    const Weights weights = s.weights;
    const Kept kept(cut);
    constexpr int kLogits = Row::kLogits;
    const int32_t end = slice.end_of(warp % kSampleWarps);
    for (int32_t base = slice.begin_of(warp % kSampleWarps); base < end; base += kSampleThreads) {
      const int32_t vector = base + int32_t(threadIdx.x), id = vector * kLogits - slice.lead();
      uint64_t weight[kLogits] = {}, mine = 0;
      if (vector < end) {
        float x[kLogits];
        slice.read(vector, x);
#pragma unroll
        for (int j = 0; j < kLogits; ++j) mine += weight[j] = kept(x[j], id + j) ? weights.weigh(x[j]) : 0;
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
        p.write(s.index, id + j, true);
      }
      if (base + kSampleThreads < end)
        left -= team.sum(mine, Among::kBlock);  // a large number behind its place
    }
  }
};

template <class T, bool kKept>
__global__ void __launch_bounds__(kSampleThreads, kKept ? 2 : 1)
    sample(SamplingParams p, int64_t rows_at_once, int fraction_bits) {
  auto& s = *reinterpret_cast<SampleScratch*>(dynamic_smem());
  Team<kSampleThreads> team(cluster_rank(), cluster_size());
  if (team.size > 1) cluster_arrive();
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t index = blockIdx.x / team.size;
  const int64_t row = p.indices.data == nullptr ? index : p.indices.at(index);
  if (row < 0 || row >= p.rows) {  // of indices that no check has seen
    if (team.size > 1) cluster_wait();
    if (team.rank == 0 && threadIdx.x == 0) p.write(index, 0, false);
    return;
  }
  using Row = RowSlice<T, kKept>;
  static_assert(sizeof(Row) <= sizeof(s.slice));
  Sampler<Row>{p, s, *reinterpret_cast<Row*>(s.slice), team}.run(slice_of<Row>(p, row, team), index,
                                                                 rows_at_once, fraction_bits);
}

template <class T>
void sample_all(const SamplingParams& p, const Gpu& gpu) {
  // As many blocks a row as keep it in shared memory with two of them on a multiprocessor, and more while
  // there are multiprocessors to spare. The answer is the same however many.
  unsigned blocks = 1;
  auto kept_bytes = [&] {
    const int64_t vectors = (p.vocab_size * int64_t(sizeof(T)) + 15) / 16 + 1;
    const int64_t warps = int64_t(blocks) * kSampleWarps;
    return (vectors + warps - 1) / warps * kSampleWarps * 16;
  };
  if (has_clusters(gpu)) {
    while (blocks < kMaxTeam && kept_bytes() > kKeptBytes) blocks *= 2;
    while (blocks < kMaxTeam && p.batch * blocks * 2 <= gpu.num_sms && p.vocab_size > blocks * kWorthABlock)
      blocks *= 2;
  }
  const bool keep = int64_t(sizeof(SampleScratch)) + kept_bytes() <= gpu.max_block_smem;
  const int64_t rows_at_once = std::max<int64_t>(1, 2 * gpu.num_sms / blocks);
  launch_clusters(gpu, keep ? &sample<T, true> : &sample<T, false>, dim3(unsigned(p.batch) * blocks), blocks,
                  dim3(kSampleThreads), sizeof(SampleScratch) + (keep ? size_t(kept_bytes()) : 0),
                  /*overlap=*/true, p, rows_at_once,
                  std::min(weight_fraction_bits(p.vocab_size), kMaxFractionBits));
}

}  // namespace

void top_k_top_p_sample(const SamplingParams& p, const Gpu& gpu) {
  dispatch_float(p.dtype, [&](auto t) { sample_all<decltype(t)>(p, gpu); });
}

}  // namespace fi::cuda
