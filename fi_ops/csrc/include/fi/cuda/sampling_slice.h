// One block's part of a row of logits or probabilities: where its tokens are.
//
// A row is seen as 16-byte vectors at aligned addresses (the first and the last may stick out of it). A block
// takes consecutive vectors, each of its warps consecutive ones of those, so that sums by warp are sums over
// ranges of ids. Where the block's part fits it is read from memory once and kept in shared memory; else what
// fits of each warp's range is, and the rest is read again by every pass.
#pragma once

#include "fi/cuda/launch.h"
#include "fi/cuda/sampling_source.h"

namespace fi::cuda {

// What is kept in shared memory of a block's part of a row.
enum class Keep { kNone, kPart, kAll };

// Itself in shared memory behind the first pass: not to take registers between passes. The values that are
// kept lie in shared memory too, behind `kOffset` bytes.
template <class Source, int Threads, Keep kKeep, uint32_t kOffset>
struct Slice {
  using T = typename Source::Value;
  using Weights = typename Source::Weights;
  static constexpr float kInfinite = Source::kInfinite;
  static constexpr Keep kKeeping = kKeep;
  static constexpr bool kEarly = Source::kEarly && kKeep == Keep::kPart;  // as it is not faster for kept rows
  static_assert(Source::kSubtracts == (kKeep == Keep::kNone), "copies to shared memory can't subtract");
  static_assert(kOffset % 128 == 0);
  static constexpr int kLogits = 16 / sizeof(T);  // in a vector
  static constexpr int kWarps = Threads / 32;

  const T* row;
  int32_t n;                       // tokens in the row
  int32_t per_warp;                // vectors
  int32_t block_begin, block_end;  // vectors of this block
  int32_t room;                    // vectors that are kept of a warp's (kPart)
  bool infinite;                   // some logit is +inf: those alone weigh something (not kAll)
  const T* minus = nullptr;        // a row to be subtracted (kSubtracts)

  // Part `rank` of `blocks`.
  __device__ Slice(const T* row, int64_t vocab_size, uint32_t rank, uint32_t blocks, int32_t room = 0)
      : row(row), n(int32_t(vocab_size)), room(room), infinite(false) {
    const int32_t all = int32_t((int64_t(lead()) + n + kLogits - 1) / kLogits);
    const int32_t warps = int32_t(blocks) * kWarps;
    per_warp = (all + warps - 1) / warps;
    block_begin = int32_t(min(int64_t(all), int64_t(rank) * kWarps * per_warp));
    block_end = int32_t(min(int64_t(all), int64_t(block_begin) + kWarps * per_warp));
    // So that lines of 128 bytes begin at the same vectors in both memories, as they do where all is kept.
    if constexpr (kKeep == Keep::kPart) this->room = room - ((room - per_warp) & 7);
  }

  __device__ uint4* kept() const { return reinterpret_cast<uint4*>(dynamic_smem() + kOffset); }
  // Of a warp of the block.
  __device__ uint4* kept_of(uint32_t warp) const {
    return kept() + int32_t(warp) * (kKeep == Keep::kPart ? room : per_warp);
  }

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
  // A warp's vectors: the first `kept` - 1 and the last one are kept in shared memory, `streamed` between
  // them are not. So those that are read again lie in the row as a whole.
  struct Range {
    int32_t begin, kept, streamed;

    // The vector that is the i-th of those that are kept.
    __device__ int32_t vector_of(int32_t i) const { return begin + i + (i == kept - 1 ? streamed : 0); }
    __device__ int32_t first_streamed() const { return begin + kept - 1; }
  };
  __device__ Range range_of(uint32_t warp) const {
    const int32_t begin = begin_of(warp), count = end_of(warp) - begin;
    const int32_t kept = kKeep == Keep::kPart ? min(count, room) : count;
    return {begin, kept, count - kept};
  }
  __device__ const uint4* vectors() const { return reinterpret_cast<const uint4*>(row - lead()); }
  // Where a vector of a warp's is, in shared memory or not.
  __device__ const uint4* address_of(int32_t vector, uint32_t warp) const {
    const Range range = range_of(warp);
    const bool streamed = uint32_t(vector - range.first_streamed()) < uint32_t(range.streamed);
    const uint4* const kept = kept_of(warp) + min(vector - range.begin, range.kept - 1);
    return streamed ? vectors() + vector : kept;
  }
  // Asks for [first, first + count) of the vectors that are not kept to come to the second-level cache.
  static constexpr int32_t kAhead = 256;
  __device__ void prefetch_streamed(const Range& range, int32_t first, int32_t count) const {
    count = min(count, range.streamed - first);
    if (threadIdx.x % 32 == 0 && count > 0)
      prefetch_l2(vectors() + range.first_streamed() + first, uint32_t(count) * 16);
  }
  // The vectors that lie in the row as a whole.
  __device__ int32_t whole_begin() const { return lead() == 0 ? 0 : 1; }
  __device__ int32_t whole_end() const { return int32_t((int64_t(lead()) + n) / kLogits); }

  // A vector that sticks out of the row or isn't aligned, with nothing where it sticks out.
  static FI_DEVICE_NOINLINE uint4 load_partial(const T* row, int32_t n, int64_t id) {
    union {
      T logits[kLogits];
      uint4 all;
    } v;
    for (int j = 0; j < kLogits; ++j)
      v.logits[j] = id + j >= 0 && id + j < n ? row[id + j] : from_float<T>(Source::kNothing);
    return v.all;
  }

  // The first pass, as for_each_vector, with NaN for values that can't be: what is to be kept of the slice
  // comes to shared memory before. `meanwhile()` runs while the copies are under way.
  template <class Meanwhile, class F>
  __device__ __forceinline__ void fetch(const Meanwhile& meanwhile, const F& f) const {
    begin_copies();
    meanwhile();
    end_copies();
    for_each_vector<true>(f);
  }

  // Copies what is to be kept to shared memory: each thread what it will read, so that no barrier is needed.
  __device__ void begin_copies() const {
    if constexpr (kKeep == Keep::kAll) {
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
    } else if constexpr (kKeep == Keep::kPart) {
      const Range range = range_of(threadIdx.x / 32);
      uint4* const to = kept_of(threadIdx.x / 32);
#pragma unroll 1
      for (int32_t i = int32_t(threadIdx.x % 32); i < range.kept; i += 32) {
        const int32_t v = range.vector_of(i);
        const int64_t id = int64_t(v) * kLogits - lead();
        if (v >= whole_begin() && v < whole_end()) {
          cp_async_16(to + i, row + id, true, l2_evict_first());  // the rest of the row is what L2 is for
        } else {
          to[i] = load_partial(row, n, id);
        }
      }
      cp_async_commit();
      prefetch_streamed(range, 0, kAhead);
    }
  }
  __device__ void end_copies() const {
    if constexpr (kKeep != Keep::kNone) cp_async_wait<0>();
  }

  // Asks for the slice to come to the second-level cache.
  __device__ void prefetch() const {
    const int32_t begin = max(block_begin, whole_begin()), end = min(block_end, whole_end());
    if (begin < end) prefetch_l2(row + (int64_t(begin) * kLogits - lead()), uint32_t(end - begin) * 16);
  }

  // A vector of warp `warp`.
  template <bool kChecked = false>
  __device__ void read(int32_t vector, uint32_t warp, float (&x)[kLogits]) const {
    if constexpr (kKeep == Keep::kAll) {
      unpack_16<T>(x, kept()[vector - block_begin]);
    } else if constexpr (kKeep == Keep::kPart) {
      unpack_16<T>(x, *address_of(vector, warp));
    } else {
      const int64_t id = int64_t(vector) * kLogits - lead();
      const bool whole = id >= 0 && id + kLogits <= n;
      unpack_16<T>(x, whole ? load_streaming_16(row + id) : load_partial(row, n, id));
      if (minus != nullptr) {
        const bool whole = id >= 0 && id + kLogits <= n && reinterpret_cast<uintptr_t>(minus + id) % 16 == 0;
        float other[kLogits];
        unpack_16<T>(other, whole ? load_streaming_16(minus + id) : load_partial(minus, n, id));
#pragma unroll
        for (int j = 0; j < kLogits; ++j) {
          const float rest = x[j] - other[j];
          x[j] = rest < 0.0f ? 0.0f : rest;  // NaN stays
        }
      }
    }
    interpret<kChecked>(x);
  }
  template <bool kChecked>
  __device__ void interpret(float (&x)[kLogits]) const {
#pragma unroll
    for (float& value : x) value = kChecked ? Source::checked(value) : Source::canonical(value);
    if constexpr (kKeep != Keep::kAll && !kChecked) {
      if (infinite) {
#pragma unroll
        for (float& value : x) value = limit_of(value);
      }
    }
  }

  // What a canonical value is in a row with +inf: only those have a weight.
  static __device__ float limit_of(float x) { return x == kInfinity ? Source::kInfinite : -kInfinity; }

  // Some logit is +inf. All threads call it, between barriers of the block.
  __device__ void set_infinite() {
    if constexpr (kKeep == Keep::kAll) {
      T* const logits = reinterpret_cast<T*>(kept());
      for (int32_t i = threadIdx.x; i < num_tokens(); i += Threads)
        logits[i] = from_float<T>(to_float(logits[i]) == kInfinity ? Source::kInfinite : Source::kNothing);
    } else {
      if (threadIdx.x == 0) infinite = true;
    }
  }

  // f(logits, id of the first) for the vectors of this warp's tokens, once each.
  template <class F>
  __device__ __forceinline__ void for_each_own_vector(const F& f) const {
    const Slice slice = *this;
    const int32_t end = slice.warp_end(), first_id = -slice.lead();
#pragma unroll 2
    for (int32_t v = slice.warp_begin() + int32_t(threadIdx.x % 32); v < end; v += 32) {
      float x[kLogits];
      slice.read(v, threadIdx.x / 32, x);
      f(x, v * kLogits + first_id);
    }
  }

  // f(logits, id of the first) for the vectors of this warp, -inf where a lane has none.
  template <bool kChecked = false, class F>
  __device__ __forceinline__ void for_each_vector(const F& f) const {
    constexpr int kAtOnce = 8 / kLogits;
    const Slice slice = *this;  // one read of what is in shared memory
    const int32_t first_id = -slice.lead(), lane = int32_t(threadIdx.x % 32);
    if constexpr (kKeep == Keep::kPart) {
      const Range range = slice.range_of(threadIdx.x / 32);
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const bool is_kept = part == 0;
        const uint4* const from =
            is_kept ? slice.kept_of(threadIdx.x / 32) : slice.vectors() + range.first_streamed();
        const int32_t num = is_kept ? range.kept : range.streamed, last = is_kept ? range.kept - 1 : -1;
        const int32_t begin = is_kept ? range.begin : range.first_streamed();
        for (int32_t base = 0; base < num; base += 32 * kAtOnce) {
          if (kChecked && !is_kept) slice.prefetch_streamed(range, base + kAhead, 32 * kAtOnce);
          float x[kAtOnce][kLogits];
          int32_t id[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int32_t nth = base + 32 * i + lane;
            // Later passes go backwards: what was read last is the likeliest to be in the second-level cache.
            const int32_t at = kChecked ? nth : num - 1 - nth;
            id[i] = (begin + at + (at == last ? range.streamed : 0)) * kLogits + first_id;
#pragma unroll
            for (float& logit : x[i]) logit = Source::kNothing;
            if (nth < num) unpack_16<T>(x[i], from[at]);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            slice.template interpret<kChecked>(x[i]);
            f(x[i], id[i]);
          }
        }
      }
    } else {
      const int32_t end = slice.warp_end();
      for (int32_t base = slice.warp_begin() + lane; base - lane < end; base += 32 * kAtOnce) {
        float x[kAtOnce][kLogits];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (float& logit : x[i]) logit = -kInfinity;
          if (base + 32 * i < end) slice.template read<kChecked>(base + 32 * i, threadIdx.x / 32, x[i]);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) f(x[i], (base + 32 * i) * kLogits + first_id);
      }
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
    static_assert(!Source::kSubtracts);
    if constexpr (kKeep == Keep::kAll)
      return Source::canonical(to_float(reinterpret_cast<const T*>(kept())[i]));
    const float x = Source::canonical(to_float(row[id]));
    return infinite ? limit_of(x) : x;
  }
};

}  // namespace fi::cuda
