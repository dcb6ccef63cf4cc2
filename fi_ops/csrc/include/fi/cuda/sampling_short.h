// A small top-k: what can be kept is known to be a short list, which one block sorts.
//
// The k-th largest of the maxima of pairs of threads bounds the k-th value from below: as many tokens as that
// lie above it. All blocks know all maxima, so that each finds the bound by itself; what a block has above it
// becomes its share of a list, which all blocks then have. So two barriers of the team are all.
#pragma once

#include "fi/cuda/sampling_select.h"

namespace fi::cuda {

template <class Row>
struct ShortTop {
  using Weights = typename Row::Weights;
  static constexpr int Threads = kSampleThreads;
  static constexpr int kSteps = Threads;  // of the distance; the last one is for all that is below the others

  const Row& slice;
  const Weights& shared_weights;
  Team<Threads>& team;
  SelectScratch& s;
  float max = 0, scale = 0;  // steps of the distance from the maximum
  float end = 0;             // what is listed is in front of that step

  // Whether a top-k is small enough.
  static __device__ bool fits(int64_t top_k, uint32_t team_size) {
    return top_k <= kShort / 2 && top_k <= team_size * Threads / 4;
  }

  // Before the barrier after which `find_bound` is called: shares the largest value of this thread and its
  // neighbour.
  __device__ void publish(float high) const {
    const uint32_t mine = order_key(high + 0.0f), key = min(mine, __shfl_xor_sync(kAllLanes, mine, 1));
    for (uint32_t block = threadIdx.x % 2; block < team.size; block += 2)
      *team.at(&s.own.maxima[team.rank][threadIdx.x / 2], block) = key;
    s.totals[threadIdx.x] = 0;
    if (threadIdx.x == 0) s.answer[0] = kSteps - 1;
  }

  // False, for all blocks, if there is none among the steps. `range`: the distance from the maximum that they
  // cover.
  __device__ bool find_bound(uint32_t top_k, float largest, float range) {
    max = largest;
    scale = float(kSteps - 1) / fmaxf(range, 0x1p-100f);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < team.size * Threads / 2; i += Threads) {
      const float at = step(key_logit(s.own.maxima[0][i]));
      if (at < float(kSteps - 1)) atomicAdd(&s.totals[int32_t(at)], 1u);
    }
    __syncthreads();
    const uint32_t count = s.totals[threadIdx.x];
    const uint64_t before = team.scan(count);
    if (before < top_k && before + count >= top_k) s.answer[0] = threadIdx.x;
    __syncthreads();
    end = float(s.answer[0] + 1);
    return s.answer[0] != kSteps - 1;
  }
  __device__ float step(float x) const { return __fmul_rn(Weights::distance(max, x), scale); }

  // Puts what is above the bound into this block's share of the list.
  __device__ void collect(Selector<Row>& list, const float (&x)[Row::kLogits], int32_t id) const {
    uint32_t found = 0;
#pragma unroll
    for (int j = 0; j < Row::kLogits; ++j) found |= step(x[j]) < end ? 1u << j : 0;
    Row::for_each_of(found, x, id, [&](float value, int32_t token) { list.collect(value, token); });
  }
  // Behind it, by all threads: makes the list. Its length; 0, for all blocks, if it has no room.
  __device__ uint32_t end_list(Selector<Row>& list) const {
    return list.end_list() && list.listed <= kShort ? list.listed : 0;
  }
  __device__ uint32_t list_row() const {
    Selector<Row> list{slice, shared_weights, team, s};
    slice.for_each_vector([&](const auto& x, int32_t id) { collect(list, x, id); });
    const uint32_t n = end_list(list);
    if (n > 0) gather(list, n);
    return n;
  }
  // Copies the list to s.own.brief.tokens.
  __device__ void gather(const Selector<Row>& list, uint32_t n) const {
    if (threadIdx.x < n) s.own.brief.tokens[threadIdx.x] = list.in_list(threadIdx.x);
    __syncthreads();
  }
  // Sorts the list, in any block: s.own.brief.sorted and id_rank.
  __device__ void sort(uint32_t n) const { Selector<Row>{slice, shared_weights, team, s}.sort(n); }
};

template <class Row>
struct ShortDraw : ShortTop<Row> {
  using Base = ShortTop<Row>;
  using Weights = typename Row::Weights;
  using Base::team, Base::s, Base::shared_weights;

  // Calls write(id, valid) in one thread of the team, or returns false: too many tokens are as large as what
  // bounds them. `range`: the distance from the maximum that the steps cover.
  template <class Write>
  __device__ bool draw(const SamplingDraw& d, bool use_top_p, bool exact_ties, float max, float range,
                       const Write& write) {
    if (!this->find_bound(uint32_t(d.top_k), max, range)) return false;
    const uint32_t n = this->list_row();
    if (n == 0) return false;
    if (team.rank == 0) draw_sorted(d, use_top_p, exact_ties, n, write);
    return true;
  }

 private:
  template <class Write>
  __device__ void draw_sorted(const SamplingDraw& d, bool use_top_p, bool exact_ties, uint32_t n,
                              const Write& write) {
    const Weights weights = shared_weights;
    ShortList& brief = s.own.brief;
    const uint32_t i = threadIdx.x, top_k = uint32_t(d.top_k);
    this->sort(n);

    const uint64_t place = i < n ? brief.sorted[i] : kAllPlaces;
    bool kept = i < n && (i < top_k || (!exact_ties && place >> 32 == brief.sorted[top_k - 1] >> 32));
    uint64_t weight = kept ? weigh(weights, logit_at(place)) : 0;
    uint64_t total = team.sum(weight, Among::kBlock);
    if (use_top_p) {
      const uint64_t before = team.scan(weight);
      if (before >= uint64_t(mass_target(d.top_p, int64_t(total)))) weight = 0;
      if (weights.eligible != weights.min_p_limit) {  // what min-p keeps behind top-p is its prefix
        Weights limited = weights;
        limited.eligible = weights.min_p_limit;
        weight = weight != 0 ? weigh(limited, logit_at(place)) : 0;
      }
      total = team.sum(weight, Among::kBlock);
    }
    if (total == 0) {  // of values that no check has seen
      if (i == 0) write(0, false);
      return;
    }

    // By id.
    uint64_t* const weight_by_id = brief.tokens;
    uint32_t* const ids = s.totals;
    if (i < n) {
      weight_by_id[brief.id_rank[i]] = weight;
      ids[brief.id_rank[i]] = uint32_t(place);
    }
    __syncthreads();
    weight = i < n ? weight_by_id[i] : 0;
    const uint64_t before = team.scan(weight);
    const uint64_t target = uint64_t(draw_target(int64_t(total), d.uniform));
    if (before <= target && target - before < weight) write(int64_t(ids[i]), true);
  }
};

}  // namespace fi::cuda
