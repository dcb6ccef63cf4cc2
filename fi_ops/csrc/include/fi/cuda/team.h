// The blocks that work on one thing together: a cluster's, or one block alone.
//
// All threads call every member together and all blocks get the same results, so that they take the same
// decisions without a leader. What crosses blocks is written to every block of the team and read after the
// barrier: no block reads a peer's memory after the last barrier that it shares with it.
#pragma once

#include "fi/cuda/cluster.h"

namespace fi::cuda {

inline constexpr unsigned kMaxTeam = 8;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Who takes part in a sum: all blocks of the team, or each block by itself.
enum class Among { kTeam, kBlock };
enum class Fold { kSum, kMin };

// The first thing in each block's dynamic shared memory.
template <int Warps>
struct TeamScratch {
  struct Pair {
    uint64_t a, b;
  };
  Pair slots[2][kMaxTeam];   // what each block shared; alternating
  uint64_t folds[2][Warps];  // of each warp; alternating
};

template <int Threads>
class Team {
 public:
  static constexpr int kWarps = Threads / 32;
  using Scratch = TeamScratch<kWarps>;
  static_assert(kWarps <= 32 && (kWarps & (kWarps - 1)) == 0);

  __device__ Team(uint32_t rank, uint32_t size) : rank(rank), size(size) {}

  const uint32_t rank, size;

  __device__ void sync() const {
    if (size == 1) {
      __syncthreads();
    } else {
      cluster_arrive();
      cluster_wait();
    }
  }

  // What block `block` has where this one has `p`, in shared memory.
  template <class V>
  __device__ V* at(V* p, uint32_t block) const {
    return size == 1 ? p : peer_smem(p, block);
  }

  // Shares a pair (that of warp 0, the same in its lanes) with the team; then `shared(r)` is that of block r,
  // until the share after the next one.
  __device__ void share(uint64_t a, uint64_t b) {
    team_side_ ^= 1;
    if (threadIdx.x < size) *at(&scratch().slots[team_side_][rank], threadIdx.x) = {a, b};
    sync();
  }
  __device__ typename Scratch::Pair shared(uint32_t block) const {
    return scratch().slots[team_side_][block];
  }

  // Folds a value (below 2^63) of every thread; all have the result.
  __device__ uint64_t sum(uint64_t value, Among among = Among::kTeam) {
    return fold<Fold::kSum>(value, among);
  }
  __device__ uint64_t min(uint64_t value, Among among = Among::kTeam) {
    return fold<Fold::kMin>(value, among);
  }
  __device__ uint64_t max(uint64_t value, Among among = Among::kTeam) {
    return ~fold<Fold::kMin>(~value, among);
  }

  // Of a value (below 2^63) of every lane, for all lanes.
  static __device__ uint64_t sum_of_warp(uint64_t value) { return fold_warp<Fold::kSum>(value); }

  // Writes a value, the same in all lanes of the warp, to *p of every block.
  template <class V>
  __device__ void tell_all(V* p, V value) const {
    if (threadIdx.x % 32 < size) *at(p, threadIdx.x % 32) = value;
  }

  // Makes totals[i] of every block the sum of all blocks' parts[i], for i < n. `inbox` has room for n; no
  // block may still use its own.
  template <uint32_t n, class N>
  __device__ void sum_arrays(const N* parts, N* inbox, N* totals) {
    static_assert(n % kMaxTeam == 0);
    const uint32_t share = n / size;  // that a block adds up
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n; i += Threads) {
      const uint32_t owner = i / share;
      *at(inbox + rank * share + (i - owner * share), owner) = parts[i];
    }
    sync();
    for (uint32_t i = threadIdx.x; i < share; i += Threads) {
      N total = 0;
      for (uint32_t block = 0; block < size; ++block) total += inbox[block * share + i];
      for (uint32_t block = 0; block < size; ++block) *at(totals + rank * share + i, block) = total;
    }
    sync();
  }

  // The sum of the values (below 2^63) of the threads before this one, in this block.
  __device__ uint64_t scan(uint64_t value) {
    block_side_ ^= 1;
    return scan_block(value, block_side_);
  }

 private:
  static __device__ Scratch& scratch() { return *reinterpret_cast<Scratch*>(dynamic_smem()); }

  static FI_DEVICE_INLINE uint64_t neutral(Fold fold) { return fold == Fold::kSum ? 0 : ~uint64_t{0}; }

  // Over a warp, for all its lanes: one instruction folds 32 bits.
  template <Fold kFold>
  static __device__ uint64_t fold_warp(uint64_t value) {
    if constexpr (kFold == Fold::kSum) {
      constexpr uint32_t kPart = (1u << 21) - 1;
      const uint64_t low = __reduce_add_sync(kAllLanes, uint32_t(value) & kPart),
                     middle = __reduce_add_sync(kAllLanes, uint32_t(value >> 21) & kPart),
                     high = __reduce_add_sync(kAllLanes, uint32_t(value >> 42));
      return low + (middle << 21) + (high << 42);
    } else {
      const uint32_t high = __reduce_min_sync(kAllLanes, uint32_t(value >> 32));
      const uint32_t low =
          __reduce_min_sync(kAllLanes, uint32_t(value >> 32) == high ? uint32_t(value) : ~0u);
      return uint64_t(high) << 32 | low;
    }
  }

  // Folds are called from many places: one copy of the code for all.
  template <Fold kFold>
  static FI_DEVICE_NOINLINE uint64_t fold_block(uint64_t value, uint32_t side) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = fold_warp<kFold>(value);
    if (lane == 0) scratch().folds[side][warp] = value;
    __syncthreads();
    return fold_warp<kFold>(lane < kWarps ? scratch().folds[side][lane] : neutral(kFold));
  }

  static FI_DEVICE_NOINLINE uint64_t scan_block(uint64_t value, uint32_t side) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint64_t up_to = value;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, up_to, step);
      if (lane >= step) up_to += other;
    }
    if (lane == 31) scratch().folds[side][warp] = up_to;
    __syncthreads();
    return fold_warp<Fold::kSum>(lane < warp ? scratch().folds[side][lane] : 0) + up_to - value;
  }

  template <Fold kFold>
  __device__ uint64_t fold(uint64_t value, Among among) {
    block_side_ ^= 1;
    value = fold_block<kFold>(value, block_side_);
    if (among == Among::kBlock || size == 1) return value;
    share(value, 0);
    const unsigned lane = threadIdx.x % 32;
    return fold_warp<kFold>(lane < size ? shared(lane).a : neutral(kFold));
  }

  uint32_t team_side_ = 0, block_side_ = 0;
};

}  // namespace fi::cuda
