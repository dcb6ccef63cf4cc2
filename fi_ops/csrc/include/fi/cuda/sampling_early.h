// The histogram for top-p alone, collected while the row is read for the first time: its bins are laid out by
// a sample of the row, as its range is not yet known.
//
// What it says is a guess: of where top-p ends, and of the row's weight. The next pass sums exactly what lies
// in front of that place and lists what is around it, so that a guess that was wrong is found out.
#pragma once

#include "fi/cuda/sampling_row.h"

namespace fi::cuda {

template <class Row>
struct EarlyBins {
  using Weights = typename Row::Weights;
  // Weights are told from what the largest of a sample weighs; that of the row may be 2^200 times as heavy.
  static constexpr float kLift = -100.0f;

  float base;     // the largest of the sample; bin 0 has all above it too
  float low;      // the smallest
  float in_unit;  // of the bins' range, in a unit of the logit
  float exponent_scale;
  // Of this thread's tokens: the largest, and what they weigh; not a number if one isn't.
  float high = -kInfinity, mass = 0;

  // All threads: lays out the bins, with s.draw and the weights prepared by the first one; s.early.used says
  // whether there are any. Samples a vector for each thread, spread evenly over the row.
  __device__ EarlyBins(const Row& row, Team<kSampleThreads>& team, RowScratch& s) {
    ThreadRange sample;
    const int32_t first = row.whole_begin(), whole = row.whole_end() - first;
    if (whole > 0) {
      float x[Row::kLogits];
      const int64_t at = int64_t(threadIdx.x) * whole / kSampleThreads;
      unpack_16<typename Row::T>(x, load_16(row.vectors() + first + at));
      sample.add(x);
    }
    for (int i = threadIdx.x; i < kBins; i += kSampleThreads) s.select.own.bins.counts[i] = 0;
    base = key_logit(uint32_t(team.min(order_key(sample.high + 0.0f), Among::kBlock)));
    low = key_logit(uint32_t(team.max(order_key(sample.low + 0.0f), Among::kBlock)));
    exponent_scale = shared_weights<Row>().exponent_scale;
    // The row's smallest is below the sample's. What is so light as here is not where top-p ends.
    const float spread = fmaxf((base - low) * 1.25f * exponent_scale, 0x1p-20f);
    const float octaves = fminf(spread, octaves_of_top_p(row.n, s.draw.top_p));
    in_unit = exponent_scale / octaves;
    if (threadIdx.x == 0) s.early = {base, octaves, fabsf(base) < kInfinity};
    __syncthreads();
  }

  template <int N>
  __device__ __forceinline__ void add(RowScratch& s, const float (&x)[N]) {
#pragma unroll
    for (const float logit : x) {
      high = fmaxf(high, logit);
      const float below = base - logit;
      atomicAdd(&s.select.own.bins.counts[Bins<Row>::bin_of_fraction(__saturatef(below * in_unit))], 1u);
      mass += exp2_approx(kLift - below * exponent_scale);
    }
  }

  // The first pass's result. The sample's smallest does for the row's.
  __device__ ThreadRange range() const { return {high, low, mass != mass}; }

  // Behind the first pass, between a barrier of the block and one of the team.
  __device__ void tell(const Bins<Row>& bins, RowScratch& s) const {
    bins.tell_counts();
    float sum = mass;
#pragma unroll
    for (uint32_t step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    bins.team.tell_all(&s.warp_mass[bins.team.rank * kSampleWarps + threadIdx.x / 32], sum);
  }

  // The place where top-p ends, from what all blocks have told; s.kept becomes the weight of what it keeps.
  // kAllPlaces, for all blocks, where the guess was wrong.
  static FI_DEVICE_NOINLINE uint64_t find_end() {
    auto& s = row_scratch();
    const Row& slice = shared_slice<Row>();
    const Weights& weights = shared_weights<Row>();
    Team<kSampleThreads> team(cluster_rank(), cluster_size());
    Selector<Row> selector{slice, weights, team, s.select};
    Bins<Row>& bins = selector.bins;
    const EarlyScale early = s.early;
    bins.set(early.octaves);
    bins.gather_counts();
    float mass = 0;
    for (uint32_t i = threadIdx.x % 32; i < team.size * kSampleWarps; i += 32) mass += s.warp_mass[i];
#pragma unroll
    for (uint32_t step = 16; step > 0; step /= 2) mass += __shfl_xor_sync(kAllLanes, mass, step);
    const float lift = weights.octaves(early.base);  // octaves from the row's largest to the sample's
    mass *= exp2_approx(-kLift - lift);
    if (!(mass > 0.5f && mass < 2.0f * float(slice.n))) return kAllPlaces;  // too far from each other

    const double top_p = s.draw.top_p;
    const float one = __uint_as_float(uint32_t(127 + weights.fraction_bits) << 23);
    const auto likely = bins.likely_bracket_of_mass(uint64_t(float(1.0 - top_p) * mass * one), lift);
    if (likely.inside > kGuessed) return kAllPlaces;
    const float width = early.octaves / float(kBins - 1), unit = width / weights.exponent_scale;
    const float first = float(likely.first), end = float(likely.last + 1);
    if (!selector.list_between(likely.first == 0 ? weights.max : early.base - first * unit,
                               early.base - end * unit))
      return kAllPlaces;
    const uint64_t target = uint64_t(mass_target(top_p, int64_t(s.select.of_row.total(team))));
    uint64_t cut = kAllPlaces;
    selector.end_of_guessed_list(likely.first == 0 ? 0.0f : lift + first * width, lift + end * width, target,
                                 cut);
    return cut;
  }
};

}  // namespace fi::cuda
