// Bias, penalties and allowed-token masks: one pass over memory; a thread takes one pack of a row's logits
// and what each table has for them.
#include "fi/logits_processors.h"

#include <math.h>

#include "fi/cuda/rowops.h"

namespace fi::cuda {
namespace {

// N elements of a table, in as few instructions as there are packs of 16 bytes, or of N where N are fewer.
template <int N, class E>
FI_DEVICE_INLINE void load_table(E (&to)[N], const E* from) {
  constexpr int kBytes = N * int(sizeof(E));
  if constexpr (N == 1) {
    to[0] = *from;
  } else {
    union {
      E elements[N];
      uint4 packs[(kBytes + 15) / 16];
      uint2 eight;
      uint32_t four;
    } v;
    if constexpr (kBytes == 4) {
      v.four = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kBytes == 8) {
      v.eight = *reinterpret_cast<const uint2*>(from);
    } else {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i)
        v.packs[i] = load_16(reinterpret_cast<const char*>(from) + 16 * i);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = v.elements[i];
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kMaxThreads) process(const __grid_constant__ LogitsProcessorsParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (i >= p.vocab_size) return;
  for (int64_t row = blockIdx.y; row < p.batch; row += gridDim.y) {
    float x[N];
    load_pack(x, static_cast<const T*>(p.logits) + row * p.logits_stride + i);
    int32_t counts[N] = {};
    uint8_t prompt[N] = {};
    if (p.output_counts != nullptr) load_table(counts, p.output_counts + row * p.counts_stride + i);
    if (p.prompt_mask != nullptr)
      load_table(prompt, reinterpret_cast<const uint8_t*>(p.prompt_mask) + row * p.prompt_stride + i);
    if (p.logit_bias != nullptr) {
      float bias[N];
      load_table(bias, p.logit_bias + row * p.bias_stride + i);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] += bias[j];
    }
    const float repetition = float(p.repetition_penalty.at(row)),
                presence = float(p.presence_penalty.at(row)), frequency = float(p.frequency_penalty.at(row));
#pragma unroll
    for (int j = 0; j < N; ++j) {
      // Most tokens have not been seen: nothing is to be divided for them.
      if (repetition != 1.0f && (counts[j] > 0 || prompt[j] != 0))
        x[j] = x[j] > 0.0f ? x[j] / repetition : x[j] * repetition;
      if (p.output_counts != nullptr) {
        x[j] -= frequency * float(counts[j]);
        x[j] -= counts[j] > 0 ? presence : 0.0f;
      }
    }
    if (p.bitmask != nullptr) {  // N divides 32 and i is a multiple of it: all bits are in one word
      const uint32_t bits = p.bitmask[row * p.bitmask_stride + i / 32] >> (i % 32);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = bits >> j & 1 ? x[j] : -INFINITY;
    }
    store_pack(static_cast<T*>(p.output) + row * p.vocab_size + i, x);
  }
}

// Whether a table that is read N elements at a time starts each row where that is allowed.
bool table_fits(const void* table, int64_t stride, int64_t element_size, int64_t n) {
  const int64_t bytes = n * element_size < 16 ? n * element_size : 16;
  return reinterpret_cast<uintptr_t>(table) % uintptr_t(bytes) == 0 && stride * element_size % bytes == 0;
}

}  // namespace

void apply_logits_processors(const LogitsProcessorsParams& p, const Gpu& gpu) {
  const int64_t pack = 16 / size_of(p.dtype);
  const bool fit =
      packs_fit(p.logits, p.dtype, {p.logits_stride}) && packs_fit(p.output, p.dtype, {p.vocab_size}) &&
      table_fits(p.output_counts, p.counts_stride, 4, pack) &&
      table_fits(p.prompt_mask, p.prompt_stride, 1, pack) && table_fits(p.logit_bias, p.bias_stride, 4, pack);
  dispatch_pack(p.dtype, fit, [&](auto t, auto size) {
    using T = decltype(t);
    constexpr int N = decltype(size)::value;
    const dim3 grid(static_cast<unsigned>(ceil_div(ceil_div(p.vocab_size, N), kMaxThreads)),
                    static_cast<unsigned>(smaller(p.batch, kMaxGridY)));
    launch(gpu, process<T, N>, grid, dim3(kMaxThreads), 0, /*overlap=*/true, p);
  });
}

}  // namespace fi::cuda
