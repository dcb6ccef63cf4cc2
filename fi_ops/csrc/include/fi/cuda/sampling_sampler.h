// Draws from rows under filters: one launch, a team of blocks a row, which it reads from memory once (notes
// and measurements: docs/kernels/sampling_cuda.md).
//
// 1. Fetch and scan: the row's maximum, NaN, +inf.
// 2. A small top-k: all that it can keep is a short list, from which one block draws
//    (fi/cuda/sampling_short.h). Else where the filters end, by a histogram (fi/cuda/sampling_select.h).
// 3. The draw: the weight that is kept, by warp; then one warp looks into its range of ids.
#pragma once

#include "fi/cuda/sampling_filter.h"
#include "fi/cuda/sampling_short.h"

namespace fi::cuda {

template <class Row>
struct Sampler : RowFilter<Row> {
  using Base = RowFilter<Row>;
  using Weights = typename Row::Weights;
  using Base::s, Base::slice, Base::team, Base::weights;

  const SamplingParams& p;

  __device__ Sampler(const SamplingParams& p, Team<kSampleThreads>& team) : Base(p, team), p(p) {}

  __device__ void write(int64_t id, bool valid) const {
    if (team.rank == 0 && threadIdx.x == 0) p.write(s.index, id, valid);
  }

  // `row`: what will be in `slice`.
  __device__ void run(const Row& row, int64_t index, int64_t rows_at_once, int fraction_bits) const {
    const ThreadRange mine = this->fetch(row, index, rows_at_once, fraction_bits);
    ShortDraw<Row> short_draw{{slice, weights, team, s.select}};
    const bool try_short = s.use_top_k && short_draw.fits(s.draw.top_k, team.size) &&
                           (!s.use_top_p || p.top_k_first) && s.draw.temperature > 0.0f;
    if (try_short) short_draw.publish(mine.high);
    const Range range = this->range_of(mine);
    float max = range.max, min = range.min;
    if (max != max || max == -kInfinity) return write(0, false);
    this->take_limit(max, min);
    if (this->is_argmax()) return write(int64_t(this->first_id_of(max)), true);

    if (threadIdx.x == 0) this->set_weights(max);
    if (try_short && range.max < kInfinity) {
      // Of logits far below the maximum one more or less in a step does no harm.
      const float steps = fminf(Weights::distance(max, min), fmaxf(64.0f, 64.0f / weights.exponent_scale));
      if (short_draw.draw(s.draw, s.use_top_p, p.exact_ties, max, steps,
                          [&](int64_t id, bool valid) { p.write(s.index, id, valid); }))
        return;
    }
    __syncthreads();
    const uint64_t cut = this->template keep<true>(max, min);
    // Nothing to draw from: of values that no check has seen.
    this->draw(
        cut, s.draw.uniform, [&](int64_t id) { p.write(s.index, id, true); }, [&] { write(0, false); });
  }
};

template <class Source, Keep kKeep>
__global__ void __launch_bounds__(kSampleThreads, 2)
    sample(SamplingParams p, int32_t room, int64_t rows_at_once, int fraction_bits) {
  auto team = begin_team();
  const int64_t index = blockIdx.x / team.size;
  const int64_t row = p.indices.data == nullptr ? index : p.indices.at(index);
  if (row < 0 || row >= p.rows) {  // of indices that no check has seen
    if (team.size > 1) cluster_wait();
    if (team.rank == 0 && threadIdx.x == 0) p.write(index, 0, false);
    return;
  }
  using Row = RowSlice<Source, kKeep>;
  Sampler<Row>(p, team).run(Sampler<Row>::slice_of(p, row, team, room), index, rows_at_once, fraction_bits);
}

template <class Source>
void sample_rows(const SamplingParams& p, const Gpu& gpu) {
  const RowLaunch launch(gpu, p.batch, p.vocab_size, sizeof(typename Source::Value));
  launch.run(gpu, launch.keep ? &sample<Source, Keep::kAll> : &sample<Source, Keep::kPart>, p.batch, p,
             launch.room, launch.rows_at_once(gpu),
             std::min(weight_fraction_bits(p.vocab_size), kMaxFractionBits));
}

// In files of their own, as the compiler takes long.
void sample_from_probs(const SamplingParams& p, const Gpu& gpu);

}  // namespace fi::cuda
