// mbarriers in the emulator: see emulation/mbarrier.h.
#include "emulation/mbarrier.h"

#include "emulation/block.h"

namespace fi::emulation {
namespace {

// The word: the phase, its bytes (biased), arrivals pending and expected. Memory that nobody has written, all
// ones, is no barrier: so many arrivals can't be asked for.
constexpr int kCountBits = 20, kByteBits = 22;
constexpr uint64_t kMostCount = (1u << kCountBits) - 1;
constexpr int64_t kBias = int64_t{1} << (kByteBits - 1), kMostBytes = (1 << 20) - 1;

void settle(uint64_t& word, MbarrierState state) {
  if (state.bytes > kMostBytes || state.bytes < -kMostBytes)
    fail("mbarrier: " + std::to_string(state.bytes) + " bytes are more than it can count");
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.expected;
  }
  word = mbarrier_word(state);
}

}  // namespace

uint64_t mbarrier_word(const MbarrierState& state) {
  return uint64_t{state.phase} << 63 | uint64_t(state.bytes + kBias) << (2 * kCountBits) |
         uint64_t{state.pending} << kCountBits | state.expected;
}

MbarrierState mbarrier_state(uint64_t word) {
  const MbarrierState state{uint32_t(word & kMostCount), uint32_t(word >> kCountBits & kMostCount),
                            int32_t(int64_t(word >> (2 * kCountBits) & ((1 << kByteBits) - 1)) - kBias),
                            uint32_t(word >> 63)};
  if (state.expected == 0 || state.expected == kMostCount || state.pending > state.expected)
    fail("mbarrier: there is none, or it was overwritten");
  return state;
}

std::string describe_mbarrier(uint64_t word) {
  const MbarrierState state = mbarrier_state(word);
  return "phase " + std::to_string(state.phase) + " lacks " + std::to_string(state.pending) + " of " +
         std::to_string(state.expected) + " arrivals and " + std::to_string(state.bytes) + " bytes";
}

void mbarrier_init(uint64_t& word, uint32_t arrivals) {
  if (reinterpret_cast<uintptr_t>(&word) % 8 != 0) fail("mbarrier: an address is not aligned");
  if (arrivals == 0 || arrivals >= kMostCount) fail("mbarrier: initialised for a wrong number of arrivals");
  word = mbarrier_word({arrivals, arrivals, 0, 0});
}

void mbarrier_arrive(uint64_t& word, uint32_t bytes) {
  MbarrierState state = mbarrier_state(word);
  if (state.pending == 0) fail("mbarrier: more arrivals than a phase has");
  --state.pending;
  state.bytes += int32_t(bytes);
  settle(word, state);
}

void mbarrier_complete(uint64_t& word, uint32_t bytes) {
  MbarrierState state = mbarrier_state(word);
  state.bytes -= int32_t(bytes);
  settle(word, state);
}

bool mbarrier_is_over(uint64_t word, uint32_t parity) { return mbarrier_state(word).phase != parity; }

}  // namespace fi::emulation
