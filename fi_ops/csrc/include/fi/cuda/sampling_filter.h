// What top-k, top-p and min-p keep of a row: the fetch and first look, the case of argmax, where top-k and
// top-p end.
#pragma once

#include "fi/cuda/sampling_early.h"

namespace fi::cuda {

// Where the filters end, from the row's histogram, whatever the logits.
struct Ends {
  uint64_t cut;
  uint32_t listed;  // as in the Selector
  bool has_sums;
};
template <class Row>
FI_DEVICE_NOINLINE Ends search_ends(float scale, bool top_k_first, bool exact_ties) {
  auto& s = row_scratch();
  const Row& slice = shared_slice<Row>();
  Team<kSampleThreads> team(cluster_rank(), cluster_size());
  Selector<Row> selector{slice, shared_weights<Row>(), team, s.select};
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
struct RowFilter : TeamRow<Row> {
  using Base = TeamRow<Row>;
  using Weights = typename Row::Weights;
  using Base::s, Base::slice, Base::team, Base::weights;

  const FilterParams& p;

  __device__ RowFilter(const FilterParams& p, Team<kSampleThreads>& team) : Base(team), p(p) {}

  // This block's part of a row.
  static __device__ Row slice_of(const FilterParams& p, int64_t row, const Team<kSampleThreads>& team,
                                 int32_t room) {
    return {static_cast<const typename Row::T*>(p.input) + row * p.row_stride, p.vocab_size, team.rank,
            team.size, room};
  }

  // A draw's row comes to the second-level cache while others are worked on, unless that is full of those.
  __device__ void prefetch_row(int64_t index) const {
    if (Row::kKeeping != Keep::kAll || index >= p.batch) return;
    const int64_t row = p.indices.data == nullptr ? index : p.indices.at(index);
    if (row >= 0 && row < p.rows) slice_of(p, row, team, 0).prefetch();
  }

  // What all threads need and one can find out.
  __device__ void prepare(SamplingDraw d, int fraction_bits) const {
    // Values that no check has seen, NaN among them: what follows relies on these ranges.
    d.temperature = d.temperature > 0.0f ? d.temperature : 0.0f;
    d.uniform = d.uniform > 0.0f ? fminf(d.uniform, 1.0f - 0x1p-24f) : 0.0f;
    s.draw = d;
    s.use_top_k = d.top_k > 0 && d.top_k < p.vocab_size;
    s.use_top_p = d.top_p < 1.0;
    weights.prepare(d, fraction_bits);
    s.select.num_found = 0;
  }

  // The first read of row `row`, that of draw `index`. `rows_at_once`: how many rows on the one lies that a
  // block is likely to work on next.
  __device__ ThreadRange fetch(const Row& row, int64_t index, int64_t rows_at_once, int fraction_bits) const {
    row.begin_copies();
    if (threadIdx.x == 0) {
      slice = row;
      s.index = index;
      s.early.used = false;
      prepare(p.draw(index), fraction_bits);
    }
    if constexpr (Row::kEarly) {
      if (is_top_p_alone(index) && Bins<Row>::can_tell(row, team.size)) {
        __syncthreads();
        EarlyBins<Row> early(row, team, s);
        if (s.early.used) {
          row.end_copies();
          row.template for_each_vector<true>([&](const auto& x, int32_t) { early.add(s, x); });
          team_has_started(team);
          early.tell(Bins<Row>{slice, weights, team, s.select}, s);
          return early.range();
        }
      }
    }
    row.end_copies();
    ThreadRange range;
    row.template for_each_vector<true>([&](const auto& x, int32_t) { range.add(x); });
    if (threadIdx.x == kSampleThreads - 1) prefetch_row(index + rows_at_once);
    team_has_started(team);
    return range;
  }

  // Whether top-p is the first filter that has to be found, from the arguments themselves.
  __device__ bool is_top_p_alone(int64_t index) const {
    const int64_t top_k = p.top_k.at(index);
    const double top_p = p.top_p.at(index);
    return top_p > 0.0 && top_p < 1.0 && (top_k <= 0 || top_k >= p.vocab_size) &&
           float(p.temperature.at(index)) > 0.0f && !(p.min_p_first && p.min_p.at(index) > 0.0);
  }

  // Makes +inf in the row the limit of ever larger values.
  __device__ void take_limit(float& max, float& min) const {
    if (max < kInfinity) return;
    slice.set_infinite();
    if (threadIdx.x == 0) s.early.used = false;
    __syncthreads();
    max = min = Row::kInfinite;
  }

  __device__ bool is_argmax() const {
    const SamplingDraw& d = s.draw;
    return d.temperature == 0.0f || d.top_p == 0.0 || (d.top_k == 1 && p.exact_ties);
  }

  // In one thread, before the filters: what values weigh.
  __device__ void set_weights(float max) const {
    weights.set_max(max, s.draw.min_p);
    weights.eligible = p.min_p_first || !s.use_top_p ? weights.min_p_limit : Weights::kAllEligible;
  }

  // The place up to which top-k and top-p keep the row's tokens; s.select.kept becomes the weight of what is
  // kept. `kListSums`: from what the filters' last pass has summed, where that will do: a pass less, and
  // registers more.
  template <bool kListSums>
  __device__ uint64_t keep(float max, float min) const {
    Selector<Row> selector{slice, weights, team, s.select};
    const bool filters = s.use_top_k || s.use_top_p;
    const uint64_t cut = filters ? end_of_filters(selector, Weights::distance(max, min)) : kAllPlaces;
    // What weighs something in the filters' last pass does so in the draw, but for min-p behind top-p.
    if (kListSums && selector.has_sums && weights.eligible == weights.min_p_limit) {
      selector.add_listed(cut);
      __syncthreads();
    } else {
      if (filters) team.sync();  // sums are no more in use
      if (threadIdx.x == 0) weights.eligible = weights.min_p_limit;
      __syncthreads();
      selector.sum_row(cut, s.select.kept);
    }
    return cut;
  }

 private:
  // `spread` is the distance between the row's largest and smallest finite logits.
  __device__ uint64_t end_of_filters(Selector<Row>& selector, float spread) const {
    const SamplingDraw& d = s.draw;
    uint64_t cut = kAllPlaces;
    if constexpr (Row::kEarly) {
      if (s.early.used) {
        cut = EarlyBins<Row>::find_end();
        selector.has_sums = true;
        if (cut != kAllPlaces) return cut;
        team.sync();  // counts, lists and sums are no more in use
      }
    }
    // Bins are for what weighs something and is there.
    const float there = fmaxf(spread * weights.exponent_scale * (kBins / (kBins - 2.0f)), 0x1p-20f);
    float octaves = fminf(float(weights.fraction_bits) + Weights::kBeyond, there);
    if (!s.use_top_k) octaves = fminf(octaves, octaves_of_top_p(slice.n, d.top_p));
    Bins<Row>& bins = selector.bins;
    bins.set(octaves);
    bins.count_row(s.use_top_p);

    if (!s.use_top_k) {
      const uint64_t target = uint64_t(mass_target(d.top_p, int64_t(s.select.mass)));
      const Bracket likely = bins.likely_bracket_of_mass(s.select.mass - target, /*lift=*/0.0f);
      if (likely.inside <= kShort && selector.list_bins(likely) &&
          selector.end_of_short_list(likely, target, cut))
        return cut;
    }
    const auto ends = search_ends<Row>(bins.scale, p.top_k_first, p.exact_ties);
    selector.listed = ends.listed;
    selector.has_sums = ends.has_sums;
    return ends.cut;
  }
};

}  // namespace fi::cuda
