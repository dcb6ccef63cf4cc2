// The copy engine in the emulator: see emulation/boxes.h.
#include "emulation/boxes.h"

#include <algorithm>
#include <cstring>

#include "emulation/block.h"
#include "emulation/mbarrier.h"

namespace fi::emulation {
namespace {

constexpr uint32_t kElementBytes = 2, kChunk = 16, kPoison = 0xff;

uint32_t box_bytes(const CUtensorMap& map) {
  return map.box[0] * map.box[1] * map.box[2] * map.box[3] * kElementBytes;
}

// The 128-byte swizzle: chunks of 16 bytes trade places within 1024 bytes.
unsigned char* swizzled(unsigned char* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  return reinterpret_cast<unsigned char*>(address ^ (address >> 7 & 7) << 4);
}

// A row of the box: of its first dimension, at `at` in all of them.
void copy_row(unsigned char* to, const CUtensorMap& map, const int64_t (&at)[4]) {
  bool inside = true;
  const unsigned char* from = map.base;
  for (int i = 1; i < 4; ++i) {
    inside = inside && at[i] >= 0 && at[i] < int64_t(map.extents[i]);
    from += at[i] * int64_t(map.strides[i]);
  }
  for (uint32_t done = 0; done < map.box[0] * kElementBytes; done += kChunk) {
    unsigned char chunk[kChunk] = {};
    for (uint32_t i = 0; inside && i < kChunk; i += kElementBytes) {
      const int64_t column = at[0] + (done + i) / kElementBytes;
      if (column >= 0 && column < int64_t(map.extents[0]))
        std::memcpy(chunk + i, from + column * kElementBytes, kElementBytes);
    }
    std::memcpy(swizzled(to + done), chunk, kChunk);
  }
}

void copy_box(unsigned char* to, const CUtensorMap& map, const int (&at)[4]) {
  for (uint32_t w = 0; w < map.box[3]; ++w)
    for (uint32_t z = 0; z < map.box[2]; ++z)
      for (uint32_t y = 0; y < map.box[1]; ++y, to += map.box[0] * kElementBytes)
        copy_row(to, map, {at[0], int64_t{at[1]} + y, int64_t{at[2]} + z, int64_t{at[3]} + w});
}

}  // namespace

void load_box(void* smem, const CUtensorMap& map, const int (&at)[4], uint64_t& barrier, unsigned rank) {
  auto* const to = static_cast<unsigned char*>(peer_smem(smem, rank));
  auto* const counts = static_cast<uint64_t*>(peer_smem(&barrier, rank));
  if (reinterpret_cast<uintptr_t>(smem) % 128 != 0) fail("load_box: an address is not aligned");
  std::memset(to, kPoison, box_bytes(map));
  write_smem_of_products(rank, to, box_bytes(map));
  later(
      [to, counts, map, rank, x = at[0], y = at[1], z = at[2], w = at[3]] {
        copy_box(to, map, {x, y, z, w});
        write_smem_of_products(rank, to, box_bytes(map));
        mbarrier_complete(*counts, box_bytes(map));
      },
      rank);
}

}  // namespace fi::emulation
