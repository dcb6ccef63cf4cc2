// Sampling from logits: a cluster of blocks a row, which it reads from memory once (notes and measurements:
// docs/kernels/sampling_cuda.md).
//
// 1. Fetch and scan: the row's maximum, NaN, +inf.
// 2. Where the filters end (fi/cuda/sampling_select.h). A small top-k: the k-th largest of the threads'
// maxima
//    bounds the k-th logit from below, so the tokens from there on are the list, and top-p ends in it too.
//    Else a histogram of the row.
// 3. The draw: the weight that is kept, by warp; then one warp looks into its range of ids.
#include "fi/sampling.h"

#include <math.h>

#include "fi/cuda/sampling_select.h"

namespace fi::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kKeptBytes = 64 * 1024;  // of a row in a block: two blocks fit on a multiprocessor
constexpr int64_t kWorthABlock = 4096;     // tokens

// In dynamic shared memory, in front of what is kept of the row.
template <class T>
struct alignas(16) SampleScratch {
  Team<kThreads>::Scratch team;
  SelectScratch select;
  uint64_t warp_sums[kThreads / 32];
  SamplingDraw draw;
  Slice<T, kThreads> slice;
  Weights weights;
  float min_p_distance;
  bool use_top_k, use_top_p;
};

template <class T>
struct Sampler {
  const SamplingParams& p;
  SampleScratch<T>& s;
  Team<kThreads>& team;

  // Of the draw.
  __device__ int64_t index() const { return blockIdx.x / team.size; }

  __device__ void write(int64_t id, bool valid) const {
    if (team.rank == 0 && threadIdx.x == 0) p.write(index(), id, valid);
  }

  // What all threads need and one can find out.
  __device__ void prepare_draw(float fixed_scale) const {
    if (threadIdx.x != 0) return;
    SamplingDraw d = p.draw(index());
    // Values that no check has seen, NaN among them: what follows relies on these ranges.
    d.temperature = d.temperature > 0.0f ? d.temperature : 0.0f;
    d.uniform = d.uniform > 0.0f ? fminf(d.uniform, 1.0f - 0x1p-24f) : 0.0f;
    s.draw = d;
    s.use_top_k = d.top_k > 0 && d.top_k < p.vocab_size;
    s.use_top_p = d.top_p < 1.0;
    s.weights.exponent_scale = exponent_scale_of(d.temperature);
    s.weights.fixed_scale = fixed_scale;
    // p >= min_p * max(p), as a distance from the largest logit: a prefix, as the other filters are
    s.min_p_distance = d.min_p > 0.0 ? float(-double(d.temperature) * log(d.min_p)) : kInfinity;
  }

  __device__ void run(float fixed_scale) {
    prepare_draw(fixed_scale);
    s.slice.wait();
    __syncthreads();
    if (team.size > 1) cluster_wait();  // the others have started

    float high = -kInfinity, low = kInfinity;  // of this thread, finite for the lower one
    bool nan = false;
    s.slice.for_each([&](float x, int32_t) {
      nan |= x != x;
      high = fmaxf(high, x);
      low = fminf(low, x > -kInfinity ? x : kInfinity);
    });
    const uint64_t ends = team.max_halves(nan ? ~0u : ~order_key(high), order_key(low));
    float max = key_logit(~uint32_t(ends >> 32)), min = key_logit(uint32_t(ends));
    if (max != max || max == -kInfinity) return write(0, false);
    if (max == kInfinity) {
      if (threadIdx.x == 0) s.slice.infinite = true;
      __syncthreads();
      high = high == kInfinity ? 0.0f : -kInfinity;
      max = min = 0.0f;
    }

    const SamplingDraw& d = s.draw;
    if (d.temperature == 0.0f || d.top_p == 0.0 || (d.top_k == 1 && p.exact_ties)) {
      uint64_t first = kAllPlaces;
      s.slice.for_each([&](float x, int32_t id) {
        if (x == max && uint64_t(id) < first) first = uint64_t(id);
      });
      return write(int64_t(team.min(first)), true);
    }

    if (threadIdx.x == 0) s.weights.max = max;
    uint64_t cut = kAllPlaces;
    if (s.use_top_k || s.use_top_p) {
      set_eligible(p.top_k_first || !s.use_top_p ? s.min_p_distance : kInfinity);
      cut = end_of_filters(high, max - min);
    }
    set_eligible(s.min_p_distance);
    draw(cut);
  }

  __device__ void set_eligible(float distance) const {
    __syncthreads();
    if (threadIdx.x == 0) s.weights.eligible = distance;
    __syncthreads();
  }

  // The place up to which top-k and top-p keep the row's tokens; `high` is the largest logit of this thread,
  // `spread` the distance between the row's largest and smallest finite ones.
  __device__ uint64_t end_of_filters(float high, float spread) const {
    const SamplingDraw& d = s.draw;
    // Bins are for what weighs something and is there.
    const float there = fmaxf(spread * s.weights.exponent_scale * (kBins / (kBins - 2.0f)), 0x1p-20f);
    const float octaves = fminf(log2f(s.weights.fixed_scale) + 1.0f, there);
    Selector<T, kThreads> selector{s.slice, s.weights, team, s.select};
    selector.set_bins(octaves);
    uint64_t mass = 0;  // top-p's whole

    // A list of all that is kept, if it is known to be short.
    bool all_listed = uint32_t(s.slice.n) <= kListed;
    if (all_listed || (s.use_top_k && d.top_k <= team.size * kThreads / 4)) {
      Bracket bracket{0, kBins - 1, 0, 0};
      if (!all_listed) {
        selector.count_threads(high);
        bracket.last = min(selector.bracket_of_count(uint64_t(d.top_k)).last, kBins - 2);
      }
      if (s.use_top_p && !p.top_k_first) mass = selector.sum_row(kAllPlaces);
      uint64_t before;
      all_listed = selector.list_bins(bracket, before);
    }
    if (!all_listed) {
      // Tokens so light that all of the row's together are less than 1 - top_p of the largest one are not
      // where top-p ends.
      const float relevant = log2f(float(s.slice.n) / float(1.0 - d.top_p)) + 1.0f;
      if (!s.use_top_k) selector.set_bins(fminf(octaves, relevant));
      mass = selector.count_row(s.use_top_p);
    }

    uint64_t cut = kAllPlaces;
#pragma unroll 1
    for (int filter = 0; filter < 2; ++filter) {
      const bool by_count = filter == 0;
      if (!(by_count ? s.use_top_k : s.use_top_p)) continue;
      uint64_t target = uint64_t(d.top_k), in_front = 0;
      if (!by_count) {
        const uint64_t kept = all_listed          ? selector.mass_listed(cut)
                              : cut == kAllPlaces ? mass
                                                  : selector.sum_row(cut);
        target = uint64_t(mass_target(d.top_p, int64_t(p.top_k_first ? kept : mass)));
        if (target > kept) break;
      }
      if (!all_listed) {
        const Bracket bracket =
            by_count ? selector.bracket_of_count(target) : selector.bracket_of_mass(target);
        if (by_count && bracket.last == kBins - 1) continue;  // it keeps all that weighs something
        in_front = selector.list_end(by_count, bracket, target);
      }
      cut = selector.end_in_list(by_count, target - in_front, cut);
      if (by_count && !p.exact_ties) cut |= 0xffffffffu;
    }
    return cut;
  }

  // Writes the first kept id at which the cumulative weight exceeds uniform * total.
  __device__ void draw(uint64_t cut) const {
    const Weights weights = s.weights;
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Kept kept(cut);
    auto weigh = [&](float x, int32_t id) { return kept(x, id) ? weights.weigh(x) : 0; };
    uint64_t sum = Selector<T, kThreads>::sum_thread(s.slice, s.weights, cut);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    if (lane == 0) s.warp_sums[warp] = sum;
    __syncthreads();
    uint64_t of_block = 0, before = 0;
#pragma unroll 4
    for (uint32_t w = 0; w < kThreads / 32; ++w) {
      if (w == warp) before = of_block;
      of_block += s.warp_sums[w];
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

    constexpr int kLogits = Slice<T, kThreads>::kLogits;
    const Slice<T, kThreads> slice = s.slice;
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
          if (left < weight) return p.write(index(), id + j, true);
          left -= weight;
        }
        return;
      }
      left -= __shfl_sync(kAllLanes, up_to, 31);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) sample(SamplingParams p, float fixed_scale, bool keep) {
  auto& s = *reinterpret_cast<SampleScratch<T>*>(dynamic_smem());
  Team<kThreads> team(cluster_rank(), cluster_size());
  if (team.size > 1) cluster_arrive();
  const int64_t index = blockIdx.x / team.size;
  const int64_t row = p.indices.data == nullptr ? index : p.indices.at(index);
  if (row < 0 || row >= p.rows) {  // of indices that no check has seen
    if (team.size > 1) cluster_wait();
    if (team.rank == 0 && threadIdx.x == 0) p.write(index, 0, false);
    return;
  }
  const Slice<T, kThreads> slice(static_cast<const T*>(p.logits) + row * p.row_stride, p.vocab_size,
                                 team.rank, team.size, keep ? uint32_t(sizeof(SampleScratch<T>)) : 0);
  slice.fetch();
  if (threadIdx.x == 0) s.slice = slice;
  Sampler<T>{p, s, team}.run(fixed_scale);
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
  const bool keep = int64_t(sizeof(SampleScratch<T>)) + kept_bytes() <= gpu.max_block_smem;
  launch_clusters(gpu, &sample<T>, dim3(unsigned(p.batch) * blocks), blocks, dim3(kThreads),
                  sizeof(SampleScratch<T>) + (keep ? size_t(kept_bytes()) : 0), p,
                  float(int64_t{1} << weight_fraction_bits(p.vocab_size)), keep);
}

}  // namespace

void top_k_top_p_sample(const SamplingParams& p, const Gpu& gpu) {
  switch (p.dtype) {
    case DType::bf16:
      return sample_all<bf16>(p, gpu);
    case DType::f16:
      return sample_all<f16>(p, gpu);
    default:
      return sample_all<float>(p, gpu);
  }
}

}  // namespace fi::cuda
