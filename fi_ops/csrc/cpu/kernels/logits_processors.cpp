// Bias, penalties and allowed-token masks: one pass over the logits, in tasks of a piece of a row.
#include "fi/logits_processors.h"

#include "fi/cpu/rowops.h"

namespace fi::FI_ISA {
namespace {

typedef uint8_t VecB __attribute__((vector_size(kLanes)));

FI_INLINE VecI load_ints(const int32_t* p, int64_t n) {
  return as_int(load_n(reinterpret_cast<const float*>(p), n));
}

FI_INLINE VecI load_bools(const bool* p, int64_t n) {
  VecB x{};
  __builtin_memcpy(&x, p, size_t(n));
  return __builtin_convertvector(x, VecI) != 0;
}

// Token i's bit and those of the lanes behind it: all in one word.
FI_INLINE VecI load_bits_of(const uint32_t* words, int64_t i) {
  static_assert(32 % kLanes == 0);
  const VecI bits = VecI{} + int32_t(words[i / 32] >> (i % 32));
  return (bits & (VecI{} + 1) << iota_i()) != 0;
}

template <class T>
void process(const LogitsProcessorsParams& p, int64_t row, int64_t begin, int64_t end) {
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
  T* output = static_cast<T*>(p.output) + row * p.vocab_size;
  const int32_t* counts = p.output_counts == nullptr ? nullptr : p.output_counts + row * p.counts_stride;
  const bool* prompt = p.prompt_mask == nullptr ? nullptr : p.prompt_mask + row * p.prompt_stride;
  const float* bias = p.logit_bias == nullptr ? nullptr : p.logit_bias + row * p.bias_stride;
  const uint32_t* bits = p.bitmask == nullptr ? nullptr : p.bitmask + row * p.bitmask_stride;
  const float repetition = float(p.repetition_penalty.at(row)), presence = float(p.presence_penalty.at(row)),
              frequency = float(p.frequency_penalty.at(row));
  const bool repeats = repetition != 1.0f;
  for_each_vec(end - begin, [&](int64_t at, int64_t count) {
    const int64_t i = begin + at;
    Vec x = load_n(logits + i, count);
    if (bias != nullptr) x += load_n(bias + i, count);
    VecI seen{}, generated{};
    Vec times = zero();
    if (counts != nullptr) {
      const VecI c = load_ints(counts + i, count);
      generated = seen = c > 0;
      times = to_vec(c);
    }
    if (prompt != nullptr) seen |= load_bools(prompt + i, count);
    // Most tokens have not been seen: a division only where one of a vector has.
    if (repeats && any(seen)) x = select(seen, select(x > 0.0f, x / repetition, x * repetition), x);
    if (counts != nullptr) {
      x -= frequency * times;
      x -= select(generated, set1(presence), zero());
    }
    if (bits != nullptr) x = select(load_bits_of(bits, i), x, set1(-kInf));
    store_n(output + i, x, count);
  });
}

}  // namespace

void apply_logits_processors(const LogitsProcessorsParams& p, const Parallel& parallel) {
  const int64_t pieces = (p.vocab_size + kTaskElements - 1) / kTaskElements;
  dispatch_float(p.dtype, [&](auto t) {
    using T = decltype(t);
    for_each_task(serial_if_small(parallel, p.batch * p.vocab_size), p.batch * pieces, [&](int64_t task) {
      const int64_t begin = task % pieces * kTaskElements, end = begin + kTaskElements;
      process<T>(p, task / pieces, begin, end < p.vocab_size ? end : p.vocab_size);
    });
  });
}

}  // namespace fi::FI_ISA
