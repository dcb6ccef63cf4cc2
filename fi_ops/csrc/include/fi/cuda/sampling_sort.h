// Sorting places, smaller ones first: a bitonic network that works in place on any number of them.
#pragma once

#include <cstdint>

namespace fi::cuda {

// `places` has get(i) and set(i, place) for i < n. The threads are `rank` of `size`; sync() is their barrier,
// behind which they see what others have set. All comparisons put the larger place behind, so that places
// from n on, which aren't there, count as larger than all and never move.
template <class Places, class Sync>
__device__ void sort_places(const Places& places, int64_t n, int64_t rank, int64_t size, const Sync& sync) {
  auto order = [&](int64_t i, int64_t j) {
    if (j >= n) return;
    const uint64_t a = places.get(i), b = places.get(j);
    if (a <= b) return;
    places.set(i, b);
    places.set(j, a);
  };
  int64_t pairs = 1;
  while (2 * pairs < n) pairs *= 2;
#pragma unroll 1
  for (int64_t sorted = 1; sorted < n; sorted *= 2) {  // runs of that many are sorted
    for (int64_t t = rank; t < pairs; t += size) {
      const int64_t in_run = t & (sorted - 1), begin = 2 * (t - in_run);
      order(begin + in_run, begin + 2 * sorted - 1 - in_run);
    }
    sync();
#pragma unroll 1
    for (int64_t step = sorted / 2; step > 0; step /= 2) {
      for (int64_t t = rank; t < pairs; t += size) {
        const int64_t i = 2 * t - (t & (step - 1));
        order(i, i + step);
      }
      sync();
    }
  }
}

}  // namespace fi::cuda
