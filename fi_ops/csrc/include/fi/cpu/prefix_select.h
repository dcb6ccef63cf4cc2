// Where a prefix of a set of tokens ends, without sorting it.
//
// Top-k and top-p each keep the smallest prefix (in the order of fi/sampling_math.h) whose count or weight
// reaches a target; `select_prefix` finds its last token by radix search on the bits of the logits: at most
// four passes over the candidates, whatever their values.
#pragma once

#include "fi/cpu/simd.h"
#include "fi/sampling_math.h"

namespace fi::FI_ISA {

// Tokens under consideration, ids ascending.
struct Candidates {
  uint32_t* keys;    // [size], order_key of the logit
  int32_t* ids;      // [size]
  int64_t* weights;  // [size], fixed point
  int64_t size;
};

// The last token of a prefix: everything before `key`, and of the tokens at `key` those up to `last_id`.
struct Cut {
  uint32_t key = 0xffffffffu;
  int32_t last_id = 0x7fffffff;

  // The value at `key`; where all are kept, below all.
  [[gnu::always_inline]] float lowest() const {
    return key == 0xffffffffu ? -__builtin_inff() : key_logit(key);
  }
  [[gnu::always_inline]] bool keeps_all() const { return key == 0xffffffffu; }
  [[gnu::always_inline]] bool keeps(uint32_t k, int32_t id) const {
    return k < key || (k == key && id <= last_id);
  }
};

inline constexpr int kRadixBits = 11;

// The smallest prefix of `c` whose count (ByCount) or weight reaches `target` (>= 1), or all of it. With
// `split_ties` it may end inside a group of equal logits; else it takes the whole group. `bins`: scratch,
// 2^kRadixBits.
template <bool ByCount>
Cut select_prefix(const Candidates& c, int64_t target, bool split_ties, int64_t* bins) {
  Cut cut;
  if (c.size == 0) return cut;
  uint32_t first = 0xffffffffu, last = 0;
  int64_t total = 0;
  for (int64_t i = 0; i < c.size; ++i) {
    first = c.keys[i] < first ? c.keys[i] : first;
    last = c.keys[i] > last ? c.keys[i] : last;
    total += ByCount ? 1 : c.weights[i];
  }
  if (total < target) return cut;

  // Keys in [base, base + 2^bits) are still in question; those before weigh `before`.
  int bits = first == last ? 0 : 32 - __builtin_clz(first ^ last);
  uint32_t base = bits >= 32 ? 0u : last >> bits << bits;
  int64_t before = 0;
  const int digit_bits = c.size < 1024 ? 8 : kRadixBits;
  while (bits > 0) {
    const int shift = bits > digit_bits ? bits - digit_bits : 0;
    const uint32_t digits = 1u << (bits - shift);
    __builtin_memset(bins, 0, sizeof(int64_t) * digits);
    for (int64_t i = 0; i < c.size; ++i) {
      const uint32_t digit = (c.keys[i] - base) >> shift;  // keys before base wrap to large digits
      if (digit < digits) bins[digit] += ByCount ? 1 : c.weights[i];
    }
    uint32_t digit = 0;
    while (digit + 1 < digits && before + bins[digit] < target) before += bins[digit++];
    base += digit << shift;
    bits = shift;
  }
  cut.key = base;
  if (!split_ties) return cut;
  for (int64_t i = 0; i < c.size; ++i) {
    if (c.keys[i] != base) continue;
    before += ByCount ? 1 : c.weights[i];
    cut.last_id = c.ids[i];
    if (before >= target) break;
  }
  return cut;
}

// Drops what the cut doesn't keep, in place; returns the weight of the rest.
FI_INLINE int64_t keep_prefix(Candidates& c, Cut cut) {
  int64_t size = 0, weight = 0;
  for (int64_t i = 0; i < c.size; ++i) {
    const bool kept = cut.keeps(c.keys[i], c.ids[i]);
    c.keys[size] = c.keys[i];
    c.ids[size] = c.ids[i];
    c.weights[size] = c.weights[i];
    weight += kept ? c.weights[i] : 0;
    size += kept;
  }
  c.size = size;
  return weight;
}

}  // namespace fi::FI_ISA
