// The tokens that come first in a row's order (NaN, then larger first, lower id first among equals), by the
// values alone: nothing is weighed.
//
// What isn't finite is counted in the first look; where the k-th token is among those it is the k-th of them
// by id. Else a short list has it (fi/cuda/sampling_short.h), or the finite values' histogram and list find
// it (fi/cuda/sampling_select.h).
#pragma once

#include "fi/cuda/sampling_row.h"
#include "fi/cuda/sampling_short.h"

namespace fi::cuda {

// The first tokens of a row, up to the one that has this value and id.
struct FirstTokens {
  float value = -kInfinity;  // NaN: NaN alone
  uint32_t last_id = 0xffffffffu;

  __device__ bool operator()(float x, int32_t id) const {
    const bool up_to = uint32_t(id) <= last_id;
    return (x > value) | ((x == value) & up_to) | ((x != x) & ((value == value) | up_to));
  }
};

// Orders all values: NaN comes first, whatever its sign.
FI_DEVICE_INLINE uint64_t place_in_order(float x, int32_t id) {
  return place_of(x != x ? __uint_as_float(0x7fffffffu) : x, id);
}

template <class Row>
struct FirstFinder : TeamRow<Row> {
  using Base = TeamRow<Row>;
  using Base::s, Base::slice, Base::team, Base::weights;

  using Base::Base;

  struct Counts {
    uint32_t nan, infinite, finite;  // of the row; `infinite`: +inf
  };

  // The first read of a row of which the k first tokens are to be found: what it has, and the range of what
  // is finite (max < min: nothing is).
  __device__ Counts fetch(const Row& row, int64_t k, Range& finite) const {
    ThreadRange mine;
    uint32_t num_nan = 0, num_infinite = 0, num_finite = 0;
    row.fetch(
        [&] {
          if (threadIdx.x != 0) return;
          slice = row;
          s.select.num_found = 0;
        },
        [&](const auto& x, int32_t) {
#pragma unroll
          for (const float value : x) {
            const bool is_finite = fabsf(value) < kInfinity;
            num_finite += is_finite;
            num_nan += value != value;
            num_infinite += value == kInfinity;
            mine.high = fmaxf(mine.high, is_finite ? value : -kInfinity);
            mine.low = fminf(mine.low, is_finite ? value : kInfinity);
          }
        });
    team_has_started(team);
    if (is_short(k)) short_top().publish(mine.high);
    s.select.of_row.tell(team, uint64_t(num_nan) << 32 | num_infinite);
    s.select.kept.tell(team, num_finite);
    finite = this->range_of(mine);
    const uint64_t others = s.select.of_row.total(team);
    return {uint32_t(others >> 32), uint32_t(others), uint32_t(s.select.kept.total(team))};
  }

  // Whether a short list can be tried for the k first tokens: `fetch` was called with the same k.
  __device__ bool is_short(int64_t k) const { return k >= 1 && ShortTop<Row>::fits(k, team.size); }
  __device__ ShortTop<Row> short_top() const { return {slice, weights, team, s.select}; }
  // Whether `top` knows what bounds such a list; no, for all blocks, where some of them may not be finite.
  __device__ bool find_bound(ShortTop<Row>& top, int64_t k, const Counts& counts, const Range& finite) const {
    if (!is_short(k) || counts.nan > 0 || counts.infinite > 0 || uint64_t(k) > counts.finite) return false;
    // Of values far below the maximum one more or less in a step does no harm.
    return top.find_bound(uint32_t(k), finite.max, fminf(finite.max - finite.min, 64.0f));
  }
  // The same, with the k tokens and more in s.select.own.brief.sorted; returns how many, 0 if not so.
  __device__ uint32_t sort_short(int64_t k, const Counts& counts, const Range& finite) const {
    ShortTop<Row> top = short_top();
    const uint32_t n = find_bound(top, k, counts, finite) ? top.list_row() : 0;
    if (n > 0) top.sort(n);
    return n;
  }

  // The k first tokens of the row, 1 <= k <= its tokens; with all that equal the last of them unless
  // `exact_ties`.
  __device__ FirstTokens find(int64_t k, bool exact_ties, const Counts& counts, const Range& finite) const {
    FirstTokens first;
    uint64_t left = uint64_t(k);
    team.sync();  // sums are no more in use
    if (left <= counts.nan) {
      first.value = __uint_as_float(0x7fffffffu);
      first.last_id = id_of_nth(left, counts.nan, [](float x) { return x != x; });
    } else if ((left -= counts.nan) <= counts.infinite) {
      first.value = kInfinity;
      first.last_id = id_of_nth(left, counts.infinite, [](float x) { return x == kInfinity; });
    } else if ((left -= counts.infinite) < counts.finite) {
      const uint64_t cut = end_among_finite(left, finite);
      first.value = logit_at(cut);
      first.last_id = uint32_t(cut);
    } else if ((left -= counts.finite) == 0) {
      first.value = -__FLT_MAX__;
    } else {
      first.last_id = id_of_nth(left, uint32_t(slice.n) - counts.nan - counts.infinite - counts.finite,
                                [](float x) { return x == -kInfinity; });
    }
    if (!exact_ties) first.last_id = 0xffffffffu;
    return first;
  }

 private:
  // The id of the n-th token (from 1) of those for which is_one(x) is true, of which there are `count`.
  template <class IsOne>
  __device__ uint32_t id_of_nth(uint64_t n, uint32_t count, const IsOne& is_one) const {
    if (n == count) return 0xffffffffu;  // all of them
    const int32_t tokens = slice.n;
    auto counts = [&](float x, int32_t id) { return uint64_t(id >= 0 && id < tokens && is_one(x)); };
    uint64_t mine = 0;
    slice.for_each_own_vector([&](const auto& x, int32_t id) {
#pragma unroll
      for (int j = 0; j < Row::kLogits; ++j) mine += counts(x[j], id + j);
    });
    s.select.kept.tell(team, mine);
    team.sync();
    uint64_t id = kAllPlaces;
    this->find_by_id(
        s.select.kept, [&](uint64_t) { return n - 1; }, counts, [&](int64_t found) { id = uint64_t(found); },
        [] {});
    return uint32_t(team.min(id));
  }

  // The place of the n-th finite token; there are more.
  __device__ uint64_t end_among_finite(uint64_t n, const Range& finite) const {
    if (threadIdx.x == 0) weights.set_range(finite.max, finite.min);
    __syncthreads();
    Selector<Row> selector{slice, weights, team, s.select};
    selector.bins.set(kBins / (kBins - 2.0f));
    selector.bins.count_row(false);
    uint64_t cut = kAllPlaces;
    selector.find_end(/*by_count=*/true, selector.bins.bracket_of_count(n), n, cut);
    team.sync();  // lists and sums are no more in use
    return cut;
  }
};

}  // namespace fi::cuda
