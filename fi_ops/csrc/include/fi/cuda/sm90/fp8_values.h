// Values of 8 bits, transposed in shared memory: products of 8 bits take operands only as rows of what they
// sum over, which for values are keys.
//
// ldmatrix transposes pairs of bytes; byte permutations part the pairs. Within 16 keys the order that comes
// out is that in which a thread has its weights (fp8_wgmma.h): place 4t + 2i + e is key 8i + 2t + e, so that
// scores become the next product's operand where they lie. Columns come in an order of their own, too: row
// 16c
// + 8e + i is column 16c + 2i + e, which gives a thread four neighbours of the output, and lets the stores
// hit all banks.
#pragma once

#include "fi/cuda/sm90/fp8_config.h"
#include "fi/cuda/sm90/stmatrix.h"
#include "fi/cuda/sm90/wgmma.h"

namespace fi::cuda::sm90 {

// By Config::kTransposers warps; `warp` counts them.
template <class Config>
class Fp8Transposer {
 public:
  using Smem = Fp8Smem<Config>;
  static constexpr int kBlockN = Config::kBlockN;

  FI_DEVICE_INLINE static void run(Smem& smem, const PrefillShape& shape, int warp) {
    PrefillQueue<Config::kBlockM, kBlockN> queue(shape);
    PrefillWork work;
    RingPosition<Config::kStages> at;
    while (queue.next(work)) {
      const SeenKeys rows(shape, work.q_start, Config::kBlockM);
      transpose_tiles(smem, at, work.tiles,
                      {rows.first_row + shape.first_key, rows.last_row + shape.last_key + 1}, warp);
    }
  }

  // Over a batch, where the producer says which tiles there are.
  FI_DEVICE_INLINE static void run(Fp8BatchSmem<Config>& smem, int warp) {
    RingPosition<1> q_at;
    RingPosition<Config::kStages> at;
    for (;; q_at.advance()) {
      barrier_wait(smem.q_full, q_at.parity);
      const BatchTile& tile = smem.tiles[q_at.parity];
      if (!tile.any()) return;
      transpose_tiles(smem, at, tile.work.tiles,
                      {tile.work.q_start + tile.first_key, min(tile.q_end + tile.last_key, tile.kv_len)},
                      warp);
      __syncwarp();  // lane 0's arrival speaks for all: `tile` was read
      if (threadIdx.x % 32 == 0) barrier_arrive(smem.q_empty);
    }
  }

 private:
  // `seen`: by some row; what values lie outside may be anything.
  FI_DEVICE_INLINE static void transpose_tiles(Smem& smem, RingPosition<Config::kStages>& at, Range tiles,
                                               Range seen, int warp) {
    for (int tile = tiles.end - 1; tile >= tiles.begin; --tile) {
      barrier_wait(smem.v_full[at.stage], at.parity);
      barrier_wait(smem.transposed_empty[at.stage], at.parity ^ 1);
      const Range here{seen.begin - tile * kBlockN, seen.end - tile * kBlockN};
      if (here.begin > 0 || here.end < kBlockN) {
        transpose<true>(smem.transposed[at.stage], smem.v[at.stage], here, warp);
      } else {
        transpose<false>(smem.transposed[at.stage], smem.v[at.stage], here, warp);
      }
      fence_for_products();
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        barrier_arrive(smem.v_empty[at.stage]);
        barrier_arrive(smem.transposed_full[at.stage]);
      }
      at.advance();
    }
  }

  // With kCut, values of keys that no row sees become 0: they may be NaN, which a weight of 0 doesn't remove.
  template <bool kCut>
  FI_DEVICE_INLINE static void transpose(unsigned char* to, const unsigned char* from, Range seen, int warp) {
    const int lane = threadIdx.x % 32, line = lane % 8, matrix = lane / 8;
    // Of 32 keys by 16 columns, lane by lane: the row to read; the row to write.
    from += (8 * matrix + line) * 128;
    to += (8 * (matrix % 2) + line) * 128;
#pragma unroll 1
    for (int keys = warp; keys < kBlockN / 32; keys += Config::kTransposers) {
      const unsigned char* rows = from + keys * 32 * 128;
      unsigned char* panel = to + keys / 4 * Smem::kTransposedPanelBytes;
      const int chunk = (keys % 4 * 2 + matrix / 2) ^ line;  // the 128-byte swizzle
#pragma unroll kCut ? 1 : 4
      for (int columns = 0; columns < Config::kHeadDim / 16; ++columns) {
        uint32_t x[4];
        ldmatrix_x4_trans(x, rows + columns / 8 * Smem::kKvPanelBytes + ((columns % 8) ^ line) * 16);
        if constexpr (kCut) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int key = 32 * keys + 8 * i + lane % 4 * 2;
            if (key < seen.begin || key >= seen.end) x[i] &= 0xffff0000u;
            if (key + 1 < seen.begin || key + 1 >= seen.end) x[i] &= 0x0000ffffu;
          }
        }
        const uint32_t y[4] = {__byte_perm(x[0], x[1], 0x6420), __byte_perm(x[0], x[1], 0x7531),
                               __byte_perm(x[2], x[3], 0x6420), __byte_perm(x[2], x[3], 0x7531)};
        stmatrix_x4(panel + columns * 16 * 128 + chunk * 16, y);
      }
    }
  }
};

}  // namespace fi::cuda::sm90
