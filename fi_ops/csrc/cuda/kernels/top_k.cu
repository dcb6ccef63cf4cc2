// The largest values of rows, and logits with all others masked: one launch, a team of blocks a row, which it
// reads from memory once (fi/cuda/sampling_first.h says how it finds them).
#include "fi/top_k.h"

#include "fi/cuda/sampling_top.h"
#include "fi/cuda/sampling_write.h"
#include "fi/dispatch.h"

namespace fi::cuda {
namespace {

// The result's indices hold places until all are sorted.
struct IndexPlaces {
  int64_t* indices;
  __device__ uint64_t get(int64_t i) const { return uint64_t(indices[i]); }
  __device__ void set(int64_t i, uint64_t place) const { indices[i] = int64_t(place); }
};

template <class T, Keep kKeep>
__global__ void __launch_bounds__(kSampleThreads, 2) top_k_rows(TopKParams p, int32_t room) {
  using Row = RowSlice<OrderedLogits<T>, kKeep>;
  auto team = begin_team();
  const int64_t row = blockIdx.x / team.size;
  const T* const input = static_cast<const T*>(p.input) + row * p.row_stride;
  T* const values = static_cast<T*>(p.values) + row * p.k;
  int64_t* const indices = p.indices + row * p.k;

  const FirstFinder<Row> finder(team);
  Range finite;
  const auto counts = finder.fetch({input, p.vocab_size, team.rank, team.size, room}, p.k, finite);
  auto put = [&](int64_t i, int32_t id) {
    values[i] = input[id];
    indices[i] = id;
  };
  if (const uint32_t n = finder.sort_short(p.k, counts, finite); n > 0) {
    for_each_of_short(finder, n, p.k, p.sorted,
                      [&](int64_t i, uint64_t place) { put(i, int32_t(uint32_t(place))); });
    return;
  }
  const FirstTokens first = finder.find(p.k, /*exact_ties=*/true, counts, finite);
  if (p.sorted) {
    for_each_first_in_order(finder, first, p.k, IndexPlaces{indices},
                            [&](int64_t i, uint64_t place) { put(i, int32_t(uint32_t(place))); });
  } else {
    for_each_first(finder, first, [&](uint64_t i, float, int32_t id) { put(int64_t(i), id); });
  }
}

template <class T, Keep kKeep>
__global__ void __launch_bounds__(kSampleThreads, 2) mask_rows(RenormParams p, int32_t room) {
  using Row = RowSlice<OrderedLogits<T>, kKeep>;
  auto team = begin_team();
  const int64_t row = blockIdx.x / team.size;
  const T* const input = static_cast<const T*>(p.input) + row * p.row_stride;

  const FirstFinder<Row> finder(team);
  Range finite;
  const int64_t k = p.top_k.at(row);
  const auto counts = finder.fetch({input, p.vocab_size, team.rank, team.size, room}, k, finite);
  FirstTokens first;                               // all
  if (finder.sort_short(k, counts, finite) > 0) {  // in every block
    const uint64_t last = finder.s.select.own.brief.sorted[k - 1];
    first = {logit_at(last), p.exact_ties ? uint32_t(last) : 0xffffffffu};
  } else if (counts.nan == 0 && k > 0 && k < p.vocab_size) {
    first = finder.find(k, p.exact_ties, counts, finite);
  }
  T* const output = static_cast<T*>(p.output) + row * p.vocab_size;
  if (counts.nan > 0) {
    write_row(finder.slice, output, [](float, int32_t) { return __uint_as_float(0x7fc00000u); });
  } else {
    write_row(finder.slice, output, [&](float x, int32_t id) { return first(x, id) ? x : -kInfinity; });
  }
}

}  // namespace

void top_k(const TopKParams& p, const Gpu& gpu) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    const RowLaunch launch(gpu, p.rows, p.vocab_size, sizeof(T));
    launch.run(gpu, launch.keep ? &top_k_rows<T, Keep::kAll> : &top_k_rows<T, Keep::kPart>, p.rows, p,
               launch.room);
  });
}

void top_k_mask_logits(const RenormParams& p, const Gpu& gpu) {
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    const RowLaunch launch(gpu, p.batch, p.vocab_size, sizeof(T), /*writes_rows=*/true);
    launch.run(gpu, launch.keep ? &mask_rows<T, Keep::kAll> : &mask_rows<T, Keep::kPart>, p.batch, p,
               launch.room);
  });
}

}  // namespace fi::cuda
