// A boolean mask, joined with causal, window and length, as the Hopper kernel reads it: a class for each
// tile, and a bit a key for the tiles that are cut.
//
// A kernel of its own (cuda/kernels/sm90/mask_bits.cu) reads the mask once. Dimensions that the mask is
// broadcast over are scanned once.
#pragma once

#include "fi/cuda/attention_rows.h"
#include "fi/cuda/gpu.h"

namespace fi::cuda::sm90 {

// What the rows of a query tile see of a KV tile: flags, 0 where none sees any key of it.
enum TileFlag : uint8_t {
  kSeen = 1,      // some row sees some key
  kCut = 2,       // some row doesn't see some key
  kHasUnseen = 4  // no row sees some key
};

struct MaskBits {
  const uint8_t* classes = nullptr;  // [lists][kv_tiles], TileFlags; null: no mask
  // [lists][kv_tiles][block_m + 1][4], where a tile is kSeen. Of a row: bit i of word t is the tile's key
  // i / 2 * 8 + 2 * t + i % 2, in the order in which a product's fragment has them (fi/cuda/sm90/wgmma.h).
  // The last line: bit i of word w says whether any row sees key 32 * w + i.
  const uint32_t* bits = nullptr;
  // Of the lists, in tiles; 0 where they are shared. All tiles are a grid of the scan: less than 2^31.
  int stride_b = 0, stride_h = 0, stride_q = 0;
  int kv_tiles = 0;

  // The first tile of a list.
  FI_DEVICE_INLINE int list_of(int b, int head, int q_tile) const {
    return b * stride_b + head * stride_h + q_tile * stride_q;
  }
};

// Scans p.mask for query tiles of `block_m` rows and KV tiles of `block_n` keys (at most 128): into scratch.
MaskBits scan_mask(const AttentionParams& p, const Gpu& gpu, int block_m, int block_n);

// At most what it asks of scratch.
int64_t mask_scratch_bytes(const AttentionParams& p);

}  // namespace fi::cuda::sm90
