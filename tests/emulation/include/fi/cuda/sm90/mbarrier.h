// The emulated twin of fi/cuda/sm90/mbarrier.h.
#pragma once

#include "emulation/mbarrier.h"
#include "fi/cuda/ptx.h"

namespace fi::cuda::sm90 {

using Barrier = uint64_t;

inline void barrier_init(Barrier& barrier, uint32_t arrivals) { emulation::mbarrier_init(barrier, arrivals); }
inline void barrier_init_fence() {}

inline void barrier_arrive(Barrier& barrier) { emulation::mbarrier_arrive(barrier); }
inline void barrier_arrive_after_copies(Barrier& barrier) {
  auto& thread = emulation::current();
  if (!thread.committed.empty()) emulation::fail("barrier_arrive_after_copies: after cp_async_commit");
  ++thread.copies_under_way;
  emulation::later([&barrier, &thread, copies = std::move(thread.issued)] {
    for (const auto& copy : copies) deliver(copy);
    --thread.copies_under_way;
    emulation::mbarrier_arrive(barrier);
  });
  thread.issued.clear();
}
inline void barrier_arrive_expect(Barrier& barrier, uint32_t bytes) {
  emulation::mbarrier_arrive(barrier, bytes);
}

inline bool barrier_try_wait(Barrier& barrier, uint32_t parity) {
  return emulation::mbarrier_is_over(barrier, parity);
}
inline void barrier_wait(Barrier& barrier, uint32_t parity) {
  while (!barrier_try_wait(barrier, parity))
    emulation::wait_while(&barrier, emulation::kMbarrierPhase, barrier & emulation::kMbarrierPhase,
                          "the mbarrier");
}

}  // namespace fi::cuda::sm90
