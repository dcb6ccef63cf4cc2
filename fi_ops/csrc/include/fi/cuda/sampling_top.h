// The first k tokens of a row written out, by id or in order.
//
// All blocks know how many each warp keeps, so that each token's place by id is known. To be sorted, up to
// kListed of them become a list in the first block's shared memory; more are put where the result goes and
// sorted there, by all blocks of the team.
#pragma once

#include "fi/cuda/sampling_first.h"
#include "fi/cuda/sampling_sort.h"

namespace fi::cuda {

// Places in shared memory.
struct SharedPlaces {
  uint64_t* places;
  __device__ uint64_t get(int64_t i) const { return places[i]; }
  __device__ void set(int64_t i, uint64_t place) const { places[i] = place; }
};

// Calls put(i, x, id) for the tokens of this block that `first` has, the i-th of the row by id. The sums of
// the team must not be in use.
template <class Row, class Put>
__device__ void for_each_first(const TeamRow<Row>& row, const FirstTokens& first, const Put& put) {
  constexpr int kLogits = Row::kLogits;
  const auto& slice = row.slice;
  const int32_t n = slice.n;
  auto among = [&](const float (&x)[kLogits], int32_t id) {
    uint32_t mask = 0;
#pragma unroll
    for (int j = 0; j < kLogits; ++j) mask |= id + j >= 0 && id + j < n && first(x[j], id + j) ? 1u << j : 0;
    return mask;
  };
  uint64_t mine = 0;
  slice.for_each_own_vector([&](const auto& x, int32_t id) { mine += uint32_t(__popc(among(x, id))); });
  auto& sums = row.s.select.kept;
  sums.tell(row.team, mine);
  row.team.sync();
  const uint32_t lane = threadIdx.x % 32, warp = row.team.rank * kSampleWarps + threadIdx.x / 32;
  uint64_t before = 0;
  for (uint32_t i = lane; i < warp; i += 32) before += sums.values[i];
  before = row.team.sum_of_warp(before);

  const int32_t end = slice.warp_end();
  for (int32_t base = slice.warp_begin(); base < end; base += 32) {
    const int32_t vector = base + int32_t(lane), id = vector * kLogits - slice.lead();
    float x[kLogits];
    uint32_t mask = 0;
    if (vector < end) {
      slice.read(vector, threadIdx.x / 32, x);
      mask = among(x, id);
    }
    if (!__any_sync(kAllLanes, mask != 0)) continue;
    const uint32_t count = uint32_t(__popc(mask));
    uint32_t up_to = count;
#pragma unroll
    for (uint32_t step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, up_to, step);
      if (lane >= step) up_to += other;
    }
    uint64_t at = before + up_to - count;
    if (mask != 0)
      Row::for_each_of(mask, x, id, [&](float value, int32_t token) { put(at++, value, token); });
    before += __shfl_sync(kAllLanes, up_to, 31);
  }
}

// The same from a short list that is sorted (FirstFinder::sort_short), in the first block.
template <class Row, class Put>
__device__ void for_each_of_short(const TeamRow<Row>& row, uint32_t n, int64_t k, bool sorted,
                                  const Put& put) {
  if (row.team.rank != 0) return;
  ShortList& brief = row.s.select.own.brief;
  const uint32_t i = threadIdx.x;
  const bool is_first = i < uint32_t(k);
  const uint64_t place = i < n ? brief.sorted[i] : 0;
  if (sorted) {
    if (is_first) put(int64_t(i), place);
    return;
  }
  if (i < n) brief.ranks[brief.id_rank[i]] = is_first;
  __syncthreads();
  const uint64_t before = row.team.scan(i < n ? brief.ranks[i] : 0);
  if (i < n) brief.ranks[i] = uint32_t(before);
  __syncthreads();
  if (is_first) put(int64_t(brief.ranks[brief.id_rank[i]]), place);
}

// Calls put(i, place) for the k tokens that `first` has, i in their order; after a barrier of the team,
// behind which no block reads a peer's memory. `room`: places that can be read back, k of them, in memory
// that all blocks see.
template <class Row, class Room, class Put>
__device__ void for_each_first_in_order(const TeamRow<Row>& row, const FirstTokens& first, int64_t k,
                                        const Room& room, const Put& put) {
  const auto& team = row.team;
  if (k <= int64_t(kListed)) {
    uint64_t* const list = row.s.select.all.list;
    for_each_first(row, first,
                   [&](uint64_t i, float x, int32_t id) { *team.at(list + i, 0) = place_in_order(x, id); });
    team.sync();
    if (team.rank != 0) return;
    sort_places(SharedPlaces{list}, k, threadIdx.x, kSampleThreads, [] { __syncthreads(); });
    for (int64_t i = threadIdx.x; i < k; i += kSampleThreads) put(i, list[i]);
    return;
  }
  for_each_first(row, first,
                 [&](uint64_t i, float x, int32_t id) { room.set(int64_t(i), place_in_order(x, id)); });
  team.sync();
  const int64_t rank = team.rank * kSampleThreads + threadIdx.x, size = int64_t(team.size) * kSampleThreads;
  sort_places(room, k, rank, size, [&] { team.sync(); });
  for (int64_t i = rank; i < k; i += size) put(i, room.get(i));
}

}  // namespace fi::cuda
