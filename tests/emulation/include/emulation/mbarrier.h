// mbarriers: 64 bits in shared memory that count arrivals and the bytes of asynchronous copies.
#pragma once

#include <cstdint>
#include <string>

namespace fi::emulation {

// The word of a barrier in parts. A phase is over when nothing is pending and no bytes are awaited; bytes may
// arrive before they are expected.
struct MbarrierState {
  uint32_t expected, pending;  // arrivals of a phase, and those still to come
  int32_t bytes;
  uint32_t phase;  // modulo 2
};

inline constexpr uint64_t kMbarrierPhase = uint64_t{1}
                                           << 63;  // of the word: waiting threads look at it alone

uint64_t mbarrier_word(const MbarrierState& state);
// Fails where the word is that of no barrier.
MbarrierState mbarrier_state(uint64_t word);
std::string describe_mbarrier(uint64_t word);

void mbarrier_init(uint64_t& word, uint32_t arrivals);
// Arrives, and expects so many bytes more in this phase.
void mbarrier_arrive(uint64_t& word, uint32_t bytes = 0);
// So many bytes are there.
void mbarrier_complete(uint64_t& word, uint32_t bytes);
bool mbarrier_is_over(uint64_t word, uint32_t parity);

}  // namespace fi::emulation
