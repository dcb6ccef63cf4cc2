// A walk over the stages of a ring in shared memory.
#pragma once

#include "fi/cuda/ptx.h"

namespace fi::cuda::sm90 {

// Where a thread is in a ring of stages: the stage, and how often the ring was walked, modulo 2. A consumer
// waits for `parity` of the stage's full barrier, a producer for `parity ^ 1` of its empty barrier (which a
// fresh barrier passes at once).
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  FI_DEVICE_INLINE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace fi::cuda::sm90
