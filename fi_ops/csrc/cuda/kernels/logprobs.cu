// Log-probabilities of a token and of the largest tokens of each row: one launch, a team of blocks a row,
// which it reads from memory once.
#include "fi/cuda/sampling_top.h"
#include "fi/dispatch.h"
#include "fi/top_k.h"

namespace fi::cuda {
namespace {

// The result's ids and log-probabilities hold places until all are sorted: 32 bits each.
struct TopPlaces {
  const LogprobsParams& p;
  int64_t first;  // of the row

  __device__ uint64_t get(int64_t i) const {
    const uint64_t id = p.token_ids.wide ? uint64_t(static_cast<const int64_t*>(p.top_ids)[first + i])
                                         : uint32_t(static_cast<const int32_t*>(p.top_ids)[first + i]);
    return uint64_t(__float_as_uint(p.top_logprobs[first + i])) << 32 | id;
  }
  __device__ void set(int64_t i, uint64_t place) const {
    p.top_logprobs[first + i] = __uint_as_float(uint32_t(place >> 32));
    p.write_id(p.top_ids, first + i, int64_t(uint32_t(place)));
  }
};

template <class T, Keep kKeep>
__global__ void __launch_bounds__(kSampleThreads, 2)
    logprob_rows(LogprobsParams p, int32_t room, int fraction_bits) {
  using Row = RowSlice<OrderedLogits<T>, kKeep>;
  auto team = begin_team();
  const int64_t row = blockIdx.x / team.size;
  const T* const logits = static_cast<const T*>(p.logits) + row * p.row_stride;
  const int64_t token = p.token_ids.at(row);

  const FirstFinder<Row> finder(team);
  Range finite;
  const auto counts = finder.fetch({logits, p.vocab_size, team.rank, team.size, room}, p.num_top, finite);
  const bool can_be = counts.nan == 0 && counts.infinite + counts.finite > 0;

  // The row's weight, and how many tokens come before the chosen one (id 0 for one that no check has seen);
  // the largest tokens too where they are few.
  const int32_t chosen = token >= 0 && token < p.vocab_size ? int32_t(token) : 0;
  const float value = to_float(logits[chosen]);
  FirstTokens before{value, uint32_t(chosen)};
  LogitWeights weights{};
  weights.set_fraction_bits(fraction_bits);
  weights.exponent_scale = exponent_scale_of(1.0f);
  weights.max = finite.max;
  weights.eligible = kInfinity;
  WeightSum sum;
  uint64_t in_front = 0;
  const int32_t n = finder.slice.n;
  ShortTop<Row> top = finder.short_top();
  Selector<Row> list{finder.slice, finder.weights, team, finder.s.select};
  const bool is_short = finder.find_bound(top, p.num_top, counts, finite);
  finder.slice.for_each_own_vector([&](const auto& x, int32_t id) {
    float fractions[Row::kLogits];
#pragma unroll
    for (int j = 0; j < Row::kLogits; ++j) {
      fractions[j] = weights.fraction(x[j]);
      in_front += id + j >= 0 && id + j < n && before(x[j], id + j);
    }
    sum.add(weights, fractions);
    if (is_short) top.collect(list, x, id);
  });
  team.sync();  // the sums of the first look are no more in use
  auto& select = finder.s.select;
  select.of_row.tell(team, sum.total(weights));
  select.kept.tell(team, in_front);
  const uint32_t num_listed = top.end_list(list);
  const uint64_t rank = select.kept.total(team);
  double lse;  // less the maximum
  if (counts.infinite > 0) {
    lse = log(double(counts.infinite));
  } else {
    lse = log(ldexp(double(select.of_row.total(team)), -fraction_bits));
  }
  auto logprob_of = [&](float x) {
    if (!can_be) return __uint_as_float(0x7fc00000u);
    if (counts.infinite > 0) return x == kInfinity ? float(-lse) : -kInfinity;
    return float(double(x) - double(finite.max) - lse);
  };
  if (team.rank == 0 && threadIdx.x == 0) {
    p.logprobs[row] = logprob_of(value);
    p.write_id(p.ranks, row, int64_t(rank));
  }
  if (p.num_top == 0) return;
  const int64_t at = row * p.num_top;
  auto put = [&](int64_t i, uint64_t place) {
    const int32_t id = int32_t(uint32_t(place));
    p.top_logprobs[at + i] = logprob_of(to_float(logits[id]));
    p.write_id(p.top_ids, at + i, id);
  };
  if (is_short && num_listed > 0) {
    if (team.rank != 0) return;
    top.gather(list, num_listed);
    top.sort(num_listed);
    for_each_of_short(finder, num_listed, p.num_top, /*sorted=*/true, put);
    return;
  }
  const FirstTokens first = finder.find(p.num_top, /*exact_ties=*/true, counts, finite);
  for_each_first_in_order(finder, first, p.num_top, TopPlaces{p, at}, put);
}

}  // namespace

void gather_logprobs(const LogprobsParams& p, const Gpu& gpu) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    const RowLaunch launch(gpu, p.rows, p.vocab_size, sizeof(T));
    launch.run(gpu, launch.keep ? &logprob_rows<T, Keep::kAll> : &logprob_rows<T, Keep::kPart>, p.rows, p,
               launch.room, std::min(weight_fraction_bits(p.vocab_size), kMaxFractionBits));
  });
}

}  // namespace fi::cuda
