// Writing a block's part of a row of outputs.
#pragma once

#include "fi/cuda/sampling_row.h"

namespace fi::cuda {

// output[id] = value_of(x, id) for this block's tokens, in packs where their addresses allow it.
template <class Row, class Out, class ValueOf>
__device__ void write_row(const Row& slice, Out* output, const ValueOf& value_of) {
  constexpr int kLogits = Row::kLogits, kPacks = int(kLogits * sizeof(Out) / 16), kEach = kLogits / kPacks;
  static_assert(kPacks * kEach == kLogits);
  const bool packs = reinterpret_cast<uintptr_t>(output - slice.lead()) % 16 == 0;
  const int32_t n = slice.n;
  slice.for_each_own_vector([&](const auto& x, int32_t id) {
    float values[kLogits];
#pragma unroll
    for (int j = 0; j < kLogits; ++j) values[j] = value_of(x[j], id + j);
    if (packs && id >= 0 && id + kLogits <= n) {
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        float pack[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) pack[j] = values[i * kEach + j];
        store_pack(output + id + i * kEach, pack);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kLogits; ++j)
        if (id + j >= 0 && id + j < n) output[id + j] = from_float<Out>(values[j]);
    }
  });
}

}  // namespace fi::cuda
