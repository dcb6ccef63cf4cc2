// The bins of a row: even steps of the logit. A histogram of the tokens over them tells the bin in which a
// count is reached, and bounds from both sides the bins in which a weight can be: only counts are collected
// for each token, the row's weight is summed in registers.
#pragma once

#include "fi/cuda/sampling_scratch.h"

namespace fi::cuda {

// Bins [first, last]: where a prefix ends.
struct Bracket {
  int32_t first, last;
  uint64_t before, inside;  // tokens in front of them (`before`) and in them (`inside`, at most that many)
};

template <class Row>
struct Bins {
  using Weights = typename Row::Weights;
  static constexpr int kEach = kBins / kSampleThreads;

  const Row& slice;
  const Weights& shared_weights;  // in shared memory: not to take registers between passes
  Team<kSampleThreads>& team;
  SelectScratch& s;
  float scale = 0;

  // The last bin is for all that is `octaves` or more below the maximum.
  __device__ void set(float octaves) { scale = float(kBins - 1) / octaves; }

  // Where a logit is, as a fraction of steps: bin b has [b, b + 1), the last one all from kBins - 1 on.
  __device__ float at(const Weights& weights, float logit) const {
    return __fmul_rn(weights.octaves(logit), scale);
  }
  __device__ int32_t bin_at(float at) const {  // a conversion runs at an eighth of an addition's rate
    return int32_t(__float_as_uint(__fadd_rz(fminf(at, float(kBins - 1)), 0x1p23f)) & 0x7fffffu);
  }
  // The same for a fraction, in [0, 1], of the range of all bins but the last.
  static __device__ uint32_t bin_of_fraction(float fraction) {
    return __float_as_uint(__fmaf_rz(fraction, float(kBins - 1), 0x1p23f)) - 0x4b000000u;
  }

  // Whether blocks can tell each other all their counts: in 16 bits, or in 32 where there are few blocks.
  static __device__ bool can_tell(const Row& slice, uint32_t team_size) {
    return in_16_bits(slice) || team_size <= kMaxTeam / 2;
  }
  static __device__ bool in_16_bits(const Row& slice) { return slice.per_block() * Row::kLogits <= 0xffff; }
  // Tells all blocks this one's counts, which `totals` becomes the sums of behind a barrier of the team.
  __device__ void tell_counts() const {
    static_assert(kEach == 2);
    auto& own = s.own.bins;
    const uint32_t first = own.counts[2 * threadIdx.x], second = own.counts[2 * threadIdx.x + 1];
    if (in_16_bits(slice)) {
#pragma unroll
      for (uint32_t block = 0; block < kMaxTeam; ++block)
        if (block < team.size)
          *team.at(reinterpret_cast<uint32_t*>(own.of_blocks[team.rank]) + threadIdx.x, block) =
              first | second << 16;
    } else {
#pragma unroll 1
      for (uint32_t block = 0; block < team.size; ++block)
        *team.at(reinterpret_cast<uint64_t*>(own.of_few_blocks[team.rank]) + threadIdx.x, block) =
            first | uint64_t(second) << 32;
    }
  }
  __device__ void gather_counts() {
    const auto& own = s.own.bins;
    uint32_t first = 0, second = 0;
    if (in_16_bits(slice)) {
#pragma unroll
      for (uint32_t block = 0; block < kMaxTeam; ++block) {
        if (block >= team.size) continue;
        const uint32_t two = reinterpret_cast<const uint32_t*>(own.of_blocks[block])[threadIdx.x];
        first += two & 0xffffu;
        second += two >> 16;
      }
    } else {
#pragma unroll 1
      for (uint32_t block = 0; block < team.size; ++block) {
        const uint64_t two = reinterpret_cast<const uint64_t*>(own.of_few_blocks[block])[threadIdx.x];
        first += uint32_t(two);
        second += uint32_t(two >> 32);
      }
    }
    s.totals[2 * threadIdx.x] = first;
    s.totals[2 * threadIdx.x + 1] = threadIdx.x == kSampleThreads - 1 ? 0 : second;
    __syncthreads();
  }

  // Makes `totals` the numbers of tokens by bin (0 for the last one) and s.mass the row's weight (0 unless
  // `weigh`).
  __device__ void count_row(bool weigh) {
    const Weights weights = shared_weights;
    for (int i = threadIdx.x; i < kBins; i += kSampleThreads) s.own.bins.counts[i] = 0;
    __syncthreads();
    WeightSum sum;
    slice.for_each_vector([&](const auto& x, int32_t) {
      float fractions[Row::kLogits];
#pragma unroll
      for (int j = 0; j < Row::kLogits; ++j) {
        atomicAdd(&s.own.bins.counts[bin_at(at(weights, x[j]))], 1u);
        fractions[j] = weights.fraction(x[j]);
      }
      if (weigh) sum.add(weights, fractions);
    });
    s.of_row.tell(team, sum.total(weights));
    if (can_tell(slice, team.size)) {
      __syncthreads();
      tell_counts();
      team.sync();
      gather_counts();
    } else {
      auto& wide = s.own.wide_bins;
      team.template sum_arrays<kBins>(wide.counts, wide.inbox, s.totals);
      if (threadIdx.x == 0) s.totals[kBins - 1] = 0;
      __syncthreads();
    }
    const uint64_t mass = s.of_row.total(team);
    if (threadIdx.x == 0) s.mass = mass;
    __syncthreads();
  }

  // The bin in which the number of tokens reaches `target`; the last one if none does.
  __device__ Bracket bracket_of_count(uint64_t target) {
    uint32_t counts[kEach];
    uint64_t before = 0;
    for (int j = 0; j < kEach; ++j) before += counts[j] = s.totals[threadIdx.x * kEach + j];
    if (threadIdx.x == 0) s.answer[0] = kBins - 1, s.answer[1] = s.answer[2] = 0;
    before = team.scan(before);
    for (int j = 0; j < kEach; ++j) {
      if (before < target && before + counts[j] >= target) {
        s.answer[0] = threadIdx.x * kEach + j;
        s.answer[1] = before;
        s.answer[2] = counts[j];
      }
      before += counts[j];
    }
    __syncthreads();
    const Bracket b{int32_t(s.answer[0]), int32_t(s.answer[0]), s.answer[1], s.answer[2]};
    __syncthreads();
    return b;
  }

  // The bins that are likely to have `behind` of the weight behind them, as if all tokens of a bin weighed
  // what its middle does; with a margin for what that leaves out. The heaviest tokens are the least like
  // that, so it counts from the light end. At worst bins without that place. `lift`: how many octaves the
  // first bin begins below the maximum; heavier tokens are in it too.
  __device__ Bracket likely_bracket_of_mass(uint64_t behind, float lift) {
    const Weights weights = shared_weights;
    const float one = __uint_as_float(uint32_t(127 + weights.fraction_bits) << 23), width = 1.0f / scale;
    const int32_t eligible = bin_of_eligible(weights);
    const uint64_t margin = behind >> 10;
    uint64_t guesses[kEach], mine = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int32_t b = kBins - 1 - (int32_t(threadIdx.x) * kEach + j);
      float weight = b <= eligible ? weights.fraction_at((float(b) + 0.5f) * width + lift) : 0.0f;
      if (b == 0) weight = 1.0f;
      guesses[j] = b < kBins - 1 ? uint64_t(float(s.totals[b]) * weight * one) : 0;
      mine += guesses[j];
    }
    if (threadIdx.x == 0) {
      s.answer[0] = 0;
      s.answer[1] = kBins - 2;
    }
    uint64_t lighter = team.scan(mine);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int32_t b = kBins - 1 - (int32_t(threadIdx.x) * kEach + j);
      const uint64_t with = lighter + guesses[j];
      if (lighter <= behind + margin && behind + margin < with) s.answer[0] = b;
      if (lighter <= behind - margin && behind - margin < with) s.answer[1] = b;
      lighter = with;
    }
    __syncthreads();
    const int32_t first = int32_t(s.answer[0]), last = int32_t(s.answer[1]);
    uint64_t inside = 0;
    for (int32_t b = first; b <= last; ++b) inside += s.totals[b];
    __syncthreads();
    return {first, last, 0, inside};
  }

  // The bins in which the weight of tokens can reach `target`, which is positive and at most that of the row.
  // All weights of a bin lie between those of its ends; the sums of both bounds bound the weight of what lies
  // before a token.
  __device__ Bracket bracket_of_mass(uint64_t target) {
    const Weights weights = shared_weights;
    const float one = __uint_as_float(uint32_t(127 + weights.fraction_bits) << 23), width = 1.0f / scale;
    const int32_t eligible = bin_of_eligible(weights);
    const int32_t first = int32_t(threadIdx.x) * kEach;
    uint64_t before[3] = {0, 0, 0};
    // f(bin, its tokens, the least and the most that they can weigh together)
    auto for_each_bin = [&](const auto& f) {
#pragma unroll 1
      for (int32_t b = first; b < first + kEach; ++b) {
        const float above = weights.most_at(float(b) * width) * one,
                    below = weights.least_at(float(b + 1) * width) * one;
        const uint64_t count = s.totals[b];
        f(b, count, b < eligible ? count * uint64_t(below) : 0,
          b <= eligible ? count * (uint64_t(above) + 1) : 0);
      }
    };
    for_each_bin([&](int32_t, uint64_t count, uint64_t low, uint64_t high) {
      before[0] += count;
      before[1] += low;
      before[2] += high;
    });
    if (threadIdx.x == 0) {
      s.answer[0] = s.answer[1] = kBins - 1;
      s.answer[2] = 0;
      s.answer[3] = uint64_t(slice.n);
    }
    for (uint64_t& b : before) b = team.scan(b);
    for_each_bin([&](int32_t b, uint64_t count, uint64_t low, uint64_t high) {
      if (before[2] < target && before[2] + high >= target) {
        s.answer[0] = b;
        s.answer[2] = before[0];
      }
      if (before[1] < target && before[1] + low >= target) {
        s.answer[1] = b;
        s.answer[3] = before[0] + count;
      }
      before[0] += count;
      before[1] += low;
      before[2] += high;
    });
    __syncthreads();
    const Bracket b{int32_t(s.answer[0]), int32_t(s.answer[1]), s.answer[2], s.answer[3] - s.answer[2]};
    __syncthreads();
    return b;
  }

  __device__ int32_t bin_of_eligible(const Weights& weights) const {
    return bin_at(__fmul_rn(weights.eligible_octaves(), scale));
  }
};

}  // namespace fi::cuda
