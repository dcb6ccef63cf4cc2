// Where a prefix of a row ends, by count (top-k) or by weight (top-p), without sorting the row.
//
// Bins are even steps of the logit. A histogram of the row's tokens over them tells the bin in which a count
// is reached, and bounds from both sides the bins in which a weight can be: only counts are collected for
// each token, weights are summed in registers. The tokens of those few bins become a list, in which the end
// is found exactly. Where there are too many for it (ties, a tight cluster) a second histogram, with weights,
// cuts the range of places that is in question into kFineBins; that may repeat, at most 8 times: a place has
// 64 bits.
#pragma once

#include "fi/cuda/sampling_slice.h"
#include "fi/cuda/team.h"

namespace fi::cuda {

inline constexpr int kBins = 2048, kFineBits = 9, kFineBins = 1 << kFineBits;
inline constexpr uint32_t kListed = 2048;  // tokens that the list can hold
inline constexpr uint32_t kShort = 512;    // so few are sorted, each compared with each
inline constexpr uint64_t kAllPlaces = ~uint64_t{0};

struct FineHistogram {
  uint64_t values[kFineBins];  // counts or weights
  uint32_t counts[kFineBins];
};

// A few tokens, sorted.
struct ShortList {
  uint64_t tokens[kShort];  // places, in no order
  uint64_t sorted[kShort];
  uint32_t id_rank[kShort];  // of sorted[i]: how many of the list have a lower id
  uint32_t ranks[kShort];    // of tokens[i]: lower half by place, upper half by id
};

// In dynamic shared memory. What is in a union is never needed at the same time.
struct SelectScratch {
  uint32_t totals[kBins];  // the row's tokens by bin (without the last one)
  union {
    uint32_t counts[kBins];  // this block's share of that
    FineHistogram fine;
    uint64_t found[kListed];                            // this block's share of the list
    uint32_t maxima[kMaxTeam][kListed * 2 / kMaxTeam];  // order keys of all threads' largest logits
    ShortList brief;
  } own;
  union {
    FineHistogram fine;
    uint64_t list[kListed];  // places, in no order
  } all;
  uint64_t warp_sums[kShort / 32];  // the weight of the tokens of each warp that are kept
  uint64_t mass;
  uint64_t answer[4];
  uint32_t num_found;
};

// Bins [first, last]: where a prefix ends.
struct Bracket {
  int32_t first, last;
  uint64_t before, inside;  // tokens in front of them (`before`) and in them (`inside`, at most that many)
};

// Places [low, high]: where a prefix ends.
struct Span {
  uint64_t low, high;
  uint64_t before;  // tokens (or weight) in front of it
  uint64_t inside;  // tokens in it
};

template <class Row, int Threads>
struct Selector {
  static_assert(Threads == kFineBins && Threads == kShort && kBins % Threads == 0);

  const Row& slice;
  const Weights& shared_weights;  // in shared memory: not to take registers between passes
  Team<Threads>& team;
  SelectScratch& s;
  float bin_scale = 0;
  uint32_t listed = 0;
  bool has_sums = false;  // in s.warp_sums: of all tokens in front of the list

  // ---- bins ----

  // The last bin is for all that is `octaves` or more below the maximum.
  __device__ void set_bins(float octaves) { bin_scale = float(kBins - 1) / octaves; }

  __device__ int32_t bin_at(float octaves) const {
    return int32_t(fminf(__fmul_rn(octaves, bin_scale), float(kBins - 1)));
  }
  __device__ int32_t bin(const Weights& weights, float logit) const { return bin_at(weights.octaves(logit)); }

  __device__ void clear_counts() {
    for (int i = threadIdx.x; i < kBins; i += Threads) s.own.counts[i] = 0;
    __syncthreads();
  }
  __device__ void count(const Weights& weights, float logit) {
    const int32_t b = bin(weights, logit);
    if (b < kBins - 1) atomicAdd(&s.own.counts[b], 1u);
  }

  // Makes `totals` the numbers of tokens by bin and `mass` their weight (0 unless `weigh`).
  __device__ void count_row(bool weigh) {
    const Weights weights = shared_weights;
    clear_counts();
    WeightSum sum;
    slice.for_each([&](float x, int32_t) {
      count(weights, x);
      if (weigh) sum.add(weights, weights.fraction(x));
    });
    const uint64_t mass = team.sum(sum.total(weights));
    if (threadIdx.x == 0) s.mass = mass;
    team.sum_arrays(s.own.counts, s.totals, kBins);
  }

  // The weight of this thread's tokens up to `cut`.
  static __device__ uint64_t sum_thread(const Row& slice, const Weights& shared_weights, uint64_t cut) {
    const Weights weights = shared_weights;
    const Kept kept(cut);
    WeightSum sum;
    slice.for_each([&](float x, int32_t id) { sum.add(weights, kept(x, id) ? weights.fraction(x) : 0.0f); });
    return sum.total(weights);
  }
  // The weight of the row's tokens up to `cut`.
  __device__ uint64_t sum_row(uint64_t cut) { return team.sum(sum_thread(slice, shared_weights, cut)); }

  // The bin in which the number of tokens reaches `target`; the last one if none does.
  __device__ Bracket bracket_of_count(uint64_t target) {
    constexpr int kEach = kBins / Threads;
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

  // The bins in which the weight of tokens is likely to reach `target`, as if all tokens of a bin weighed
  // what its middle does. At worst a bracket without that place. The heaviest tokens are what is the least
  // like that, so where all of the row is known to weigh s.mass it counts from the light end.
  __device__ Bracket likely_bracket_of_mass(uint64_t target, bool of_row) {
    const Weights weights = shared_weights;
    constexpr int kEach = kBins / Threads;
    const float one = __uint_as_float(uint32_t(127 + weights.fraction_bits) << 23), width = 1.0f / bin_scale;
    const int32_t eligible = bin_at(__fmul_rn(weights.eligible, weights.exponent_scale));
    const int32_t first = int32_t(threadIdx.x) * kEach;
    auto guess = [&](int32_t b) {
      const float weight = b <= eligible ? exp2_approx(-(float(b) + 0.5f) * width) : 0.0f;
      return uint64_t(float(s.totals[b]) * weight * one);
    };
    uint64_t mine = 0;
#pragma unroll 1
    for (int32_t b = first; b < first + kEach; ++b) mine += guess(b);
    if (threadIdx.x == 0) s.answer[0] = kBins - 2;
    const int64_t in_front = of_row ? int64_t(s.mass - team.sum(mine, Among::kBlock)) : 0;
    int64_t before = in_front + int64_t(team.scan(mine));
#pragma unroll 1
    for (int32_t b = first; b < first + kEach && before < int64_t(target); ++b) {
      before += int64_t(guess(b));
      if (before >= int64_t(target)) s.answer[0] = b;
    }
    __syncthreads();
    const int32_t b = int32_t(s.answer[0]), from = max(b - 1, 0), to = min(b + 1, kBins - 2);
    uint64_t inside = 0;
    for (int32_t i = from; i <= to; ++i) inside += s.totals[i];
    __syncthreads();
    return {from, to, 0, inside};
  }

  // The bins in which the weight of tokens can reach `target`, which is positive and at most that of the row.
  // All weights of a bin lie between those of its ends; the sums of both bounds bound the weight of what lies
  // before a token. The margin is for what rounding does to octaves and exponentials.
  __device__ Bracket bracket_of_mass(uint64_t target) {
    const Weights weights = shared_weights;
    constexpr int kEach = kBins / Threads;
    constexpr float kMargin = 0x1p-15f;
    const float one = __uint_as_float(uint32_t(127 + weights.fraction_bits) << 23), width = 1.0f / bin_scale;
    const int32_t eligible = bin_at(__fmul_rn(weights.eligible, weights.exponent_scale));
    const int32_t first = int32_t(threadIdx.x) * kEach;
    uint64_t before[3] = {0, 0, 0};
    // f(bin, its tokens, the least and the most that they can weigh together)
    auto for_each_bin = [&](const auto& f) {
#pragma unroll 1
      for (int32_t b = first; b < first + kEach; ++b) {
        const float above = exp2_approx(-float(b) * width) * one,
                    below = exp2_approx(-float(b + 1) * width) * one;
        const uint64_t count = s.totals[b];
        f(b, count, b < eligible ? count * uint64_t(below * (1.0f - kMargin)) : 0,
          b <= eligible ? count * (uint64_t(above * (1.0f + kMargin)) + 1) : 0);
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

  // ---- the list ----

  // Collecting this block's share of the list, between begin_list and end_list.
  __device__ void begin_list() {
    if (threadIdx.x == 0) s.num_found = 0;
    __syncthreads();
  }
  __device__ void collect(float logit, int32_t id) {
    if (!(logit > -kInfinity)) return;
    const uint32_t slot = atomicAdd(&s.num_found, 1u);
    if (slot < kListed) s.own.found[slot] = place_of(logit, id);
  }
  // Makes the list of the shares; returns the sum of `mass` over the threads of the team. False if it has no
  // room.
  __device__ bool end_list(uint64_t& mass) {
    mass = team.sum(mass, Among::kBlock);
    team.share(mass, s.num_found);
    mass = 0;
    uint64_t all = 0;
#pragma unroll 1
    for (uint32_t block = 0; block < team.size; ++block) {
      mass += team.shared(block).a;
      all += team.shared(block).b;
    }
    listed = 0;
    if (all > kListed) return false;
    listed = uint32_t(all);
    for (uint32_t i = threadIdx.x; i < listed; i += Threads) {
      uint32_t block = 0, at = i;
      for (; at >= team.shared(block).b; ++block) at -= uint32_t(team.shared(block).b);
      s.all.list[i] = *team.at(s.own.found + at, block);
    }
    team.sync();
    return true;
  }

  // Makes the tokens of a bracket (without -inf) the list, and `before` the weight in front of them.
  __device__ bool list_bins(const Bracket& bracket, uint64_t& before) {
    const Weights weights = shared_weights;
    const float first = float(bracket.first),
                end = bracket.last == kBins - 1 ? kInfinity : float(bracket.last + 1);
    begin_list();
    WeightSum sum;
    slice.for_each_vector([&](const auto& x, int32_t id) {
      uint32_t found = 0;
#pragma unroll
      for (int j = 0; j < Row::kLogits; ++j) {
        const float at = __fmul_rn(weights.octaves(x[j]), bin_scale);
        sum.add(weights, at < first ? weights.fraction(x[j]) : 0.0f);
        found |= at >= first && at < end ? 1u << j : 0;
      }
      Row::for_each_of(found, x, id, [&](float logit, int32_t token) { collect(logit, token); });
    });
    before = sum.total(weights);
    const uint64_t of_warp = team.sum_of_warp(before);
    if (threadIdx.x % 32 == 0) s.warp_sums[threadIdx.x / 32] = of_warp;
    return end_list(before);
  }

  // Whether the weight of tokens reaches `target` in the list; `before`: the weight in front of the list.
  __device__ bool is_in_list(uint64_t before, uint64_t target) {
    return before < target && before + mass_listed(kAllPlaces) >= target;
  }

  // Adds to the sums by warp (of this block) the weights of the list's tokens up to `cut`.
  __device__ void add_listed(uint64_t cut) const {
    const Weights weights = shared_weights;
    const int32_t first_id = slice.id_of(0), per_warp = slice.per_warp() * Row::kLogits;
    for (uint32_t i = threadIdx.x; i < listed; i += Threads) {
      const uint64_t place = s.all.list[i];
      const int32_t at = int32_t(uint32_t(place)) - first_id;
      if (place <= cut && at >= 0 && at < slice.num_tokens())
        atomicAdd(reinterpret_cast<unsigned long long*>(&s.warp_sums[at / per_warp]),
                  weights.weigh(logit_at(place)));
    }
  }

  // The weight of the list's tokens up to `cut`.
  __device__ uint64_t mass_listed(uint64_t cut) {
    const Weights weights = shared_weights;
    WeightSum sum;
    for (uint32_t i = threadIdx.x; i < listed; i += Threads) {
      const uint64_t place = s.all.list[i];
      sum.add(weights, place <= cut ? weights.fraction(logit_at(place)) : 0.0f);
    }
    return team.sum(sum.total(weights), Among::kBlock);
  }

  // Sorts the n tokens of the short list: each is compared with each, by as many threads a token as there
  // are.
  template <bool kIds>
  __device__ void sort(uint32_t n) {
    ShortList& brief = s.own.brief;
    brief.ranks[threadIdx.x] = 0;
    __syncthreads();
    const uint32_t wide = (n + 31) / 32 * 32, parts = Threads / max(wide, 32u),
                   each = (n + parts - 1) / parts;
    const uint32_t i = threadIdx.x % max(wide, 32u), part = threadIdx.x / max(wide, 32u);
    const uint64_t place = i < n ? brief.tokens[i] : 0;
    if (i < n && part < parts) {
      uint32_t in_front = 0, lower = 0;
      const uint32_t end = min(n, (part + 1) * each);
#pragma unroll 4
      for (uint32_t j = part * each; j < end; ++j) {
        const uint64_t other = brief.tokens[j];
        in_front += other < place;
        if (kIds) lower += uint32_t(other) < uint32_t(place);
      }
      atomicAdd(&brief.ranks[i], lower << 16 | in_front);
    }
    __syncthreads();
    if (threadIdx.x < n) {
      const uint32_t ranks = brief.ranks[threadIdx.x];
      brief.sorted[ranks & 0xffffu] = brief.tokens[threadIdx.x];
      if (kIds) brief.id_rank[ranks & 0xffffu] = ranks >> 16;
    }
    __syncthreads();
  }

  // ---- exact ends ----

  // Adds tokens to fine bins; all lanes of a warp call it together. Tokens that crowd into one or two bins
  // are added up in the warp first: additions to one address wait for each other.
  __device__ void add_fine(uint32_t b, uint64_t value, bool live) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t left = __ballot_sync(kAllLanes, live);
    for (int round = 0; round < 2 && left != 0; ++round) {
      const int leader = __ffs(int(left)) - 1;
      const uint32_t crowded = __shfl_sync(kAllLanes, b, leader);
      const bool same = live && b == crowded;
      const uint32_t group = __ballot_sync(kAllLanes, same);
      if (__popc(group) < 4) break;
      uint64_t sum = same ? value : 0;
#pragma unroll 1
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      if (int(lane) == leader) add_one_fine(b, uint32_t(__popc(group)), sum);
      live = live && !same;
      left &= ~group;
    }
    if (live) add_one_fine(b, 1, value);
  }
  __device__ void add_one_fine(uint32_t b, uint32_t count, uint64_t value) {
    atomicAdd(&s.own.fine.counts[b], count);
    atomicAdd(reinterpret_cast<unsigned long long*>(&s.own.fine.values[b]), value);
  }

  // Narrows the span in which the value of the tokens (their count or weight) reaches `target` to one of
  // kFineBins parts of it. The tokens are the row's or the list's.
  __device__ void narrow(Among among, bool by_count, Span& span, uint64_t target) {
    const Weights weights = shared_weights;
    const bool of_row = among == Among::kTeam;
    const int32_t tokens = of_row ? slice.num_tokens() : int32_t(listed);
    auto place_at = [&](int32_t i) {
      if (i >= tokens) return kAllPlaces;
      return of_row ? place_of(slice.logit(i), slice.id_of(i)) : s.all.list[i];
    };
    uint64_t low = kAllPlaces, high = 0;
    for (int32_t i = threadIdx.x; i < tokens; i += Threads) {
      const uint64_t place = place_at(i);
      if (place < span.low || place > span.high) continue;
      low = place < low ? place : low;
      high = place > high ? place : high;
    }
    low = team.min(low, among);
    high = team.max(high, among);
    if (low > high) {
      span.inside = 0;
      return;
    }
    const int bits = low == high ? 0 : 64 - __clzll(int64_t(low ^ high));
    const int shift = bits > kFineBits ? bits - kFineBits : 0;
    const uint64_t base = low >> shift;

    s.own.fine.values[threadIdx.x] = 0;
    s.own.fine.counts[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t first = 0; first < tokens; first += Threads) {
      const uint64_t place = place_at(first + int32_t(threadIdx.x));
      const bool live = place >= low && place <= high && first + int32_t(threadIdx.x) < tokens;
      const uint64_t value = !live ? 0 : by_count ? 1 : weights.weigh(logit_at(place));
      add_fine(live ? uint32_t((place >> shift) - base) : 0, value, live);
    }
    FineHistogram* total = &s.own.fine;
    if (of_row) {
      total = &s.all.fine;
      team.sync();
      team.sum_arrays(s.own.fine.counts, total->counts, kFineBins);
      team.sum_arrays(s.own.fine.values, total->values, kFineBins);
    } else {
      __syncthreads();
    }

    const uint64_t mine = total->values[threadIdx.x];
    if (threadIdx.x == 0) s.answer[0] = s.answer[1] = s.answer[2] = 0;
    uint64_t before = team.scan(mine);
    before += span.before;
    if (before < target && before + mine >= target) {
      s.answer[0] = threadIdx.x;
      s.answer[1] = before;
      s.answer[2] = total->counts[threadIdx.x];
    }
    __syncthreads();
    const uint64_t first = (base + s.answer[0]) << shift, last = first + ((uint64_t{1} << shift) - 1);
    span = {first > low ? first : low, last < high ? last : high, s.answer[1], s.answer[2]};
    __syncthreads();
  }

  // Lists the tokens among which a prefix of the row ends, of those in `bracket`, however many these are.
  // Returns the value (count or weight) in front of the list.
  __device__ uint64_t list_end(bool by_count, const Bracket& bracket, uint64_t target) {
    const Weights weights = shared_weights;
    has_sums = bracket.inside <= kListed;
    if (has_sums) {
      uint64_t before;
      list_bins(bracket, before);
      return by_count ? bracket.before : before;
    }
    Span span{kAllPlaces, 0, 0, bracket.inside};
    WeightSum sum;
    for (int32_t i = threadIdx.x; i < slice.num_tokens(); i += Threads) {
      const float x = slice.logit(i);
      const int32_t b = bin(weights, x);
      sum.add(weights, b < bracket.first ? weights.fraction(x) : 0.0f);
      if (b < bracket.first || b > bracket.last || !(x > -kInfinity)) continue;
      const uint64_t place = place_of(x, slice.id_of(i));
      span.low = place < span.low ? place : span.low;
      span.high = place > span.high ? place : span.high;
    }
    span.low = team.min(span.low);
    span.high = team.max(span.high);
    uint64_t mass = team.sum(sum.total(weights));
    span.before = by_count ? bracket.before : mass;
    while (span.inside > kListed) narrow(Among::kTeam, by_count, span, target);
    begin_list();
    for (int32_t i = threadIdx.x; i < slice.num_tokens(); i += Threads) {
      const float x = slice.logit(i);
      const uint64_t place = place_of(x, slice.id_of(i));
      if (place >= span.low && place <= span.high) collect(x, slice.id_of(i));
    }
    mass = 0;
    end_list(mass);
    return span.before;
  }

  // The place of the list's token, up to `limit`, at which their count (or weight) reaches `target`; `limit`
  // if none does.
  __device__ uint64_t end_in_list(bool by_count, uint64_t target, uint64_t limit) {
    const Weights weights = shared_weights;
    Span span{0, limit, 0, listed};
    while (span.inside > kShort) narrow(Among::kBlock, by_count, span, target);
    uint32_t n = listed;
    if (threadIdx.x == 0) s.answer[0] = limit;
    if (n <= kShort) {  // no token behind `limit` is where the target is reached
      if (threadIdx.x < n) s.own.brief.tokens[threadIdx.x] = s.all.list[threadIdx.x];
      __syncthreads();
    } else {
      begin_list();
      for (uint32_t i = threadIdx.x; i < listed; i += Threads) {
        const uint64_t place = s.all.list[i];
        if (place < span.low || place > span.high) continue;
        const uint32_t slot = atomicAdd(&s.num_found, 1u);
        if (slot < kShort) s.own.brief.tokens[slot] = place;
      }
      __syncthreads();
      n = min(s.num_found, kShort);
    }
    sort<false>(n);
    const uint64_t place = threadIdx.x < n ? s.own.brief.sorted[threadIdx.x] : kAllPlaces;
    const uint64_t value = threadIdx.x >= n ? 0 : by_count ? 1 : weights.weigh(logit_at(place));
    uint64_t before = team.scan(value);
    before += span.before;
    if (before < target && before + value >= target) s.answer[0] = place;
    __syncthreads();
    const uint64_t end = s.answer[0];
    __syncthreads();
    return end;
  }
};

}  // namespace fi::cuda
