// What a row has accumulated over some keys, set aside and joined: [head_dim_vo padded to kLanes], then the
// maximum and the sum.
#pragma once

#include "fi/cpu/attention_tasks.h"
#include "fi/cpu/online_softmax.h"

namespace fi::FI_ISA {

// States up to this many floats are merged by the calling thread: a second wake-up of all threads costs more.
inline constexpr int64_t kMergeAlone = 131072;

FI_INLINE void save_row(float* state, const float* acc, float row_max, float row_sum, int64_t head_dim_vo) {
  const int64_t width = round_up(head_dim_vo, kLanes);
  __builtin_memcpy(state, acc, width * sizeof(float));
  state[width] = row_max;
  state[width + 1] = row_sum;
}

// state joins `other`, of later keys.
FI_INLINE void join_row(float* state, const float* other, int64_t head_dim_vo) {
  const int64_t width = round_up(head_dim_vo, kLanes);
  const float top = state[width] > other[width] ? state[width] : other[width];
  const float keep = exp2(set1(state[width] - usable_max(top)))[0];
  const float add = exp2(set1(other[width] - usable_max(top)))[0];
  for (int64_t d = 0; d < width; d += kLanes)
    store(state + d, load(state + d) * keep + load(other + d) * add);
  state[width + 1] = state[width + 1] * keep + other[width + 1] * add;
  state[width] = top;
}

}  // namespace fi::FI_ISA
