// Filtered distributions written out: what the filters keep (fi/cuda/sampling_filter.h), then one pass that
// writes. One launch, a team of blocks a row, which it reads from memory once.
#pragma once

#include "fi/cuda/sampling_filter.h"
#include "fi/cuda/sampling_write.h"

namespace fi::cuda {

template <class Row>
struct Renorm : RowFilter<Row> {
  using Base = RowFilter<Row>;
  using Weights = typename Row::Weights;
  using Base::s, Base::slice, Base::team, Base::weights;

  const RenormParams& p;

  __device__ Renorm(const RenormParams& p, Team<kSampleThreads>& team) : Base(p, team), p(p) {}

  __device__ float* output() const { return static_cast<float*>(p.output) + s.index * p.vocab_size; }

  // Nothing is left to be weighed: a value for one token (if `first` is one's id), one for all others.
  __device__ void write_constants(int32_t first, float at_first, float others) const {
    write_row(slice, output(), [&](float, int32_t id) { return id == first ? at_first : others; });
  }

  __device__ void run(const Row& row, int64_t index, int64_t rows_at_once, int fraction_bits) const {
    const ThreadRange mine = this->fetch(row, index, rows_at_once, fraction_bits);
    auto [max, min] = this->range_of(mine);
    const float nan = __uint_as_float(0x7fc00000u);
    if (max != max || max == -kInfinity) return write_constants(-1, nan, nan);
    this->take_limit(max, min);
    if (this->is_argmax()) return write_constants(int32_t(this->first_id_of(max)), 1.0f, 0.0f);
    if (threadIdx.x == 0) this->set_weights(max);
    __syncthreads();
    const uint64_t cut = this->template keep<false>(max, min), mass = s.select.kept.total(team);
    // Weights before they are cut to integers: small probabilities keep their digits. No mass: of values that
    // no check has seen.
    const Weights w = weights;
    const float scale = mass == 0 ? nan : float(ldexp(1.0, w.fraction_bits) / double(mass));
    const Kept kept(cut);
    write_row(slice, output(),
              [&](float x, int32_t id) { return kept(x, id) ? w.fraction(x) * scale : 0.0f; });
  }
};

template <class Source, Keep kKeep>
__global__ void __launch_bounds__(kSampleThreads, 2)
    renorm(RenormParams p, int32_t room, int64_t rows_at_once, int fraction_bits) {
  auto team = begin_team();
  const int64_t row = blockIdx.x / team.size;
  using Row = RowSlice<Source, kKeep>;
  Renorm<Row>(p, team).run(Renorm<Row>::slice_of(p, row, team, room), row, rows_at_once, fraction_bits);
}

template <class Source>
void renorm_rows(const RenormParams& p, const Gpu& gpu) {
  const RowLaunch launch(gpu, p.batch, p.vocab_size, sizeof(typename Source::Value), /*writes_rows=*/true);
  launch.run(gpu, launch.keep ? &renorm<Source, Keep::kAll> : &renorm<Source, Keep::kPart>, p.batch, p,
             launch.room, launch.rows_at_once(gpu),
             std::min(weight_fraction_bits(p.vocab_size), kMaxFractionBits));
}

// In files of their own, as the compiler takes long.
void renorm_from_probs(const RenormParams& p, const Gpu& gpu);

// Softmax of logits; false, with nothing done, where there are filters or rows that are too long for it.
bool softmax(const RenormParams& p, const Gpu& gpu);

}  // namespace fi::cuda
