// One block's part of a row of logits: where its tokens are, what they weigh.
//
// A row is seen as 16-byte vectors at aligned addresses (the first and the last may stick out of it). A block
// takes consecutive vectors, each of its warps consecutive ones of those, so that sums by warp are sums over
// ranges of ids. Where the block's part fits it is read from memory once and kept in shared memory.
#pragma once

#include "fi/cuda/launch.h"
#include "fi/cuda/pack.h"
#include "fi/cuda/ptx.h"
#include "fi/sampling_math.h"

namespace fi::cuda {

inline constexpr float kInfinity = __builtin_huge_valf();

// What orders tokens: larger logit first, lower id first among equals. Smaller comes first.
FI_DEVICE_INLINE uint64_t place_of(float logit, int32_t id) {
  return uint64_t(order_key(logit + 0.0f)) << 32 | uint32_t(id);  // -0 is +0
}
FI_DEVICE_INLINE float logit_at(uint64_t place) { return key_logit(uint32_t(place >> 32)); }

// What is kept: the tokens up to a place.
struct Kept {
  float logit;
  uint32_t last_id;  // of those at that logit

  __device__ explicit Kept(uint64_t place)
      : logit(place == ~uint64_t{0} ? -kInfinity : logit_at(place)), last_id(uint32_t(place)) {}
  __device__ bool operator()(float x, int32_t id) const {
    return (x > logit) | ((x == logit) & (uint32_t(id) <= last_id));  // no branches
  }
};

// A weight has at most so many fraction bits: two halves of it, each a float's mantissa, are exact.
inline constexpr int kMaxFractionBits = 45;

// How logits become weights and bins; the same in all blocks of a row.
struct Weights {
  float max;             // of the row; 0 where that is infinite
  float exponent_scale;  // log2(e) / temperature
  float eligible;        // logits below max - eligible weigh nothing (min-p)
  int fraction_bits;     // the maximum weighs 2^fraction_bits
  float low_base;        // 1.5 * 2^(23 - fraction_bits), the last place of which is 2^-fraction_bits

  __device__ void set_fraction_bits(int bits) {
    fraction_bits = bits;
    low_base = __uint_as_float(uint32_t(127 + 23 - bits) << 23 | 1u << 22);
  }

  // How many octaves a weight is below that of the maximum.
  __device__ float octaves(float logit) const { return __fmul_rn(max - logit, exponent_scale); }

  // The weight as a fraction of the maximum's.
  __device__ float fraction(float logit) const {
    return exp2_approx(max - logit <= eligible ? -octaves(logit) : -kInfinity);  // a select, no branch
  }
  __device__ inline uint64_t weigh(float logit) const;
};

// A sum of weights, exact. A conversion to 64-bit integers runs at a small part of the rate of additions;
// adding a large power of two rounds to its last place just so, twice.
struct WeightSum {
  uint64_t high = 0;  // of 2^-22
  uint32_t low = 0;   // of 2^-fraction_bits, signed

  // N at once: 64-bit additions are two.
  template <int N>
  __device__ void add(const Weights& weights, const float (&fractions)[N]) {
    constexpr uint32_t kTwo = 0x40000000u;  // 2.0f, the last place of which is 2^-22
    uint32_t highs = 0;
#pragma unroll
    for (const float fraction : fractions) {
      const float a = __fadd_rn(fraction, 2.0f);
      const float rest = __fadd_rn(fraction, -__fadd_rn(a, -2.0f));
      highs += __float_as_uint(a) - kTwo;
      low += __float_as_uint(__fadd_rn(rest, weights.low_base)) - __float_as_uint(weights.low_base);
    }
    high += highs;
  }
  __device__ uint64_t total(const Weights& weights) const {
    return (high << (weights.fraction_bits - 22)) + uint64_t(int64_t(int32_t(low)));
  }
};

__device__ inline uint64_t Weights::weigh(float logit) const {
  WeightSum sum;
  sum.add(*this, {fraction(logit)});
  return sum.total(*this);
}

// Itself in shared memory behind the first pass: not to take registers between passes. With kKept the logits
// are kept in shared memory too, behind `kOffset` bytes; else they are read from memory each time.
template <class T, int Threads, bool kKept, uint32_t kOffset>
struct Slice {
  using Logit = T;
  static constexpr int kLogits = 16 / sizeof(T);  // in a vector
  static constexpr int kWarps = Threads / 32;

  const T* row;
  int32_t n;                       // tokens in the row
  int32_t per_warp;                // vectors
  int32_t block_begin, block_end;  // vectors of this block
  bool infinite;                   // some logit is +inf: those count as 0, all others as -inf (not kKept)

  // Part `rank` of `blocks`.
  __device__ Slice(const T* row, int64_t vocab_size, uint32_t rank, uint32_t blocks)
      : row(row), n(int32_t(vocab_size)), infinite(false) {
    const int32_t all = int32_t((int64_t(lead()) + n + kLogits - 1) / kLogits);
    const int32_t warps = int32_t(blocks) * kWarps;
    per_warp = (all + warps - 1) / warps;
    block_begin = int32_t(min(int64_t(all), int64_t(rank) * kWarps * per_warp));
    block_end = int32_t(min(int64_t(all), int64_t(block_begin) + kWarps * per_warp));
  }

  __device__ uint4* kept() const { return reinterpret_cast<uint4*>(dynamic_smem() + kOffset); }

  // Elements of the first vector in front of the row.
  __device__ int32_t lead() const {
    return int32_t(reinterpret_cast<uintptr_t>(row) & 15) / int32_t(sizeof(T));
  }
  // The vectors of warp `warp` of the block.
  __device__ int32_t begin_of(uint32_t warp) const {
    return min(block_end, block_begin + int32_t(warp) * per_warp);
  }
  __device__ int32_t end_of(uint32_t warp) const { return min(block_end, begin_of(warp) + per_warp); }
  __device__ int32_t warp_begin() const { return begin_of(threadIdx.x / 32); }
  __device__ int32_t warp_end() const { return end_of(threadIdx.x / 32); }
  __device__ int32_t per_block() const { return per_warp * kWarps; }  // at most
  // The warp, of all blocks' in turn, whose token that is.
  __device__ uint32_t warp_of(int32_t id) const {
    return uint32_t((id + lead()) / kLogits) / uint32_t(per_warp);
  }
  // The vectors that lie in the row as a whole.
  __device__ int32_t whole_begin() const { return lead() == 0 ? 0 : 1; }
  __device__ int32_t whole_end() const { return int32_t((int64_t(lead()) + n) / kLogits); }

  // A vector that sticks out of the row, with -inf there.
  static FI_DEVICE_NOINLINE uint4 load_partial(const T* row, int32_t n, int64_t id) {
    union {
      T logits[kLogits];
      uint4 all;
    } v;
    for (int j = 0; j < kLogits; ++j)
      v.logits[j] = id + j >= 0 && id + j < n ? row[id + j] : from_float<T>(-kInfinity);
    return v.all;
  }

  // The first pass, as for_each_vector: the slice comes to shared memory before, if it is to be kept there.
  // Each thread copies what it will read: no barrier. `meanwhile()` runs while the copies are under way.
  template <class Meanwhile, class F>
  __device__ __forceinline__ void fetch(const Meanwhile& meanwhile, const F& f) const {
    if constexpr (kKept) {
      const int32_t end = warp_end();
      uint4* const to = kept() - block_begin;
#pragma unroll 1
      for (int32_t v = warp_begin() + int32_t(threadIdx.x % 32); v < end; v += 32) {
        const int64_t id = int64_t(v) * kLogits - lead();
        if (v >= whole_begin() && v < whole_end()) {
          cp_async_16(to + v, row + id);
        } else {
          to[v] = load_partial(row, n, id);
        }
      }
      cp_async_commit();
    }
    meanwhile();
    if constexpr (kKept) cp_async_wait<0>();
    for_each_vector(f);
  }

  // Asks for the slice to come to the second-level cache.
  __device__ void prefetch() const {
    const int32_t begin = max(block_begin, whole_begin()), end = min(block_end, whole_end());
    if (begin < end) prefetch_l2(row + (int64_t(begin) * kLogits - lead()), uint32_t(end - begin) * 16);
  }

  __device__ void read(int32_t vector, float (&x)[kLogits]) const {
    if constexpr (kKept) {
      unpack_16<T>(x, kept()[vector - block_begin]);
    } else {
      const int64_t id = int64_t(vector) * kLogits - lead();
      const bool whole = id >= 0 && id + kLogits <= n;
      unpack_16<T>(x, whole ? load_streaming_16(row + id) : load_partial(row, n, id));
      if (infinite) {
#pragma unroll
        for (int j = 0; j < kLogits; ++j) x[j] = x[j] == kInfinity ? 0.0f : -kInfinity;
      }
    }
  }

  // Some logit is +inf. All threads call it, between barriers of the block.
  __device__ void set_infinite() {
    if constexpr (kKept) {
      T* const logits = reinterpret_cast<T*>(kept());
      for (int32_t i = threadIdx.x; i < num_tokens(); i += Threads)
        logits[i] = from_float<T>(to_float(logits[i]) == kInfinity ? 0.0f : -kInfinity);
    } else {
      if (threadIdx.x == 0) infinite = true;
    }
  }

  // f(logits, id of the first) for the vectors of this warp, -inf where a lane has none.
  template <class F>
  __device__ __forceinline__ void for_each_vector(const F& f) const {
    constexpr int kAtOnce = 8 / kLogits;
    const Slice slice = *this;  // one read of what is in shared memory
    const int32_t first_id = -slice.lead(), end = slice.warp_end(), lane = int32_t(threadIdx.x % 32);
    for (int32_t base = slice.warp_begin() + lane; base - lane < end; base += 32 * kAtOnce) {
      float x[kAtOnce][kLogits];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (float& logit : x[i]) logit = -kInfinity;
        if (base + 32 * i < end) slice.read(base + 32 * i, x[i]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) f(x[i], (base + 32 * i) * kLogits + first_id);
    }
  }
  // f(logit, id) for those of a vector's tokens that `mask` has; one copy of f's code.
  template <class F>
  static __device__ __forceinline__ void for_each_of(uint32_t mask, const float (&x)[kLogits], int32_t id,
                                                     const F& f) {
#pragma unroll 1
    for (; mask != 0; mask &= mask - 1) {
      const int j = __ffs(int(mask)) - 1;
      float logit = x[0];
#pragma unroll
      for (int i = 1; i < kLogits; ++i) logit = j == i ? x[i] : logit;
      f(logit, id + j);
    }
  }

  // f(logit, id) for the tokens of this thread, -inf where it has none.
  template <class F>
  __device__ __forceinline__ void for_each(const F& f) const {
    for_each_vector([&](const float (&x)[kLogits], int32_t id) {
#pragma unroll
      for (int j = 0; j < kLogits; ++j) f(x[j], id + j);
    });
  }

  // The tokens of the block, one at a time: for rare passes, whose code is not to be there kLogits times.
  __device__ int32_t num_tokens() const { return (block_end - block_begin) * kLogits; }
  __device__ int32_t id_of(int32_t i) const { return block_begin * kLogits + i - lead(); }
  __device__ float logit(int32_t i) const {
    const int32_t id = id_of(i);
    if (id < 0 || id >= n) return -kInfinity;
    if constexpr (kKept) return to_float(reinterpret_cast<const T*>(kept())[i]);
    const float x = to_float(row[id]);
    return !infinite ? x : x == kInfinity ? 0.0f : -kInfinity;
  }
};

}  // namespace fi::cuda
