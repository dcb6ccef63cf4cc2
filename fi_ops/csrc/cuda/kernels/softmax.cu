// Softmax alone: one launch, a team of blocks a row, which it keeps in shared memory. Without filters a block
// needs so little beside the row that three of them share a multiprocessor: while some read, others write.
#include "fi/cuda/sampling_renorm.h"
#include "fi/dispatch.h"

namespace fi::cuda {
namespace {

struct alignas(128) SoftmaxScratch {
  Team<kSampleThreads>::Scratch team;
  RowEnds ends;
  WarpSums sums;
  alignas(16) LogitWeights weights;
};

template <class T>
__global__ void __launch_bounds__(kSampleThreads, 3)
    softmax_rows(RenormParams p, int64_t rows_at_once, int fraction_bits) {
  using Row = Slice<Logits<T>, kSampleThreads, Keep::kAll, uint32_t(sizeof(SoftmaxScratch))>;
  auto& s = *reinterpret_cast<SoftmaxScratch*>(dynamic_smem());
  auto team = begin_team();
  const int64_t index = blockIdx.x / team.size;
  const T* const input = static_cast<const T*>(p.input) + index * p.row_stride;
  Row row(input, p.vocab_size, team.rank, team.size);
  ThreadRange mine;
  row.fetch(
      [&] {
        if (threadIdx.x == 0) s.weights.prepare(p.draw(index), fraction_bits);
      },
      [&](const auto& x, int32_t) { mine.add(x); });
  if (threadIdx.x == kSampleThreads - 1 && index + rows_at_once < p.batch)
    Row(input + rows_at_once * p.row_stride, p.vocab_size, team.rank, team.size).prefetch();
  team_has_started(team);

  float max = range_of_row(team, s.ends, mine).max;
  float* const output = static_cast<float*>(p.output) + index * p.vocab_size;
  if (max != max || max == -kInfinity)
    return write_row(row, output, [](float, int32_t) { return __uint_as_float(0x7fc00000u); });
  if (max == kInfinity) {  // the limit of ever larger values
    row.set_infinite();
    max = Row::kInfinite;
  }
  if (threadIdx.x == 0) s.weights.set_max(max, 0.0);
  __syncthreads();
  if (!(p.temperature.at(index) > 0.0)) {
    const uint64_t first = first_id_of_row(team, row, max);
    return write_row(row, output, [&](float, int32_t id) { return uint64_t(id) == first ? 1.0f : 0.0f; });
  }
  const LogitWeights weights = s.weights;
  WeightSum sum;
  row.for_each_vector([&](const auto& x, int32_t) {
    float fractions[Row::kLogits];
#pragma unroll
    for (int j = 0; j < Row::kLogits; ++j) fractions[j] = weights.fraction_of_any(x[j]);
    sum.add(weights, fractions);
  });
  s.sums.tell(team, sum.total(weights));
  team.sync();
  const float scale = float(ldexp(1.0, fraction_bits) / double(s.sums.total(team)));
  write_row(row, output, [&](float x, int32_t) { return weights.fraction_of_any(x) * scale; });
}

}  // namespace

bool softmax(const RenormParams& p, const Gpu& gpu) {
  auto off = [](const auto& filter, double value) { return filter.data == nullptr && filter.value == value; };
  if (p.from_probs || !off(p.top_k, 0) || !off(p.top_p, 1.0) || !off(p.min_p, 0.0)) return false;
  bool taken = false;
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    const RowLaunch launch(gpu, p.batch, p.vocab_size, sizeof(T), /*writes_rows=*/true,
                           sizeof(SoftmaxScratch), /*a_multiprocessor=*/3);
    taken = launch.keep;
    if (taken)
      launch.run(gpu, &softmax_rows<T>, p.batch, p, launch.rows_at_once(gpu),
                 std::min(weight_fraction_bits(p.vocab_size), kMaxFractionBits));
  });
  return taken;
}

}  // namespace fi::cuda
