// Where a prefix of a row ends, by count (top-k) or by weight (top-p), without sorting the row.
//
// The tokens of the few bins in question (fi/cuda/sampling_bins.h) become a list, in which the end is found
// exactly; what weighs in front of them is summed in the same pass. Where there are too many for it (ties, a
// tight cluster) a second histogram, with weights, cuts the range of places that is in question into
// kFineBins; that may repeat, at most 8 times: a place has 64 bits.
#pragma once

#include "fi/cuda/sampling_bins.h"

namespace fi::cuda {

// Places [low, high]: where a prefix ends.
struct Span {
  uint64_t low, high;
  uint64_t before;  // tokens (or weight) in front of it
  uint64_t inside;  // tokens in it
};

template <class Row>
struct Selector {
  using Weights = typename Row::Weights;
  static constexpr int Threads = kSampleThreads;
  static_assert(Threads == kFineBins && Threads == kShort);

  const Row& slice;
  const Weights& shared_weights;
  Team<Threads>& team;
  SelectScratch& s;
  Bins<Row> bins{slice, shared_weights, team, s};
  uint32_t listed = 0;
  bool has_sums = false;  // in s.kept: of all tokens in front of the list

  // Makes `sums` the weight of the row's tokens up to `cut`.
  __device__ void sum_row(uint64_t cut, WarpSums& sums) {
    const Weights weights = shared_weights;
    const Kept kept(cut);
    WeightSum sum;
    slice.for_each_vector([&](const auto& x, int32_t id) {
      float fractions[Row::kLogits];
#pragma unroll
      for (int j = 0; j < Row::kLogits; ++j)
        fractions[j] = kept(x[j], id + j) ? weights.fraction(x[j]) : 0.0f;
      sum.add(weights, fractions);
    });
    sums.tell(team, sum.total(weights));
    team.sync();
  }

  // ---- the list ----

  __device__ uint32_t room() const { return kListed / team.size; }  // of a block's part

  // Called for this block's tokens of the list, then end_list() by all threads.
  __device__ void collect(float logit, int32_t id) {
    if (!(logit > -kInfinity)) return;
    const uint32_t slot = atomicAdd(&s.num_found, 1u);
    if (slot < room()) s.own.found[slot] = place_of(logit, id);
  }
  // Makes the list of all blocks' shares. False if one had no room.
  __device__ bool end_list() {
    __syncthreads();
    const uint32_t size = s.num_found, copies = min(size, room()) * team.size;
    for (uint32_t i = threadIdx.x; i < copies; i += Threads) {
      const uint32_t slot = i / team.size;
      *team.at(s.all.list + team.rank * room() + slot, i - slot * team.size) = s.own.found[slot];
    }
    if (threadIdx.x < team.size) *team.at(&s.list_sizes[team.rank], threadIdx.x) = size;
    team.sync();
    if (threadIdx.x == 0) s.num_found = 0;
    listed = 0;
    bool fits = true;
    for (uint32_t block = 0; block < team.size; ++block) {
      fits &= s.list_sizes[block] <= room();
      listed += s.list_sizes[block];
    }
    return fits;
  }
  __device__ uint64_t in_list(uint32_t i) const {
    uint32_t block = 0;
    for (; i >= s.list_sizes[block]; ++block) i -= s.list_sizes[block];
    return s.all.list[block * room() + i];
  }

  // Makes the tokens of a bracket (without -inf) the list and s.kept the weight in front of them. False
  // if the list has no room.
  __device__ bool list_bins(const Bracket& bracket) {
    const Weights weights = shared_weights;
    const float first = float(bracket.first),
                width = bracket.last == kBins - 1 ? kInfinity : float(bracket.last + 1 - bracket.first);
    WeightSum sum;
    slice.for_each_vector([&](const auto& x, int32_t id) {
      uint32_t found = 0;
      float fractions[Row::kLogits];
#pragma unroll
      for (int j = 0; j < Row::kLogits; ++j) {
        // Behind the first bin's begin; exact where that is in the bracket. Negative ones are large as bits.
        const float behind = bins.at(weights, x[j]) - first;
        fractions[j] = weights.fraction(behind < 0.0f ? x[j] : -kInfinity);
        found |= __float_as_uint(behind) < __float_as_uint(width) ? 1u << j : 0;
      }
      sum.add(weights, fractions);
      Row::for_each_of(found, x, id, [&](float logit, int32_t token) { collect(logit, token); });
    });
    s.kept.tell(team, sum.total(weights));
    has_sums = end_list();
    return has_sums;
  }

  // Makes the tokens in [low, high] the list, s.kept the weight in front of them, and s.of_row that of the
  // row, where all tokens are eligible. False if the list has no room.
  __device__ bool list_between(float high, float low) {
    const Weights weights = shared_weights;
    WeightSum all, in_front;
    // What is in the list is no further from its middle than its ends are; nor are few others.
    const float middle = 0.5f * low + 0.5f * high, near = fmaxf(high - middle, middle - low);
    slice.for_each_vector([&](const auto& x, int32_t id) {
      float nearest = kInfinity, fractions[Row::kLogits];
      bool front[Row::kLogits];
#pragma unroll
      for (int j = 0; j < Row::kLogits; ++j) {
        fractions[j] = weights.fraction_of_any(x[j]);
        front[j] = x[j] > high;
        nearest = fminf(nearest, fabsf(x[j] - middle));
      }
      all.add_some(weights, fractions, front, in_front);
      if (nearest > near) return;
      uint32_t found = 0;
#pragma unroll
      for (int j = 0; j < Row::kLogits; ++j) found |= (x[j] >= low) & (x[j] <= high) ? 1u << j : 0;
      Row::for_each_of(found, x, id, [&](float logit, int32_t token) { collect(logit, token); });
    });
    s.of_row.tell(team, all.total(weights));
    s.kept.tell(team, in_front.total(weights));
    has_sums = end_list();
    return has_sums;
  }

  // Adds to s.kept the weights of the list's tokens up to `cut`.
  __device__ void add_listed(uint64_t cut) const {
    const Weights weights = shared_weights;
    for (uint32_t i = threadIdx.x; i < listed; i += Threads) {
      const uint64_t place = in_list(i);
      if (place <= cut)
        atomicAdd(
            reinterpret_cast<unsigned long long*>(&s.kept.values[slice.warp_of(int32_t(uint32_t(place)))]),
            weigh(weights, logit_at(place)));
    }
  }

  // Sorts the n tokens of the short list: each is compared with each, by as many threads a token as there
  // are.
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
        lower += uint32_t(other) < uint32_t(place);
      }
      atomicAdd(&brief.ranks[i], lower << 16 | in_front);
    }
    __syncthreads();
    if (threadIdx.x < n) {
      const uint32_t ranks = brief.ranks[threadIdx.x];
      brief.sorted[ranks & 0xffffu] = brief.tokens[threadIdx.x];
      brief.id_rank[ranks & 0xffffu] = ranks >> 16;
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
    atomicAdd(&s.own.narrow.fine.counts[b], count);
    atomicAdd(reinterpret_cast<unsigned long long*>(&s.own.narrow.fine.values[b]), value);
  }

  // Narrows the span in which the value of the tokens (their count or weight) reaches `target` to one of
  // kFineBins parts of it. The tokens are the row's or the list's.
  __device__ void narrow(Among among, bool by_count, Span& span, uint64_t target) {
    const Weights weights = shared_weights;
    const bool of_row = among == Among::kTeam;
    const int32_t tokens = of_row ? slice.num_tokens() : int32_t(listed);
    auto place_at = [&](int32_t i) {
      if (i >= tokens) return kAllPlaces;
      return of_row ? place_of(slice.logit(i), slice.id_of(i)) : in_list(uint32_t(i));
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

    s.own.narrow.fine.values[threadIdx.x] = 0;
    s.own.narrow.fine.counts[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t first = 0; first < tokens; first += Threads) {
      const uint64_t place = place_at(first + int32_t(threadIdx.x));
      const bool live = place >= low && place <= high && first + int32_t(threadIdx.x) < tokens;
      const uint64_t value = !live ? 0 : by_count ? 1 : weigh(weights, logit_at(place));
      add_fine(live ? uint32_t((place >> shift) - base) : 0, value, live);
    }
    FineHistogram* total = &s.own.narrow.fine;
    if (of_row) {
      total = &s.all.fine;
      auto& own = s.own.narrow;
      team.template sum_arrays<kFineBins>(own.fine.counts, reinterpret_cast<uint32_t*>(own.inbox),
                                          total->counts);
      team.template sum_arrays<kFineBins>(own.fine.values, own.inbox, total->values);
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

  // Finds the place at which the number (or weight) of the row's tokens reaches `target`, which is in
  // `bracket`, however many are there.
  __device__ void find_end(bool by_count, const Bracket& bracket, uint64_t target, uint64_t& end) {
    if (bracket.inside <= kListed && list_bins(bracket)) {
      end_in_list(by_count, by_count ? bracket.before : s.kept.total(team), target, end);
      return;
    }
    team.sync();  // the list is no more in use
    const Weights weights = shared_weights;
    has_sums = false;
    Span span{kAllPlaces, 0, 0, bracket.inside};
    WeightSum sum;
    for (int32_t i = threadIdx.x; i < slice.num_tokens(); i += Threads) {
      const float x = slice.logit(i), at = bins.at(weights, x);
      const int32_t b = bins.bin_at(at);
      sum.add(weights, {b < bracket.first ? weights.fraction(x) : 0.0f});
      if (b < bracket.first || b > bracket.last || !(x > -kInfinity)) continue;
      const uint64_t place = place_of(x, slice.id_of(i));
      span.low = place < span.low ? place : span.low;
      span.high = place > span.high ? place : span.high;
    }
    span.low = team.min(span.low);
    span.high = team.max(span.high);
    const uint64_t mass = team.sum(sum.total(weights));
    span.before = by_count ? bracket.before : mass;
    while (span.inside > room()) narrow(Among::kTeam, by_count, span, target);
    team.sync();  // the histogram is no more in use
    for (int32_t i = threadIdx.x; i < slice.num_tokens(); i += Threads) {
      const float x = slice.logit(i);
      const uint64_t place = place_of(x, slice.id_of(i));
      if (place >= span.low && place <= span.high) collect(x, slice.id_of(i));
    }
    end_list();
    end_in_list(by_count, span.before, target, end);
  }

  // The same in the list; `before` is what lies in front of it.
  __device__ void end_in_list(bool by_count, uint64_t before, uint64_t target, uint64_t& end) {
    Span span{0, kAllPlaces, before, listed};
    while (span.inside > kShort) narrow(Among::kBlock, by_count, span, target);
    __syncthreads();  // num_found is 0
    for (uint32_t i = threadIdx.x; i < listed; i += Threads) {
      const uint64_t place = in_list(i);
      if (place < span.low || place > span.high) continue;
      const uint32_t slot = atomicAdd(&s.num_found, 1u);
      if (slot < kShort) set_few(slot, place, by_count ? 1 : weigh(shared_weights, logit_at(place)));
    }
    end_among_few(span.before, target, end);
  }

  // The same, by weight, for the list that list_bins() made, which must be short; s.kept becomes what is
  // kept. False, for all blocks, if the end is not there.
  __device__ bool end_of_short_list(const Bracket& bracket, uint64_t target, uint64_t& end) {
    const uint64_t in_front = s.kept.total(team);
    if (in_front >= target || listed > kShort) return false;
    // A histogram of the list over even parts of the bracket leaves a few of its tokens.
    const uint32_t i = threadIdx.x;
    uint64_t place = kAllPlaces, weight = 0;
    uint32_t part = 0;
    s.own.end.parts[i] = 0;
    if (i == 0) s.answer[0] = kFineBins;
    __syncthreads();
    if (i < listed) {
      place = in_list(i);
      const float logit = logit_at(place), at = bins.at(shared_weights, logit) - float(bracket.first);
      part = min(uint32_t(at * (float(kFineBins) / float(bracket.last + 1 - bracket.first))), kFineBins - 1u);
      weight = weigh(shared_weights, logit);
      atomicAdd(reinterpret_cast<unsigned long long*>(&s.own.end.parts[part]), weight);
    }
    __syncthreads();
    const uint64_t mine = s.own.end.parts[i], before = in_front + team.scan(mine);
    if (before < target && before + mine >= target) {
      s.answer[0] = i;
      s.answer[1] = before;
    }
    __syncthreads();
    if (s.answer[0] == kFineBins) return false;
    if (i < listed && part == s.answer[0]) set_few(atomicAdd(&s.num_found, 1u), place, weight);
    end_among_few(s.answer[1], target, end);
    if (place <= end && i < listed)
      atomicAdd(
          reinterpret_cast<unsigned long long*>(&s.kept.values[slice.warp_of(int32_t(uint32_t(place)))]),
          weight);
    listed = 0;
    return true;
  }

  // The same for the list of list_between(), which may be longer: of tokens [from, to) octaves below the
  // maximum, about.
  __device__ bool end_of_guessed_list(float from, float to, uint64_t target, uint64_t& end) {
    const uint64_t in_front = s.kept.total(team);
    if (in_front >= target) return false;
    // A histogram of the list over even parts of those octaves leaves a few of its tokens.
    const uint32_t thread = threadIdx.x;
    auto part_of = [&](uint64_t place) {
      const float at = (shared_weights.octaves(logit_at(place)) - from) / (to - from);
      return uint32_t(fminf(fmaxf(at * float(kFineBins), 0.0f), float(kFineBins - 1)));
    };
    s.own.end.parts[thread] = 0;
    if (thread == 0) s.answer[0] = kFineBins;
    __syncthreads();
    for (uint32_t i = thread; i < listed; i += Threads) {
      const uint64_t place = in_list(i);
      atomicAdd(reinterpret_cast<unsigned long long*>(&s.own.end.parts[part_of(place)]),
                weigh(shared_weights, logit_at(place)));
    }
    __syncthreads();
    const uint64_t mine = s.own.end.parts[thread], before = in_front + team.scan(mine);
    if (before < target && before + mine >= target) {
      s.answer[0] = thread;
      s.answer[1] = before;
    }
    __syncthreads();
    if (s.answer[0] == kFineBins) return false;
    for (uint32_t i = thread; i < listed; i += Threads) {
      const uint64_t place = in_list(i);
      if (part_of(place) != s.answer[0]) continue;
      const uint32_t slot = atomicAdd(&s.num_found, 1u);
      if (slot < kShort) set_few(slot, place, weigh(shared_weights, logit_at(place)));
    }
    __syncthreads();
    if (s.num_found > kShort) {  // ties
      __syncthreads();
      if (thread == 0) s.num_found = 0;
      return false;
    }
    end_among_few(s.answer[1], target, end);
    add_listed(end);
    listed = 0;
    return true;
  }

  __device__ void set_few(uint32_t i, uint64_t place, uint64_t value) const {
    s.own.end.places[i] = place;
    s.own.end.values[i] = value;
  }

  // The same among the few, of which there are num_found: each is compared with each, by as many lanes a
  // token as there are.
  __device__ void end_among_few(uint64_t in_front, uint64_t target, uint64_t& end) const {
    const auto& few = s.own.end;
    if (threadIdx.x == 0) s.answer[2] = end;
    __syncthreads();
    const uint32_t n = min(s.num_found, kShort);
    const uint32_t log_parts = n <= 16 ? 5 : uint32_t(__clz(int(n - 1))) - 23, parts = 1u << log_parts;
    const uint32_t i = threadIdx.x >> log_parts, part = threadIdx.x & (parts - 1);
    const uint64_t place = i < n ? few.places[i] : 0, value = i < n ? few.values[i] : 0;
    uint64_t before = 0;
    if (i < n) {
#pragma unroll 4
      for (uint32_t j = part; j < n; j += parts) before += few.places[j] < place ? few.values[j] : 0;
    }
    for (uint32_t step = parts / 2; step > 0; step /= 2) before += __shfl_xor_sync(kAllLanes, before, step);
    before += in_front;
    if (part == 0 && before < target && before + value >= target) s.answer[2] = place;
    __syncthreads();
    end = s.answer[2];
    if (threadIdx.x == 0) s.num_found = 0;
  }
};

}  // namespace fi::cuda
