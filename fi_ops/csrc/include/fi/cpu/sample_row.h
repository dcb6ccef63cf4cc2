// Passes over one row of logits or probabilities: what samplers and filters share is how a row is cut up,
// weighed and put in buckets.
//
// A row is cut into blocks of 128 tokens (whose maxima are kept: most later passes can skip most blocks),
// chunks of 1024 (whose kept weight is summed: the draw looks into one) and parts of 32768 (a task each).
// Weights are integers (fi/cpu/row_source.h), so sums are exact: they depend neither on how the row is cut
// nor on which thread adds first.
#pragma once

#include "fi/cpu/parallel.h"
#include "fi/cpu/prefix_select.h"
#include "fi/cpu/row_source.h"

namespace fi::FI_ISA {

inline constexpr int64_t kBlock = 128, kChunk = 1024, kPart = 32768;
inline constexpr int kBuckets = 2048;
inline constexpr float kMaxFinite = 3.402823466e+38f;
inline constexpr int64_t kCrowded = 8192;  // candidates worth another pass over the row to avoid

FI_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scratch of one row: one allocation, touched only where a pass writes. To be released by whoever made it.
struct RowScratch {
  float* block_max;       // [blocks]
  int64_t* chunk_sums;    // [chunks], weight that is kept
  int64_t* bins;          // [2^kRadixBits]
  int64_t* masses;        // [histograms, kBuckets], weight in a bucket
  int32_t* counts;        // [histograms, kBuckets], tokens in a bucket
  float* part_min;        // [parts]
  int32_t* part_bad;      // [parts]
  int64_t* part_sizes;    // [parts], candidates found in a part
  Candidates candidates;  // capacity: the row; a part writes at its own offset, then they are moved together
  void* memory;

  RowScratch(int64_t n, int64_t histograms) {
    const int64_t blocks = ceil_div(n, kBlock), chunks = ceil_div(n, kChunk), parts = ceil_div(n, kPart);
    int64_t bytes = 0;
    auto reserve = [&](int64_t size) {
      const int64_t at = bytes;
      bytes += (size + 63) & ~int64_t{63};
      return at;
    };
    const int64_t offsets[] = {reserve(4 * blocks),
                               reserve(8 * chunks),
                               reserve(8 << kRadixBits),
                               reserve(8 * histograms * kBuckets),
                               reserve(4 * histograms * kBuckets),
                               reserve(4 * parts),
                               reserve(4 * parts),
                               reserve(8 * parts),
                               reserve(4 * n),
                               reserve(4 * n),
                               reserve(8 * n)};
    memory = __builtin_malloc(size_t(bytes + 64));
    char* base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
    block_max = reinterpret_cast<float*>(base + offsets[0]);
    chunk_sums = reinterpret_cast<int64_t*>(base + offsets[1]);
    bins = reinterpret_cast<int64_t*>(base + offsets[2]);
    masses = reinterpret_cast<int64_t*>(base + offsets[3]);
    counts = reinterpret_cast<int32_t*>(base + offsets[4]);
    part_min = reinterpret_cast<float*>(base + offsets[5]);
    part_bad = reinterpret_cast<int32_t*>(base + offsets[6]);
    part_sizes = reinterpret_cast<int64_t*>(base + offsets[7]);
    candidates.keys = reinterpret_cast<uint32_t*>(base + offsets[8]);
    candidates.ids = reinterpret_cast<int32_t*>(base + offsets[9]);
    candidates.weights = reinterpret_cast<int64_t*>(base + offsets[10]);
    candidates.size = 0;
  }
  // Not a destructor: unwinding code would bring in weak symbols, and nothing here throws.
  void release() { __builtin_free(memory); }
};

template <class Source>
struct WeightRow {
  using Coordinate = typename Source::Coordinate;

  Source source;
  int64_t n;
  const Parallel& parallel;  // the threads that may share this row
  RowScratch& scratch;

  // Found by scan().
  float max = -kInf, min = kInf;  // of the finite values that may weigh something
  bool invalid = false;           // some value can't be

  // Set by set_buckets().
  Coordinate bucket_top = 0;
  float bucket_scale = 0;

  int64_t num_blocks() const { return ceil_div(n, kBlock); }
  int64_t num_chunks() const { return ceil_div(n, kChunk); }
  int64_t num_parts() const { return ceil_div(n, kPart); }
  // With a thread to itself a row needs one histogram, else one for each part.
  static int64_t num_histograms(int64_t n, const Parallel& p) {
    return p.num_threads > 1 ? ceil_div(n, kPart) : 1;
  }

  // ---- values ----

  // f(i, raw, count) for each vector of [begin, end); in the last one lanes from `count` on are nothing.
  template <class F>
  [[gnu::always_inline]] void for_each_raw(int64_t begin, int64_t end, const F& f) const {
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) f(i, source.load(i), int64_t{kLanes});
    if (i < end) {
      const Vec x = source.load_partial(i, end - i);
      f(i, select(iota_i() < int32_t(end - i), x, set1(Source::kNothing)), end - i);
    }
  }

  // f(i, x, count) likewise, x canonical.
  template <class F>
  [[gnu::always_inline]] void for_each_vec(int64_t begin, int64_t end, const F& f) const {
    for_each_raw(begin, end, [&](int64_t i, Vec raw, int64_t count) { f(i, source.canonical(raw), count); });
  }

  // f(block, begin, end) for the blocks of a part.
  template <class F>
  [[gnu::always_inline]] void for_each_block(int64_t part, const F& f) const {
    const int64_t end = (part + 1) * kPart < n ? (part + 1) * kPart : n;
    for (int64_t begin = part * kPart; begin < end; begin += kBlock) {
      f(begin / kBlock, begin, begin + kBlock < end ? begin + kBlock : end);
    }
  }

  // f(part) for all parts, on several threads where the work is worth it.
  template <class F>
  [[gnu::always_inline]] void for_each_part(bool worth, const F& f) const {
    const Parallel alone{nullptr, 1};
    for_each_task(worth ? parallel : alone, num_parts(), f);
  }

  // The first pass: maxima of all blocks, minimum, what can't be. At the size of today's vocabularies one
  // thread is done (10 us) before a second has woken up.
  void scan() {
    for_each_part(n >= 8 * kPart, [&](int64_t part) {
      VecI bad{};
      Vec low = set1(kInf);
      for_each_block(part, [&](int64_t block, int64_t begin, int64_t end) {
        Vec high = set1(-kInf);
        for_each_raw(begin, end, [&](int64_t, Vec raw, int64_t) {
          bad |= source.invalid(raw);
          const Vec x = source.canonical(raw);
          high = fi::FI_ISA::max(high, x);
          low = fi::FI_ISA::min(low, select(x > -kInf, x, set1(kInf)));
        });
        scratch.block_max[block] = reduce_max(high);
      });
      scratch.part_min[part] = reduce_min(low);
      scratch.part_bad[part] = any(bad);
    });
    for (int64_t part = 0; part < num_parts(); ++part) {
      invalid |= scratch.part_bad[part] != 0;
      min = scratch.part_min[part] < min ? scratch.part_min[part] : min;
    }
    max = max_block(num_blocks());
    if (max == kInf && !invalid) has_infinite();
    source.max = max;
  }

  // What a row of the same values in the same scratch, none of them +inf, has found.
  template <class Other>
  void adopt(const WeightRow<Other>& other) {
    max = source.max = other.max;
    min = other.min;
    invalid = other.invalid;
  }

  void has_infinite() {
    if (!Source::kHasWeights) {
      max = kMaxFinite;
      min = min < kInf ? min : kMaxFinite;
      return;
    }
    source.infinite = true;
    max = min = Source::kInfinite;
    for (int64_t block = 0; block < num_blocks(); ++block) {
      scratch.block_max[block] = scratch.block_max[block] == kInf ? Source::kInfinite : -kInf;
    }
  }

  float max_block(int64_t blocks) const {
    Vec high = set1(-kInf);
    int64_t block = 0;
    for (; block + kLanes <= blocks; block += kLanes)
      high = fi::FI_ISA::max(high, load(scratch.block_max + block));
    float result = reduce_max(high);
    for (; block < blocks; ++block)
      result = scratch.block_max[block] > result ? scratch.block_max[block] : result;
    return result;
  }

  // The lowest id whose value is the maximum.
  int64_t argmax() const {
    const float highest = max_block(num_blocks());
    for (int64_t block = 0; block < num_blocks(); ++block) {
      if (scratch.block_max[block] < highest) continue;
      int64_t found = -1;
      for_each_vec(block * kBlock, (block + 1) * kBlock < n ? (block + 1) * kBlock : n,
                   [&](int64_t i, Vec x, int64_t) {
                     const uint32_t equal = mask_bits(x >= highest);
                     if (equal != 0 && found < 0) found = i + __builtin_ctz(equal);
                   });
      return found;
    }
    return 0;
  }

  // ---- weights ----

  void set_weights(float temperature) { source.set_weights(n, temperature); }

  [[gnu::always_inline]] Vec weigh(Vec x) const { return source.weigh(x); }

  // Beyond this distance from the maximum weights are 0 in fixed point.
  double weightless() const {
    if (!Source::kHasWeights) return 0;
    return (__builtin_log2(double(source.fixed_scale)) + 1) / double(source.exponent_scale);
  }

  // ---- buckets: kBuckets even steps on the source's axis from `top` down to `low`; the first and the last
  // also take all beyond ----

  void set_buckets(Coordinate top, Coordinate low) {
    double range = double(top) - double(low);
    if (Source::kHasWeights && !(range < weightless())) range = weightless();
    const double scale = kBuckets / range;  // range 0: all logits are in bucket 0 whatever the scale
    bucket_top = top;
    bucket_scale = float(scale > 0x1p127 ? 0x1p127 : scale < 0x1p-126 ? 0x1p-126 : scale);
  }

  void set_buckets_of_row() { set_buckets(Source::coordinate(max), Source::coordinate(min)); }

  // New buckets for what is now bucket b (a little more: edges are rounded). False where it is too narrow for
  // that.
  bool zoom_into(int32_t b) {
    const double width = 1.0 / double(bucket_scale);
    const auto high = b == 0 ? Source::coordinate(max) : Coordinate(double(bucket_top) - (b - 0.01) * width);
    const auto low =
        b == kBuckets - 1 ? Source::coordinate(min) : Coordinate(double(bucket_top) - (b + 1.01) * width);
    if (max == min || !(low < high) || (b > 0 && b < kBuckets - 1 && double(high) - double(low) > 2 * width))
      return false;
    set_buckets(high, low);
    return true;
  }

  [[gnu::always_inline]] VecI bucket(Vec x) const {
    const Vec scaled = fi::FI_ISA::max(Source::distance(bucket_top, x) * bucket_scale, zero());
    return __builtin_convertvector(fi::FI_ISA::min(scaled, set1(float(kBuckets - 1))), VecI);
  }

  // The bucket of a block's largest value: none of its values is in an earlier one.
  [[gnu::always_inline]] int32_t first_bucket(int64_t block) const {
    const float scaled = Source::distance(bucket_top, scratch.block_max[block]) * bucket_scale;
    return int32_t(!(scaled > 0.0f) ? 0.0f : scaled < float(kBuckets - 1) ? scaled : float(kBuckets - 1));
  }

  // About how many tokens weigh `mass` together in bucket b.
  double crowd(int32_t b, int64_t mass) const {
    const double top = double(Source::coordinate(max)) - double(bucket_top);
    const double octaves = (top + (b + 0.5) / double(bucket_scale)) * double(source.exponent_scale);
    const double weight = double(source.fixed_scale) * __builtin_exp2(-octaves);
    return double(mass) / (weight > 1.0 ? weight : 1.0);
  }

  // How many octaves, about, a value's weight is below that of the maximum.
  float octaves_below(float x) const {
    return Source::distance(Source::coordinate(max), x) * source.exponent_scale;
  }

  int64_t blocks_up_to(int32_t last_bucket) const {
    int64_t blocks = 0;
    for (int64_t block = 0; block < num_blocks(); ++block) blocks += first_bucket(block) <= last_bucket;
    return blocks;
  }

  // Fills masses[0][b] (and counts[0][b]) with the weight (and number) of the tokens in bucket b.
  template <bool Counts>
  void fill_histogram() {
    const bool shared = num_histograms(n, parallel) == 1;
    if (shared) clear_histogram<Counts>(0);
    for_each_part(true, [&](int64_t part) {
      const int64_t histogram = shared ? 0 : part;
      if (!shared) clear_histogram<Counts>(histogram);
      int64_t* masses = scratch.masses + histogram * kBuckets;
      int32_t* counts = scratch.counts + histogram * kBuckets;
      alignas(64) int32_t at[kBlock];
      alignas(64) int64_t weights[kBlock];
      for_each_block(part, [&](int64_t block, int64_t begin, int64_t end) {
        if (!Counts && octaves_below(scratch.block_max[block]) > 64.0f) return;  // weighs nothing
        for_each_vec(begin, end, [&](int64_t i, Vec x, int64_t) {
          const Vec w = weigh(x);
          VecI b = bucket(x);
          // Tokens without weight go anywhere: additions to one bucket would wait for each other.
          if (!Counts) b = select(w < 1.0f, (iota_i() + int32_t(i)) & (kBuckets - 1), b);
          __builtin_memcpy(at + (i - begin), &b, sizeof(b));
          store_fixed(weights + (i - begin), w);
        });
        for (int64_t i = 0; i < end - begin; ++i) {
          masses[at[i]] += weights[i];
          if (Counts) counts[at[i]] += 1;
        }
      });
    });
    if (shared) return;
    for (int64_t part = 1; part < num_parts(); ++part) {
      for (int b = 0; b < kBuckets; ++b) scratch.masses[b] += scratch.masses[part * kBuckets + b];
      if (!Counts) continue;
      for (int b = 0; b < kBuckets; ++b) scratch.counts[b] += scratch.counts[part * kBuckets + b];
    }
  }

  template <bool Counts>
  void clear_histogram(int64_t histogram) {
    __builtin_memset(scratch.masses + histogram * kBuckets, 0, sizeof(int64_t) * kBuckets);
    if (Counts) __builtin_memset(scratch.counts + histogram * kBuckets, 0, sizeof(int32_t) * kBuckets);
  }

  // ---- passes behind the search ----

  // Makes the tokens of buckets [first, last] (without -inf) the candidates, and chunk_sums the weight before
  // `first`.
  void collect(int32_t first, int32_t last) {
    Candidates& c = scratch.candidates;
    for_each_part(blocks_up_to(last) * kBlock > kPart, [&](int64_t part) {
      int64_t size = part * kPart;
      alignas(64) int64_t weights[kLanes];
      alignas(64) float values[kLanes];
      FixedSum sum;
      for_each_block(part, [&](int64_t block, int64_t begin, int64_t end) {
        if (first_bucket(block) <= last) {
          for_each_vec(begin, end, [&](int64_t i, Vec x, int64_t) {
            const VecI b = bucket(x);
            const VecI near = (b <= last) & (x > -kInf);
            if (!any(near)) return;
            const Vec w = weigh(x);
            sum.add(select(b < first, w, zero()));
            uint32_t found = mask_bits(near & (b >= first));
            if (found == 0) return;
            store_fixed(weights, w);
            store(values, x);
            for (; found != 0; found &= found - 1) {
              const int lane = __builtin_ctz(found);
              c.keys[size] = order_key(values[lane]);
              c.ids[size] = int32_t(i + lane);
              c.weights[size++] = weights[lane];
            }
          });
        }
        if (end % kChunk == 0 || end == n) {
          scratch.chunk_sums[begin / kChunk] = sum.total();
          sum = FixedSum{};
        }
      });
      scratch.part_sizes[part] = size - part * kPart;
    });
    join_parts();
  }

  // Makes the tokens that the cut keeps the candidates (without weights).
  void collect_kept(Cut cut) {
    Candidates& c = scratch.candidates;
    const float lowest = cut.lowest();
    for_each_part(true, [&](int64_t part) {
      int64_t size = part * kPart;
      alignas(64) float values[kLanes];
      for_each_block(part, [&](int64_t block, int64_t begin, int64_t end) {
        if (!(scratch.block_max[block] >= lowest)) return;
        for_each_vec(begin, end, [&](int64_t i, Vec x, int64_t) {
          uint32_t found = mask_bits(kept(x, i, lowest, cut.last_id) & (x > -kInf));
          if (found == 0) return;
          store(values, x);
          for (; found != 0; found &= found - 1) {
            const int lane = __builtin_ctz(found);
            c.keys[size] = order_key(values[lane]);
            c.ids[size++] = int32_t(i + lane);
          }
        });
      });
      scratch.part_sizes[part] = size - part * kPart;
    });
    join_parts();
  }

  // Moves the candidates that parts have found together.
  void join_parts() {
    Candidates& c = scratch.candidates;
    c.size = scratch.part_sizes[0];
    for (int64_t part = 1; part < num_parts(); ++part) {
      const int64_t from = part * kPart, size = scratch.part_sizes[part];
      if (from != c.size) {
        __builtin_memmove(c.keys + c.size, c.keys + from, sizeof(*c.keys) * size);
        __builtin_memmove(c.ids + c.size, c.ids + from, sizeof(*c.ids) * size);
        __builtin_memmove(c.weights + c.size, c.weights + from, sizeof(*c.weights) * size);
      }
      c.size += size;
    }
  }

  // The mask of the lanes that a cut keeps; x from id i on.
  [[gnu::always_inline]] VecI kept(Vec x, int64_t i, float lowest, int32_t last_id) const {
    return (x > lowest) | ((x == lowest) & (iota_i() + int32_t(i) <= last_id));
  }

  // Makes chunk_sums the weight that the cut keeps.
  void sum_kept(Cut cut) {
    const float lowest = cut.lowest();
    for_each_part(true, [&](int64_t part) {
      FixedSum sum;
      for_each_block(part, [&](int64_t block, int64_t begin, int64_t end) {
        if (scratch.block_max[block] >= lowest) {
          for_each_vec(begin, end, [&](int64_t i, Vec x, int64_t) {
            sum.add(select(kept(x, i, lowest, cut.last_id), weigh(x), zero()));
          });
        }
        if (end % kChunk == 0 || end == n) {
          scratch.chunk_sums[begin / kChunk] = sum.total();
          sum = FixedSum{};
        }
      });
    });
  }

  int64_t total_of_chunks() const {
    int64_t total = 0;
    for (int64_t chunk = 0; chunk < num_chunks(); ++chunk) total += scratch.chunk_sums[chunk];
    return total;
  }

  // The first kept id at which the cumulative weight exceeds uniform * total, from chunk_sums; the total is
  // positive.
  int64_t draw(Cut cut, float uniform) const {
    const float lowest = cut.lowest();
    int64_t left = draw_target(total_of_chunks(), uniform), chunk = 0;
    while (left >= scratch.chunk_sums[chunk]) left -= scratch.chunk_sums[chunk++];
    int64_t found = 0;
    bool done = false;
    alignas(64) int64_t weights[kLanes];
    const int64_t end = (chunk + 1) * kChunk < n ? (chunk + 1) * kChunk : n;
    for_each_vec(chunk * kChunk, end, [&](int64_t i, Vec x, int64_t) {
      if (done) return;
      store_fixed(weights, select(kept(x, i, lowest, cut.last_id), weigh(x), zero()));
      for (int lane = 0; lane < kLanes && !done; ++lane) {
        left -= weights[lane];
        if (left < 0) {
          found = i + lane;
          done = true;
        }
      }
    });
    return found;
  }
};

}  // namespace fi::FI_ISA
