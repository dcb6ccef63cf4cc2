// Draws from a row under a small top-k: what can be kept is known to be a short list, which one block sorts.
//
// The k-th largest of the maxima of pairs of threads bounds the k-th logit from below: as many tokens as that
// lie above it. All blocks know all maxima, so that each finds the bound by itself; what a block has above it
// becomes its share of a list, from which the first block draws alone. So two barriers of the team are all.
#pragma once

#include "fi/cuda/sampling_select.h"

namespace fi::cuda {

template <class Row>
struct ShortDraw {
  using Weights = typename Row::Weights;
  static constexpr int Threads = kSampleThreads;
  static constexpr int kSteps = Threads;  // of the distance; the last one is for all that is below the others

  const Row& slice;
  const Weights& shared_weights;
  Team<Threads>& team;
  SelectScratch& s;

  // Whether a top-k is small enough.
  static __device__ bool fits(int64_t top_k, uint32_t team_size) {
    return top_k <= kShort / 2 && top_k <= team_size * Threads / 4;
  }

  // Before the barrier after which `draw` is called: shares the largest logit of this thread and its
  // neighbour.
  __device__ void publish(float high) {
    const uint32_t mine = order_key(high + 0.0f), key = min(mine, __shfl_xor_sync(kAllLanes, mine, 1));
    for (uint32_t block = threadIdx.x % 2; block < team.size; block += 2)
      *team.at(&s.own.maxima[team.rank][threadIdx.x / 2], block) = key;
    s.totals[threadIdx.x] = 0;
    if (threadIdx.x == 0) s.answer[0] = kSteps - 1;
  }

  // Calls write(id, valid) in one thread of the team, or returns false: too many tokens are as large as what
  // bounds them. `range`: the distance from the maximum that the steps cover.
  template <class Write>
  __device__ bool draw(const SamplingDraw& d, bool use_top_p, bool exact_ties, float max, float range,
                       const Write& write) {
    const float scale = float(kSteps - 1) / fmaxf(range, 0x1p-100f);
    auto step = [&](float logit) { return __fmul_rn(Weights::distance(max, logit), scale); };
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < team.size * Threads / 2; i += Threads) {
      const float at = step(key_logit(s.own.maxima[0][i]));
      if (at < float(kSteps - 1)) atomicAdd(&s.totals[int32_t(at)], 1u);
    }
    __syncthreads();
    const uint32_t count = s.totals[threadIdx.x], top_k = uint32_t(d.top_k);
    const uint64_t before = team.scan(count);
    if (before < top_k && before + count >= top_k) s.answer[0] = threadIdx.x;
    __syncthreads();
    if (s.answer[0] == kSteps - 1) return false;

    // What this block has becomes its share of the list.
    const float end = float(s.answer[0] + 1);
    Selector<Row> list{slice, shared_weights, team, s};
    slice.for_each_vector([&](const auto& x, int32_t id) {
      uint32_t found = 0;
#pragma unroll
      for (int j = 0; j < Row::kLogits; ++j) found |= step(x[j]) < end ? 1u << j : 0;
      Row::for_each_of(found, x, id, [&](float logit, int32_t token) { list.collect(logit, token); });
    });
    if (!list.end_list() || list.listed > kShort) return false;
    if (team.rank == 0) {
      const uint64_t mine = threadIdx.x < list.listed ? list.in_list(threadIdx.x) : 0;
      draw_sorted(d, use_top_p, exact_ties, list.listed, mine, write);
    }
    return true;
  }

 private:
  template <class Write>
  __device__ void draw_sorted(const SamplingDraw& d, bool use_top_p, bool exact_ties, uint32_t n,
                              uint64_t mine, const Write& write) {
    const Weights weights = shared_weights;
    ShortList& brief = s.own.brief;
    const uint32_t i = threadIdx.x, top_k = uint32_t(d.top_k);
    if (i < n) brief.tokens[i] = mine;
    __syncthreads();
    Selector<Row>{slice, shared_weights, team, s}.sort(n);

    const uint64_t place = i < n ? brief.sorted[i] : kAllPlaces;
    bool kept = i < n && (i < top_k || (!exact_ties && place >> 32 == brief.sorted[top_k - 1] >> 32));
    uint64_t weight = kept ? weigh(weights, logit_at(place)) : 0;
    uint64_t total = team.sum(weight, Among::kBlock);
    if (use_top_p) {
      const uint64_t before = team.scan(weight);
      if (before >= uint64_t(mass_target(d.top_p, int64_t(total)))) weight = 0;
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
