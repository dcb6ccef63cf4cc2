// Latent attention on CUDA cores: the kernel for whatever others don't take (cuda/kernels/mla_generic*.cu),
// its arguments and how its work is cut.
#pragma once

#include "fi/cuda/gpu.h"
#include "fi/mla.h"

namespace fi::cuda::mla {

// A tile: rows (query heads x queries), keys, and columns of the output, 64 a part.
inline constexpr int64_t kTileRows = 64, kTileKeys = 64;
inline constexpr int kTileParts = 4;
inline constexpr int64_t kTileColumns = 64 * kTileParts;

// A part of fewer tiles takes longer to write and to join than to attend to.
inline constexpr int64_t kMinPartTiles = 4;

// What a request is cut into: blocks of rows, each of them into parts of its keys.
struct Cut {
  int64_t blocks, parts;

  FI_INLINE Cut of(const Request& r, int64_t num_heads, int64_t part_tiles) {
    const int64_t tiles = (r.kv_len + kTileKeys - 1) / kTileKeys,
                  parts = (tiles + part_tiles - 1) / part_tiles;
    return {(r.qo_len * num_heads + kTileRows - 1) / kTileRows, parts > 1 ? parts : 1};
  }
  FI_HD int64_t items() const { return blocks * parts; }
  FI_HD int64_t slots() const { return parts > 1 ? items() : 0; }
};

struct GenericArgs {
  MlaParams p;
  int64_t slices;  // of the output's columns
  int64_t room;    // about this many times the kernel's work is cut: items x slices
  // Made on the device. An item is a part of a block of rows; one of several has a slot for its result.
  int64_t* part_tiles;  // [1]: the most tiles of a part
  int64_t* first_item;  // [batch + 1]: the items before a request's
  int64_t* first_slot;  // [batch + 1]: the slots before
  int64_t width;        // of a slot's rows
  float *out, *state;   // [slots][kTileRows][width]: not divided; [slots][kTileRows][2]: maximum, sum
};

// The entry (host).
void on_cuda_cores(const MlaParams& p, const Gpu& gpu);

// One a dtype (host).
template <class T>
void run_generic(const GenericArgs& args, const Gpu& gpu);

}  // namespace fi::cuda::mla
