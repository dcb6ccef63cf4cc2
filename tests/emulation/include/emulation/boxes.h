// The copy engine: boxes of a tensor into shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace fi::emulation {

// Poisons the box's place in the shared memory of block `rank` of the cluster at once; later the box arrives
// there, zeros where it lies outside of the tensor, and the barrier counts all of its bytes. `smem` and
// `barrier` are the caller's own.
void load_box(void* smem, const CUtensorMap& map, const int (&at)[4], uint64_t& barrier, unsigned rank);

}  // namespace fi::emulation
