// Chain speculative sampling: a test a draft token, then one draw from what the target has over the draft;
// one launch, a team of blocks a request.
#include "fi/speculative.h"

#include "fi/cuda/sampling_row.h"

namespace fi::cuda {
namespace {

using Row = RowSlice<ResidualProbs, Keep::kNone>;

// A token from a row, by the one thread that calls write(id). False, for all threads, where nothing can be
// drawn.
template <class Write>
__device__ bool draw_from(const TeamRow<Row>& team_row, const Row& row, float uniform, int fraction_bits,
                          const Write& write) {
  auto& [s, slice, weights, team] = team_row;
  ThreadRange mine;
  row.fetch(
      [&] {
        if (threadIdx.x != 0) return;
        slice = row;
        weights.set_fraction_bits(fraction_bits);
        weights.eligible = ProbWeights::kAllEligible;
      },
      [&](const auto& x, int32_t) { mine.add(x); });
  const float max = team_row.range_of(mine).max;
  if (max != max || max == -kInfinity) return false;
  if (max == kInfinity) slice.set_infinite();
  if (threadIdx.x == 0) weights.set_max(max < kInfinity ? max : Row::kInfinite, 0.0);
  __syncthreads();
  Selector<Row>{slice, weights, team, s.select}.sum_row(kAllPlaces, s.select.kept);
  bool drawn = true;
  team_row.draw(kAllPlaces, uniform, write, [&] { drawn = false; });
  return drawn;
}

__global__ void __launch_bounds__(kSampleThreads, 2) sample_chain(SpeculativeParams p, int fraction_bits) {
  auto team = begin_team();
  const int64_t b = blockIdx.x / team.size, num = p.num_speculative_tokens;
  uint64_t first_refused = uint64_t(num), passed = 0;
  for (int64_t i = threadIdx.x; i < num; i += kSampleThreads) {
    const int64_t id = p.draft_id(b, i);
    // Ids that no check has seen are refused.
    const bool passes = id >= 0 && id < p.vocab_size && p.accepts(b, i);
    passed += passes;
    if (!passes && uint64_t(i) < first_refused) first_refused = uint64_t(i);
  }
  const int64_t emitted = int64_t(team.min(first_refused, Among::kBlock));
  passed = team.sum(passed, Among::kBlock);
  if (team.rank == 0) {
    for (int64_t i = threadIdx.x; i <= num; i += kSampleThreads)
      if (i != emitted) p.write_id(b, i, i < emitted ? p.draft_id(b, i) : -1);
    if (threadIdx.x == 0) {
      p.accepted[b] = int32_t(passed);
      p.emitted[b] = int32_t(emitted);
    }
  }
  team_has_started(team);

  const TeamRow<Row> team_row(team);
  Row row(p.target_row(b, emitted), p.vocab_size, team.rank, team.size);
  const float given = p.uniform_at(b, num);
  const float uniform = given > 0.0f ? fminf(given, 1.0f - 0x1p-24f) : 0.0f;
  auto write = [&](int64_t id) { p.write_id(b, emitted, id); };
  if (emitted < num) {
    row.minus = p.draft_row(b, emitted);
    if (draw_from(team_row, row, uniform, fraction_bits, write)) return;
    row.minus = nullptr;
    team.sync();  // the range of the row is no more in use
  }
  if (!draw_from(team_row, row, uniform, fraction_bits, write) && team.rank == 0 && threadIdx.x == 0)
    write(0);
}

}  // namespace

void chain_speculative_sample(const SpeculativeParams& p, const Gpu& gpu) {
  const RowLaunch launch(gpu, p.batch, p.vocab_size, sizeof(float));
  launch_clusters_with<sample_chain, sizeof(RowScratch)>(
      gpu, dim3(unsigned(p.batch) * launch.blocks), launch.blocks, dim3(kSampleThreads), /*overlap=*/true, p,
      std::min(weight_fraction_bits(p.vocab_size), kMaxFractionBits));
}

}  // namespace fi::cuda
