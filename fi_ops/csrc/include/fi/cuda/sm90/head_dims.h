// The head dims that Hopper's kernels are compiled for.
//
// Others are padded: the copy engine brings zeros in place of columns that a row hasn't got, and the output's
// are not stored. 96 is one and a half panels of 64 columns. Its second panel is padded like any other: half
// of it takes room in shared memory, but no product reads it.
#pragma once

#include "fi/cuda/sm80/padded_dims.h"

namespace fi::cuda::sm90 {

// Calls f.operator()<qk, vo>() with the smallest ones, for dims that can_pad.
template <class F>
void with_head_dims(int64_t qk, int64_t vo, const F& f) {
  if (qk <= 64 && vo <= 64) return f.template operator()<64, 64>();
  if (qk <= 96 && vo <= 96) return f.template operator()<96, 96>();
  if (qk <= 128 && vo <= 128) return f.template operator()<128, 128>();
  if (qk <= 192 && vo <= 128) return f.template operator()<192, 128>();
  f.template operator()<256, 256>();
}

}  // namespace fi::cuda::sm90
