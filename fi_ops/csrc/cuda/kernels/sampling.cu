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

constexpr int kThreads = 512;
constexpr int64_t kKeptBytes = 64 * 1024;  // of a row in a block: two blocks fit on a multiprocessor
constexpr int64_t kWorthABlock = 4096;     // tokens

// In dynamic shared memory, in front of what is kept of the row.
struct alignas(16) SampleScratch {
  Team<kThreads>::Scratch team;
  SelectScratch select;
  uint32_t warp_keys[2][kMaxTeam * kThreads / 32];  // of each warp of the team: first and last order key
  SamplingDraw draw;
  int64_t index;                        // of the draw
  alignas(16) unsigned char slice[64];  // a RowSlice
  Weights weights;
  float min_p_distance;
  bool use_top_k, use_top_p;
};

template <class T, bool kKept>
using RowSlice = Slice<T, kThreads, kKept, uint32_t(sizeof(SampleScratch))>;

template <class Row>
struct Sampler {
  const SamplingParams& p;
  SampleScratch& s;
  Row& slice;  // in s
  Team<kThreads>& team;

  __device__ void write(int64_t id, bool valid) const {
    if (team.rank == 0 && threadIdx.x == 0) p.write(s.index, id, valid);
  }

  // What all threads need and one can find out.
  __device__ void prepare_draw(SamplingDraw d, int fraction_bits) const {
    if (threadIdx.x != 0) return;
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
  }

  // `asked`: the draw, in thread 0.
  __device__ void run(const SamplingDraw& asked, int fraction_bits) {
    prepare_draw(asked, fraction_bits);
    slice.wait();
    __syncthreads();
    if (team.size > 1) cluster_wait();  // the others have started

    float high = -kInfinity, low = kInfinity;  // of this thread, finite for the lower one
    bool nan = false;
    slice.for_each([&](float x, int32_t) {
      nan |= x != x;
      high = fmaxf(high, x);
      if (x > -kInfinity) low = fminf(low, x);
    });
    ShortDraw<Row, kThreads> short_draw{slice, s.weights, team, s.select};
    const bool try_short = s.use_top_k && short_draw.fits(s.draw.top_k, team.size) &&
                           (p.top_k_first || !s.use_top_p) && s.draw.temperature > 0.0f;
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
      s.weights.eligible = p.top_k_first || !s.use_top_p ? s.min_p_distance : kInfinity;
    }
    if (try_short && range.max < kInfinity) {
      // Of logits far below the maximum one more or less in a step does no harm.
      const float steps = fminf(max - min, fmaxf(64.0f, 64.0f / s.weights.exponent_scale));
      if (short_draw.draw(d, s.use_top_p, p.exact_ties, max, steps,
                          [&](int64_t id, bool valid) { p.write(s.index, id, valid); }))
        return;
    }
    uint64_t cut = kAllPlaces;
    bool has_sums = false;
    if (s.use_top_k || s.use_top_p) {
      __syncthreads();
      cut = end_of_filters(max - min, has_sums);
    }
    if (!has_sums) {
      __syncthreads();
      if (threadIdx.x == 0) s.weights.eligible = s.min_p_distance;
      __syncthreads();
      const uint64_t sum =
          Team<kThreads>::sum_of_warp(Selector<Row, kThreads>::sum_thread(slice, s.weights, cut));
      if (threadIdx.x % 32 == 0) s.select.warp_sums[threadIdx.x / 32] = sum;
      __syncthreads();
    }
    draw(cut);
  }

  // The largest and the smallest finite logit of the row (not a number if any is), from those of the threads.
  struct Range {
    float max, min;
  };
  __device__ Range range_of_row(float high, float low) const {
    constexpr uint32_t kWarps = kThreads / 32;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t first = __reduce_min_sync(kAllLanes, order_key(high + 0.0f)),
             last = __reduce_max_sync(kAllLanes, order_key(low + 0.0f));
    if (lane < team.size) {
      *team.at(&s.warp_keys[0][team.rank * kWarps + warp], lane) = first;
      *team.at(&s.warp_keys[1][team.rank * kWarps + warp], lane) = last;
    }
    team.sync();
    for (uint32_t i = lane; i < team.size * kWarps; i += 32) {
      first = ::min(first, s.warp_keys[0][i]);
      last = ::max(last, s.warp_keys[1][i]);
    }
    return {key_logit(__reduce_min_sync(kAllLanes, first)), key_logit(__reduce_max_sync(kAllLanes, last))};
  }

  // The place up to which top-k and top-p keep the row's tokens; `spread` is the distance between the row's
  // largest and smallest finite logits. `has_sums`: warp_sums are there as well.
  __device__ uint64_t end_of_filters(float spread, bool& has_sums) const {
    const SamplingDraw& d = s.draw;
    // Bins are for what weighs something and is there.
    const float there = fmaxf(spread * s.weights.exponent_scale * (kBins / (kBins - 2.0f)), 0x1p-20f);
    float octaves = fminf(float(s.weights.fraction_bits + 1), there);
    // Tokens so light that all of the row's together are less than 1 - top_p of the largest one are not where
    // top-p ends.
    if (!s.use_top_k) octaves = fminf(octaves, log2f(float(slice.n) / float(1.0 - d.top_p)) + 1.0f);
    Selector<Row, kThreads> selector{slice, s.weights, team, s.select};
    selector.set_bins(octaves);
    selector.count_row(s.use_top_p);

    uint64_t cut = kAllPlaces;
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
      const bool by_count = filter == 0;
      if (!(by_count ? s.use_top_k : s.use_top_p)) continue;
      uint64_t target = uint64_t(d.top_k), in_front = 0;
      if (!by_count) {
        const uint64_t kept = cut == kAllPlaces ? s.select.mass : selector.sum_row(cut);
        target = uint64_t(mass_target(d.top_p, int64_t(p.top_k_first ? kept : s.select.mass)));
        if (target > kept) break;
      }
      // By weight: first where it is likely to end, then where it is sure to.
      bool sure = by_count, found = false;
      Bracket bracket = by_count ? selector.bracket_of_count(target)
                                 : selector.likely_bracket_of_mass(target, !s.use_top_k);
      if (by_count && bracket.last == kBins - 1) continue;  // it keeps all that weighs something
#pragma unroll 1
      while (!found) {
        if (sure || bracket.inside <= kListed) {
          in_front = selector.list_end(by_count, bracket, target);
          found = sure || selector.is_in_list(in_front, target);
        }
        if (!found) bracket = selector.bracket_of_mass(target);
        sure = true;
      }
      cut = selector.end_in_list(by_count, target - in_front, cut);
      if (by_count && !p.exact_ties) cut |= 0xffffffffu;
    }
    // What weighs something in top-p's pass does so in the draw, but for min-p behind top-p.
    has_sums =
        selector.has_sums && s.use_top_p && !s.use_top_k && (p.top_k_first || s.min_p_distance == kInfinity);
    if (has_sums) {
      __syncthreads();
      selector.add_listed(cut);
      __syncthreads();
    }
    return cut;
  }

  // Writes the first kept id at which the cumulative weight exceeds uniform * total.
  __device__ void draw(uint64_t cut) const {
    const Weights weights = s.weights;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Kept kept(cut);
    auto weigh = [&](float x, int32_t id) { return kept(x, id) ? weights.weigh(x) : 0; };
    const uint64_t sum = s.select.warp_sums[warp];
    uint64_t of_block = 0, before = 0;
#pragma unroll 4
    for (uint32_t w = 0; w < kThreads / 32; ++w) {
      if (w == warp) before = of_block;
      of_block += s.select.warp_sums[w];
    }
    team.share(of_block, 0);
    uint64_t total = 0;
#pragma unroll 1
    for (uint32_t block = 0; block < team.size; ++block) {
      if (block == team.rank) before += total;
      total += team.shared(block).a;
    }
    if (total == 0) return write(0, false);  // of values that no check has seen
    uint64_t left = uint64_t(draw_target(int64_t(total), s.draw.uniform)) - before;
    if (left >= sum) return;  // another warp's (or negative, as a large number)

    constexpr int kLogits = Row::kLogits;
    const int32_t end = slice.warp_end();
    for (int32_t base = slice.warp_begin(); base < end; base += 32) {
      const int32_t vector = base + int32_t(lane), id = vector * kLogits - slice.lead();
      float x[kLogits];
      uint64_t mine = 0;
      if (vector < end) {
        slice.read(vector, x);
        for (int j = 0; j < kLogits; ++j) mine += weigh(x[j], id + j);
      }
      uint64_t up_to = mine;
      for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(kAllLanes, up_to, step);
        if (lane >= uint32_t(step)) up_to += other;
      }
      const uint32_t reached = __ballot_sync(kAllLanes, up_to > left);
      if (reached != 0) {
        if (int(lane) != __ffs(int(reached)) - 1) return;
        left -= up_to - mine;
        for (int j = 0; j < kLogits; ++j) {
          const uint64_t weight = weigh(x[j], id + j);
          if (left < weight) return p.write(s.index, id + j, true);
          left -= weight;
        }
        return;
      }
      left -= __shfl_sync(kAllLanes, up_to, 31);
    }
  }
};

template <class T, bool kKept>
__global__ void __launch_bounds__(kThreads, kKept ? 2 : 1) sample(SamplingParams p, int fraction_bits) {
  auto& s = *reinterpret_cast<SampleScratch*>(dynamic_smem());
  Team<kThreads> team(cluster_rank(), cluster_size());
  if (team.size > 1) cluster_arrive();
  const int64_t index = blockIdx.x / team.size;
  const int64_t row = p.indices.data == nullptr ? index : p.indices.at(index);
  if (row < 0 || row >= p.rows) {  // of indices that no check has seen
    if (team.size > 1) cluster_wait();
    if (team.rank == 0 && threadIdx.x == 0) p.write(index, 0, false);
    return;
  }
  using Row = RowSlice<T, kKept>;
  static_assert(sizeof(Row) <= sizeof(s.slice));
  const Row slice(static_cast<const T*>(p.logits) + row * p.row_stride, p.vocab_size, team.rank, team.size);
  SamplingDraw draw{};
  if (threadIdx.x == 0) draw = p.draw(index);  // its loads are under way with the row's
  slice.fetch();
  Row& shared = *reinterpret_cast<Row*>(s.slice);
  if (threadIdx.x == 0) {
    shared = slice;
    s.index = index;
  }
  Sampler<Row>{p, s, shared, team}.run(draw, fraction_bits);
}

template <class T>
void sample_all(const SamplingParams& p, const Gpu& gpu) {
  // As many blocks a row as keep it in shared memory with two of them on a multiprocessor, and more while
  // there are multiprocessors to spare. The answer is the same however many.
  unsigned blocks = 1;
  auto kept_bytes = [&] {
    const int64_t vectors = (p.vocab_size * int64_t(sizeof(T)) + 15) / 16 + 1;
    return (vectors + blocks - 1) / blocks * 16;
  };
  if (has_clusters(gpu)) {
    while (blocks < kMaxTeam && kept_bytes() > kKeptBytes) blocks *= 2;
    while (blocks < kMaxTeam && p.batch * blocks * 2 <= gpu.num_sms && p.vocab_size > blocks * kWorthABlock)
      blocks *= 2;
  }
  const bool keep = int64_t(sizeof(SampleScratch)) + kept_bytes() <= gpu.max_block_smem;
  launch_clusters(gpu, keep ? &sample<T, true> : &sample<T, false>, dim3(unsigned(p.batch) * blocks), blocks,
                  dim3(kThreads), sizeof(SampleScratch) + (keep ? size_t(kept_bytes()) : 0),
                  /*overlap=*/false, p, std::min(weight_fraction_bits(p.vocab_size), kMaxFractionBits));
}

}  // namespace

void top_k_top_p_sample(const SamplingParams& p, const Gpu& gpu) {
  dispatch_float(p.dtype, [&](auto t) { sample_all<decltype(t)>(p, gpu); });
}

}  // namespace fi::cuda
