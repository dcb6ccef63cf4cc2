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
enum class Fold { kSum, kMin, kMax, kMaxHalves };

// The first thing in each block's dynamic shared memory.
template <int Warps>
struct TeamScratch {
  struct Pair {
    uint64_t a, b;
  };
  Pair slots[2][kMaxTeam];  // what each block shared; alternating
  uint64_t results[2];      // of a block by itself; alternating
  uint64_t warps[3][Warps];
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

  // Folds a value of every thread; all have the result.
  __device__ uint64_t sum(uint64_t value, Among among = Among::kTeam) {
    return fold(Fold::kSum, value, among);
  }
  __device__ uint64_t min(uint64_t value, Among among = Among::kTeam) {
    return fold(Fold::kMin, value, among);
  }
  __device__ uint64_t max(uint64_t value, Among among = Among::kTeam) {
    return fold(Fold::kMax, value, among);
  }
  // The largest `high` in the upper half, the largest `low` in the lower one.
  __device__ uint64_t max_halves(uint32_t high, uint32_t low) {
    return fold(Fold::kMaxHalves, uint64_t(high) << 32 | low, Among::kTeam);
  }
  // The sum over this block's threads, for all lanes of warp 0.
  __device__ uint64_t sum_for_warp_0(uint64_t value) const { return fold_block(Fold::kSum, value); }

  // Makes totals[i] of every block the sum of all blocks' parts[i], for i < n (a multiple of kMaxTeam). A
  // sync of the team must lie between the writing of parts and this.
  template <class N>
  __device__ void sum_arrays(N* parts, N* totals, uint32_t n) const {
    const uint32_t share = n / size;
    for (uint32_t i = rank * share + threadIdx.x; i < (rank + 1) * share; i += Threads) {
      N total = 0;
#pragma unroll 4
      for (uint32_t block = 0; block < size; ++block) total += *at(parts + i, block);
#pragma unroll 1
      for (uint32_t block = 0; block < size; ++block) *at(totals + i, block) = total;
    }
    sync();
  }

  // Makes each v[k] the sum of those of the threads before this one, in this block.
  template <int K>
  __device__ void scan_block(uint64_t (&v)[K]) const {
    static_assert(K <= 3);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int k = 0; k < K; ++k) {
      uint64_t up_to = v[k];
#pragma unroll 1
      for (unsigned step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(kAllLanes, up_to, step);
        if (lane >= step) up_to += other;
      }
      if (lane == 31) scratch().warps[k][warp] = up_to;
      v[k] = up_to - v[k];
    }
    __syncthreads();
    for (int k = 0; k < K; ++k) {
#pragma unroll 4
      for (unsigned before = 0; before < kWarps; ++before)
        v[k] += before < warp ? scratch().warps[k][before] : 0;
    }
    __syncthreads();
  }

 private:
  static __device__ Scratch& scratch() { return *reinterpret_cast<Scratch*>(dynamic_smem()); }

  static __device__ uint64_t folded(Fold fold, uint64_t a, uint64_t b) {
    if (fold == Fold::kSum) return a + b;
    if (fold == Fold::kMaxHalves) {
      const uint32_t low = ::max(uint32_t(a), uint32_t(b)),
                     high = ::max(uint32_t(a >> 32), uint32_t(b >> 32));
      return uint64_t(high) << 32 | low;
    }
    return (a < b) == (fold == Fold::kMin) ? a : b;
  }

  // Folds are called from many places: one copy of the code for all. All lanes of warp 0 have the block's
  // result.
  static FI_DEVICE_NOINLINE uint64_t fold_block(Fold fold, uint64_t value) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2)
      value = folded(fold, value, __shfl_xor_sync(kAllLanes, value, step));
    if (lane == 0) scratch().warps[0][warp] = value;
    __syncthreads();
    if (warp == 0) {
      value = scratch().warps[0][lane % kWarps];
#pragma unroll 1
      for (int step = kWarps / 2; step > 0; step /= 2)
        value = folded(fold, value, __shfl_xor_sync(kAllLanes, value, step));
    }
    return value;
  }

  __device__ uint64_t fold(Fold fold, uint64_t value, Among among) {
    value = fold_block(fold, value);
    if (among == Among::kBlock) {
      block_side_ ^= 1;
      if (threadIdx.x == 0) scratch().results[block_side_] = value;
      __syncthreads();
      return scratch().results[block_side_];
    }
    share(value, 0);
    return fold_shared(fold, size, team_side_);
  }
  static FI_DEVICE_NOINLINE uint64_t fold_shared(Fold fold, uint32_t size, uint32_t side) {
    const auto& slots = scratch().slots[side];
    uint64_t value = slots[0].a;
#pragma unroll
    for (uint32_t block = 1; block < kMaxTeam; ++block) {
      const uint64_t with = folded(fold, value, slots[block].a);
      value = block < size ? with : value;
    }
    return value;
  }

  uint32_t team_side_ = 0, block_side_ = 0;
};

}  // namespace fi::cuda
